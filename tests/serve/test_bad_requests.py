"""What is wrong is refused in OpenAI's shape, names its field, tells nothing of the inside, leaves nothing behind."""

import contextlib
import io
import json
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient
from stub_backend import HOME, Server, clip, picture

from sora_train.data.decode.video_io import encode_h264
from sora_train.serving.jobs.job import DatabaseAway

UNKNOWN = "video_" + "0" * 24
FORM = "multipart/form-data; boundary=x"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    server = Server(
        tmp_path_factory.mktemp("server"),
        limits={"seconds": 60.0, "json_bytes": 1 << 20, "upload_bytes": 4 << 20},
    )
    # A fault inside must be answered too.
    server.http = TestClient(server.app, base_url=HOME, raise_server_exceptions=False)
    return server


@pytest.fixture(autouse=True)
def nothing_is_kept(server: Server):
    """After a refused request there is no job, no file, no folder of what arrived."""
    before = server.service.store.counts()
    yield
    assert server.service.store.counts() == before
    folder = server.service.settings.folder
    assert not any((folder / "incoming").iterdir())
    assert not any(path.is_file() for path in (folder / "files").rglob("*"))


def refused(answer, status: int = 400, param: str | None = None, code: str | None = None) -> str:
    """The message of an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"]
    assert answer.headers["x-request-id"].startswith("req_")
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    for inside in ("Traceback", "sqlalchemy", "/work", "/tmp", "sora_train/", ".py", "pydantic"):
        assert inside not in answer.text
    return error["message"]


WRONG = {
    "prompt": ["", None, 3, ["a"], "a\u0000b", "a" * 32_001, {"a": 1}, " \n"],
    "model": ["nothing", "", 3, "tiny'; --", "../tiny"],
    "seconds": ["many", 0, -1, "0", 61, 1e300, True, [4], "4;", "", "nan", "1e999"],
    "size": [
        "64",
        "64x",
        "x48",
        "65x48",
        "0x0",
        "-64x48",
        "64x48x3",
        "٦٤x48",
        64,
        "9999x9999",
        "64*48",
    ],
    "frames": [0, -1, 1.5, "many", True, 100_001, [16]],
    "fps": [0, -8, 1000, "fast", True, "inf"],
    "steps": [0, 1001, "few", 2.5, False],
    "guidance_scale": [-1, 101, "strong", 13, "nan"],
    "seed": [-1, 1 << 63, "lucky", 1.5, True],
    "strength": [0, -0.1, 1.1, "hard", 0.5],
    "negative_prompt": [3, "a\u0007b", ["a"]],
    "adapters": ["unknown", ["unknown"], [3], [""], ["a"] * 17, {"a": 1}],
    "operation": ["fly", "t2i", "", "extend", "upscale", 3],
    "gap": ["5", "5:6:7", [1], [1, "x"], "a:b", [5, 13]],
    "frames_given": [0, "all", 9],
    "characters": ["char_unknown", [UNKNOWN], [None]],
    "storyboard": ["[", "{}", [], [3], [{"at": 0}], [{"at": -1, "prompt": "a"}], [{"prompt": "a"}]],
    "input_reference": [
        "x",
        {"file_id": "file-1"},
        {},
        {"image_url": 3},
        {"url": "https://a"},
        [1],
    ],
    "image": [{"image_url": "file:///etc/passwd"}, {"image_url": "data:,x"}],
    "last_image": [{"image_url": "data:image/png;base64,AAAA"}, {"image_url": "http://10.0.0.1/a"}],
    "video": [{"id": UNKNOWN}, {"id": "../../etc"}, {"id": 3}, "x", {"image_url": "data:,x"}],
    "nonsense": [1],
}
"""Fields and values that none of them may have."""
CASES = [(name, value) for name, values in WRONG.items() for value in values]
BOARDS = [
    [{"at": 1, "prompt": "a"}, {"at": 0, "prompt": "b"}],
    [{"at": 99, "prompt": "a"}],
    [{"at": 0, "image": "/etc/passwd", "prompt": "a"}],
    [{"at": 0, "image": "../../secret.png", "prompt": "a"}],
    [{"at": 0, "video": "b.mp4", "prompt": "a"}],
    [{"at": 0, "prompt": {"subject": "a", "wings": "b"}}],
    [{"at": 0, "prompt": "a", "extra": 1}],
]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda part: str(part)[:40])
def test_every_field_wrong_in_turn(server: Server, name: str, value):
    body = {"prompt": "a ring", name: value}
    answer = server.http.post(
        "/v1/videos",
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    assert name in refused(answer)
    assert answer.json()["error"]["param"].startswith(name)


@pytest.mark.parametrize("cues", BOARDS, ids=str)
def test_wrong_storyboards(server: Server, cues: list):
    answer = server.http.post("/v1/videos", json={"prompt": "a", "storyboard": cues})
    message = refused(answer)
    assert answer.json()["error"]["param"].startswith("storyboard") and "passwd" not in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"a"',
        "\ufeff{}",
        '{"prompt": NaN}',
        "[" * 100_000,
        '{"prompt": "\\ud800"}',
    ],
    ids=lambda text: text[:20],
)
def test_bodies_that_are_no_json_object(server: Server, text: str):
    headers = {"content-type": "application/json"}
    refused(server.http.post("/v1/videos", content=text.encode(), headers=headers))


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/xml", "application/jsonx", "multipart/form-data"]
)
def test_kinds_of_bodies_that_are_not_read(server: Server, kind: str):
    refused(
        server.http.post("/v1/videos", content=b'{"prompt": "a"}', headers={"content-type": kind})
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x",
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na ring',
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na ring\r\n',
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
        b"--x\r\nnonsense\r\n\r\na\r\n--x--\r\n",
        b'--y\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--y--\r\n',
        b"\xff" * 1000,
    ],
    ids=range(8),
)
def test_forms_that_are_torn(server: Server, body: bytes):
    refused(server.http.post("/v1/videos", content=body, headers={"content-type": FORM}))


@pytest.mark.parametrize(
    "fields",
    [
        [("prompt", "a"), ("prompt", "b")],
        [("prompt", "a"), ("video", "x"), ("video[id]", "y")],
        [("prompt", "a"), ("video[id]", "x"), ("video", "y")],
        [("prompt", "a"), ("storyboard[][at]", "0")],
        [("prompt", "a"), ("a[b", "0")],
        [("prompt", "a"), ("[]", "0")],
        [("prompt", "a"), ("video" + "[a]" * 500, "0")],
        [("prompt", "a"), ("adapters[]", "x"), ("adapters", "y")],
        [("prompt", "a")] + [(f"f{number}", "x") for number in range(300)],
    ],
    ids=range(9),
)
def test_forms_whose_names_make_no_sense(server: Server, fields: list):
    files = [(name, (None, value)) for name, value in fields]
    refused(server.http.post("/v1/videos", files=files))


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def moving() -> bytes:
    """An mp4 whose frames all take thousands of bytes."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (16, 48, 64, 3), dtype=np.uint8)
    encode_h264(noise, 8, buffer)
    return buffer.getvalue()


FILES = {
    "empty": b"",
    "text": b"hello",
    "html": b"<html><script>alert(1)</script>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "zip": b"PK\x03\x04" + bytes(100),
    "png without an end": picture()[:-200],
    "png of a head": picture()[:40],
    "jpeg without an end": picture(kind="JPEG")[:300],
    "bomb": bomb(),
    "mp4 without an end": clip()[:-700],
    "mp4 without its last byte": moving()[:-1],
    "mp4 without its second half": moving()[: len(moving()) // 2],
    "mp4 of a head": clip()[:48],
    "mp4 of nonsense": b"\x00\x00\x00\x18ftypmp42" + bytes(4000),
    "mkv of nonsense": b"\x1aE\xdf\xa3" + bytes(4000),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none(server: Server, name: str):
    for slot in ("input_reference", "image", "video"):
        answer = server.http.post(
            "/v1/videos",
            data={"prompt": "a", "operation": "loop"},
            files={slot: ("a.png", FILES[name])},
        )
        refused(answer, param=slot, code="invalid_file")
    answer = server.http.post(
        "/v1/videos/edits", data={"prompt": "a"}, files={"video": FILES[name]}
    )
    refused(answer, param="video", code="invalid_file")


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, {"image": clip()}, "image"),
        ({"operation": "loop"}, {"video": picture()}, "video"),
        ({}, {"video": clip()}, "operation"),
        ({"operation": "t2v"}, {"image": picture()}, "image"),
        ({"operation": "infill"}, {"video": clip()}, "gap"),
        ({"operation": "connect"}, {"video": clip()}, "operation"),
        ({"operation": "edit", "seconds": "4"}, {"video": clip()}, "seconds"),
        ({"operation": "upscale"}, {"video": clip()}, "size"),
        ({"image": '{"image_url": "data:,"}'}, {"image": picture()}, "image"),
        ({}, {"nonsense": picture()}, "nonsense"),
        ({}, {"prompt2": picture()}, "prompt2"),
        ({}, {"files": picture()}, "files"),
        ({"frames": "8", "seconds": "4"}, {"image": picture()}, "frames"),
    ],
)
def test_files_that_do_not_fit(server: Server, data: dict, files: dict, param: str):
    refused(server.http.post("/v1/videos", data={"prompt": "a", **data}, files=files), param=param)


@pytest.mark.parametrize("path", ["edits", "extensions", "characters"])
def test_calls_that_need_a_video(server: Server, path: str):
    fields = {
        "edits": {"prompt": "a"},
        "extensions": {"prompt": "a", "seconds": "4"},
        "characters": {"name": "a"},
    }[path]
    refused(server.http.post(f"/v1/videos/{path}", json=fields), param="video")
    refused(
        server.http.post(f"/v1/videos/{path}", data=fields, files={"video": picture()}),
        param="video",
    )
    two = [("video", clip()), ("video", clip())]
    refused(server.http.post(f"/v1/videos/{path}", data=fields, files=two), param="video")
    for name in fields:
        rest = {key: value for key, value in fields.items() if key != name}
        answer = server.http.post(f"/v1/videos/{path}", data=rest, files={"video": clip()})
        refused(answer, param=name, code="missing_required_parameter")


def test_bodies_that_are_too_large(server: Server):
    refused(server.http.post("/v1/videos", json={"prompt": "a" * (2 << 20)}), 413)
    big = {"input_reference": picture() + bytes(5 << 20)}
    refused(server.http.post("/v1/videos", data={"prompt": "a"}, files=big), 413)

    def endless():
        for _ in range(100):
            yield b"a" * (1 << 20)

    for kind in (FORM, "application/json"):
        refused(
            server.http.post("/v1/videos", content=endless(), headers={"content-type": kind}), 413
        )


IDS = [
    UNKNOWN,
    "video_" + "g" * 24,
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e",
    "video_'%20OR%201=1--",
    "video_%00",
    "video_" + "0" * 5000,
    "%0d%0aSet-Cookie:%20a=b",
    "edits",
    "٣" * 5,
]


@pytest.mark.parametrize("one", IDS, ids=lambda one: one[:30])
def test_ids_of_no_video(server: Server, one: str):
    for call, path in (
        (server.http.get, f"/v1/videos/{one}"),
        (server.http.get, f"/v1/videos/{one}/content"),
        (server.http.delete, f"/v1/videos/{one}"),
        (server.http.get, f"/v1/videos/characters/{one}"),
    ):
        answer = call(path)
        refused(answer, 404)
        assert "set-cookie" not in answer.headers
    refused(server.http.post(f"/v1/videos/{one}/remix", json={"prompt": "a"}), 404)
    refused(server.http.get("/v1/videos", params={"after": one[:90]}), param="after")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=many", "limit"),
        ("order=up", "order"),
        ("after=" + "a" * 200, "after"),
    ],
)
def test_wrong_pages(server: Server, query: str, param: str):
    refused(server.http.get(f"/v1/videos?{query}"), param=param)


def test_wrong_variants(server: Server):
    refused(server.http.get(f"/v1/videos/{UNKNOWN}/content?variant=audio"), param="variant")


@pytest.mark.parametrize("key", ["", "a" * 256, "a b", "é".encode(), "a\tb"])
def test_wrong_idempotency_keys(server: Server, key):
    answer = server.http.post("/v1/videos", json={"prompt": "a"}, headers={"Idempotency-Key": key})
    refused(answer, param="Idempotency-Key")


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/", "/v1/videos/", "/v1//videos", "/v1/images", "/%00", "/../etc"]
)
def test_paths_that_are_not_there(server: Server, path: str):
    refused(server.http.get(path), 404)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_methods_that_a_path_does_not_know(server: Server, method: str):
    answer = server.http.request(method, "/v1/videos")
    refused(answer, 405)
    assert "POST" in answer.headers["allow"] or "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (RuntimeError("secret: /srv/passwords"), 500),
        (DatabaseAway("the database postgresql://u:***@h does not answer"), 503),
        (OSError(28, "No space left on device", "/srv/files"), 503),
        (KeyError("inside"), 500),
        (MemoryError(), 500),
    ],
)
def test_faults_inside_are_told_without_the_inside(
    server: Server, monkeypatch, caplog, fault, status: int
):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(server.service.store, "page", fail)
    monkeypatch.setattr(server.service.files, "put", fail)
    message = refused(server.http.get("/v1/videos"), status)
    assert "secret" not in message and "postgresql" not in message
    (line,) = caplog.records
    # A database that is away is no riddle: a sentence for each request, not a page.
    assert bool(line.exc_info) != isinstance(fault, DatabaseAway)
    assert "does not answer" in line.getMessage() or line.exc_info
    answer = server.http.post("/v1/videos", data={"prompt": "a"}, files={"image": picture()})
    refused(answer, status)


def test_a_server_without_its_database_is_not_ready(server: Server, monkeypatch):
    def away():
        raise DatabaseAway("gone")

    monkeypatch.setattr(server.service.store, "counts", away)
    assert server.http.get("/readyz").status_code == 503
    assert server.http.get("/healthz").status_code == 200
    assert "sora_database_up 0.0" in server.http.get("/metrics").text
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("host", "headers"),
    [
        ("http://evil.example", {}),
        ("http://127.0.0.1.evil.example:8000", {}),
        (HOME, {"Origin": "https://evil.example"}),
        (HOME, {"Origin": "null"}),
        (HOME, {"Origin": "http://127.0.0.1:9999"}),
    ],
)
def test_other_pages_in_a_browser_ask_for_nothing(server: Server, host: str, headers: dict):
    stranger = TestClient(server.app, base_url=host, headers=headers)
    refused(stranger.post("/v1/videos", json={"prompt": "a"}), 403)
    refused(stranger.get("/v1/videos"), 403)


def test_our_own_page_may_ask(server: Server):
    own = TestClient(server.app, base_url=HOME, headers={"Origin": HOME})
    assert own.get("/v1/videos").status_code == 200


def test_what_breaks_off_on_the_wire_is_no_job(server: Server):
    """On a real connection: bodies that end early, and heads that are no HTTP."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(server.app, log_level="critical", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    head = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    try:
        for sent in (
            head + b'Content-Length: 100\r\n\r\n{"prompt": "a"}',
            head + b"Content-Length: many\r\n\r\n{}",
            head + b"Content-Length: -1\r\n\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            head + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
            b"\x16\x03\x01" + bytes(200),
        ):
            with socket.create_connection(listener.getsockname()[:2], timeout=10) as wire:
                answer = b""
                with contextlib.suppress(ConnectionError):  # it may have had enough of us
                    wire.sendall(sent)
                    wire.shutdown(socket.SHUT_WR)
                    answer = b"".join(iter(lambda: wire.recv(1 << 16), b""))
                assert not answer or b" 4" in answer.split(b"\r\n")[0], answer[:200]
        with socket.create_connection(listener.getsockname()[:2], timeout=10) as wire:
            wire.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert b"200" in wire.recv(100)
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"fps": 61}, "fps"),
        ({"guidance_scale": 0, "negative_prompt": "what is forbidden"}, "guidance_scale"),
        ({"guidance_scale": 0.9, "negative_prompt": "what is forbidden"}, "guidance_scale"),
        (
            {"storyboard": [{"at": n / 9, "prompt": "a", "image": "data:,"} for n in range(17)]},
            "storyboard",
        ),
    ],
)
def test_what_would_cost_much_or_leads_around_the_policy(server: Server, body: dict, param: str):
    refused(server.http.post("/v1/videos", json={"prompt": "a", **body}), param=param)

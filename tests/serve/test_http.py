"""The same by plain HTTP, so that it holds without the client: both encodings, paging, ranges, repeated requests."""

import json
from pathlib import Path

import pytest
from stub_backend import Server, clip, picture

CUES = [{"at": 0, "prompt": "a", "image": "first.png"}, {"at": 2, "video": "b.mp4", "seconds": 1}]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def done(server: Server, **body) -> dict:
    """A completed video."""
    video = server.http.post("/v1/videos", json={"prompt": "a ring", **body}).json()
    server.work_all()
    return server.http.get(f"/v1/videos/{video['id']}").json()


# --- what is sent ---


@pytest.mark.parametrize("encoding", ["json", "form", "urlencoded"])
def test_encodings_say_the_same(server: Server, encoding: str):
    values = {"prompt": "a ring", "seconds": 8, "size": "32x32", "seed": 3, "fps": 8.5}
    sent = {"json": values}
    if encoding != "json":
        sent = {"data": {name: str(value) for name, value in values.items()}}
    if encoding == "form":
        sent["files"] = {"input_reference": ("a", picture())}
    answer = server.http.post("/v1/videos", **sent)
    assert answer.status_code == 200, answer.text
    shown = {**values, "seconds": "8"}
    assert {name: answer.json()[name] for name in shown} == shown


def test_every_answer_has_an_id_of_its_request(server: Server):
    answers = [server.http.get(path) for path in ("/healthz", "/v1/videos", "/nowhere")]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 3 and all(one.startswith("req_") for one in ids)


@pytest.mark.parametrize(
    ("fields", "files", "op", "names"),
    [
        ({}, {"image": picture(), "last_image": picture()}, "i2v", ["image.png", "last_image.png"]),
        ({}, {"input_reference": picture(kind="JPEG")}, "i2v", ["image.jpg"]),
        ({"operation": "loop"}, {"video": clip()}, "loop", ["video.mp4"]),
        ({"operation": "infill", "gap": "5:13"}, {"video": clip()}, "infill", ["video.mp4"]),
        ({"operation": "edit", "strength": "0.5"}, {"image": picture()}, "edit", ["image.png"]),
        ({"operation": "extend"}, {"input_reference": clip()}, "extend", ["video.mp4"]),
        ({"operation": "upscale", "size": "128x96"}, {"video": clip()}, "upscale", ["video.mp4"]),
    ],
)
def test_operations_take_their_files(server: Server, fields, files, op: str, names: list[str]):
    sent = {name: ("upload", data, "application/octet-stream") for name, data in files.items()}
    answer = server.http.post("/v1/videos", data={"prompt": "a", **fields}, files=sent)
    assert answer.status_code == 200, answer.text
    video = answer.json()
    asked = server.service.store.get(video["id"]).asked
    assert video["operation"] == op == asked.sampling_op
    assert [upload.name.rpartition("/")[2] for upload in asked.uploads] == names
    assert asked.gap == ((5, 13) if op == "infill" else None)


def test_connect_takes_two_videos(server: Server):
    files = [("video", ("a", clip())), ("video", ("b", clip(8)))]
    video = server.http.post("/v1/videos", data={"prompt": "a"}, files=files).json()
    asked = server.service.store.get(video["id"]).asked
    assert asked.sampling_op == "connect"
    assert [one.name.rpartition("/")[2] for one in asked.uploads] == ["video.mp4", "video_2.mp4"]


@pytest.mark.parametrize("own_size", [True, False])
def test_a_video_of_the_server_stands_for_a_file(server: Server, own_size: bool):
    source = done(server, seconds=2, size="32x32")
    body = {"prompt": "b", "operation": "upscale", "video": {"id": source["id"]}, "size": "64x64"}
    if not own_size:
        body |= {"operation": "infill", "gap": [4, 8]}
        del body["size"]
    video = server.http.post("/v1/videos", json=body).json()
    asked = server.service.store.get(video["id"]).asked
    assert asked.source == source["id"] and asked.op == "edit"
    assert video["size"] == ("64x64" if own_size else "32x32") and video["seconds"] == "2"


def test_a_storyboard_shows_the_files_that_come_with_it(server: Server):
    files = [("files", ("first.png", picture())), ("files", ("b.mp4", clip()))]
    data = {"prompt": "a", "storyboard": json.dumps({"cues": CUES}), "seconds": "4"}
    answer = server.http.post("/v1/videos", data=data, files=files)
    assert answer.status_code == 200, answer.text
    asked = server.service.store.get(answer.json()["id"]).asked
    folder = f"inputs/{answer.json()['id']}"
    assert asked.storyboard == [
        {"at": 0.0, "prompt": "a", "image": f"{folder}/cue_0.png"},
        {"at": 2.0, "video": f"{folder}/cue_1.mp4", "seconds": 1.0},
    ]


def test_a_remix_of_an_edit_keeps_what_was_edited(server: Server):
    source = done(server, seconds=2)
    body = {"prompt": "b", "video": {"id": source["id"]}}
    edit = server.http.post("/v1/videos/edits", json=body).json()
    server.work_all()
    remix = server.http.post(f"/v1/videos/{edit['id']}/remix", json={"prompt": "c"}).json()
    assert remix["remixed_from_video_id"] == edit["id"] and remix["operation"] == "edit"
    (upload,) = server.service.store.get(remix["id"]).asked.uploads
    original = server.http.get(f"/v1/videos/{source['id']}/content").content
    with server.service.files.open(upload.name) as file:
        assert file.read() == original


def test_a_repeated_request_gives_the_same_video(server: Server):
    def ask(prompt: str = "a", image: bytes = b""):
        files = {"input_reference": ("a", image or first)}
        headers = {"Idempotency-Key": "once"}
        return server.http.post("/v1/videos", data={"prompt": prompt}, files=files, headers=headers)

    first = picture()
    video = ask().json()
    assert ask().json() == video
    kept = list((server.service.settings.folder / "files" / "inputs").iterdir())
    assert [path.name for path in kept if any(path.iterdir())] == [video["id"]]
    for other in (ask("b"), ask(image=picture())):
        assert other.status_code == 409 and other.headers["x-should-retry"] == "false"
        assert other.json()["error"]["code"] == "idempotency_conflict"
    assert len(server.http.get("/v1/videos").json()["data"]) == 1


# --- what is answered ---


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        (None, 200, slice(None)),
        ("bytes=0-", 206, slice(0, None)),
        ("bytes=0-99", 206, slice(0, 100)),
        ("bytes=100-100", 206, slice(100, 101)),
        ("bytes=-50", 206, slice(-50, None)),
        ("bytes=-99999999", 206, slice(None)),
        ("bytes=100-99999999", 206, slice(100, None)),
        ("bytes=99999999-", 416, slice(0, 0)),
        ("bytes=-0", 416, slice(0, 0)),
        ("bytes=50-40", 200, slice(None)),
        ("bytes=0-1,5-6", 200, slice(None)),
        ("bytes=-", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
        ("bytes=a-b", 200, slice(None)),
        ("bytes=" + "9" * 30 + "-", 200, slice(None)),
    ],
)
def test_ranges_of_a_file(server: Server, asked, status: int, part: slice):
    path = f"/v1/videos/{done(server)['id']}/content"
    whole = server.http.get(path).content
    answer = server.http.get(path, headers={"Range": asked} if asked else {})
    assert (answer.status_code, answer.content) == (status, whole[part])
    assert answer.headers["content-length"] == str(len(whole[part]))
    if status == 206:
        start, stop, _ = part.indices(len(whole))
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(whole)}"


def test_a_range_of_another_file_is_not_mixed_in(server: Server):
    path = f"/v1/videos/{done(server)['id']}/content"
    whole = server.http.get(path)
    same = {"Range": "bytes=0-9", "If-Range": whole.headers["etag"]}
    assert server.http.get(path, headers=same).status_code == 206
    other = {"Range": "bytes=0-9", "If-Range": '"other"'}
    assert server.http.get(path, headers=other).content == whole.content


def test_files_that_expired_are_not_found(server: Server):
    video = done(server)
    store = server.service.store
    for name in store.get(video["id"]).outputs.values():
        server.service.files.remove(name)
    answer = server.http.get(f"/v1/videos/{video['id']}/content")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "video_expired"


def test_content_before_it_is_ready_is_no_status_that_clients_try_again(server: Server):
    video = server.http.post("/v1/videos", json={"prompt": "a"}).json()
    path = f"/v1/videos/{video['id']}/content"
    assert server.http.get(path).status_code == 400
    server.service.store.claim("w", lease_seconds=9)
    assert server.http.get(path).status_code == 400


def test_a_video_says_when_to_ask_again_until_it_is_over(server: Server):
    video = server.http.post("/v1/videos", json={"prompt": "a"}).json()
    path = f"/v1/videos/{video['id']}"
    assert server.http.get(path).headers["openai-poll-after-ms"] == "1000"
    server.work()
    assert "openai-poll-after-ms" not in server.http.get(path).headers


def test_measures_of_the_server(server: Server):
    done(server)
    server.http.get("/v1/videos/video_nothing")
    text = server.http.get("/metrics").text
    assert 'sora_jobs{status="completed"} 1.0' in text and "sora_database_up 1.0" in text
    route = 'route="/v1/videos/{video_id}"'
    assert f'sora_requests_total{{method="GET",{route},status="404"}} 1.0' in text
    assert f'sora_request_seconds_count{{method="GET",{route}}} 2.0' in text


def test_pages_without_anything_from_elsewhere(server: Server):
    page = server.http.get("/docs").text
    assert "/v1/videos/extensions" in page and "guidance_scale" in page
    assert "<script" not in page and "https://" not in page

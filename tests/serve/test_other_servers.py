"""Jobs on another server end with a file that is whole, or with a reason, whatever that server does; and it makes each
video once, as far as anybody can tell."""

import io
import itertools
import json
import logging
import random
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from sentences import refuses, says
from upstreams import Server, after, answers, cut_off, drips, resets, serving, silent

from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import UserError
from sora_train.serving.backends.base import BadRequest, Cancelled, Retry
from sora_train.serving.backends.openai import OpenAIBackend
from sora_train.serving.errors import Unavailable
from sora_train.serving.jobs.delivery import Refused
from sora_train.serving.jobs.files import FileStore
from sora_train.serving.jobs.job import Asked, Job, Upload
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.jobs.sweeping import sweep
from sora_train.serving.jobs.worker import Pace, Worker
from sora_train.serving.settings import BackendSettings
from sora_train.tools.convert import adapter_file, command, to_diffusers

QUICK = {
    "poll_seconds": 0.02, "answer_seconds": 20.0, "download_seconds": 20.0, "patience_seconds": 30.0,
    "job_seconds": 90.0,
}  # fmt: skip
JOB_ID = "video_" + "0" * 24


def a_clip(frames: int = 12) -> bytes:
    shades = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 20
    buffer = io.BytesIO()
    encode_h264(np.broadcast_to(shades, (frames, 48, 64, 3)).copy(), 8, buffer)
    return buffer.getvalue()


CLIP = a_clip()


def asked(**values) -> Asked:
    given = {"op": "create", "prompt": "a ring", "model": "tiny", "seconds": 2.0, "size": (64, 48)}
    return Asked(**{**given, **values})


def a_job(**values) -> Job:
    return Job(JOB_ID, "o", asked(**values), "in_progress", 0, 0)


class Case:
    """A backend of a server that stands in for another one, and a job's folder."""

    def __init__(self, server: Server, dialect: str, folder: Path, stack: ExitStack):
        self.server, self.dialect, self.folder, self.stack = server, dialect, folder, stack
        self.told: list[int] = []
        self.settings: dict[str, object] = {}

    def backend(self, **settings) -> OpenAIBackend:
        given = {"kind": "openai", "url": self.server.url, **QUICK, **self.settings, **settings}
        return OpenAIBackend(BackendSettings.model_validate(given))

    def make(
        self, job: Job | None = None, inputs: list[Path] | None = None, *, wanted=None, **settings
    ) -> Path:
        backend = self.backend(**settings)
        gone = wanted or (lambda: False)
        return backend.make(job or a_job(), inputs or [], self.folder, self.told.append, gone)

    def delivered(self, *args, **settings) -> None:
        """The video comes, whole, and nothing else has its name or is left beside it."""
        video = self.make(*args, **settings)
        assert video == self.folder / "video.mp4" and video.read_bytes() == CLIP
        assert {path.name for path in self.folder.iterdir()} == {"video.mp4", "upstream.json"}

    def nothing_partial(self) -> None:
        assert not list(self.folder.glob("*.mp4")) and not list(self.folder.glob("*.tmp"))


@pytest.fixture(params=["vllm-omni", "sglang"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    with ExitStack() as stack:
        server = stack.enter_context(serving(Server(CLIP), request.param))
        (tmp_path / "job").mkdir()
        yield Case(server, request.param, tmp_path / "job", stack)


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[Case]:
    with ExitStack() as stack:
        server = stack.enter_context(serving(Server(CLIP), "vllm-omni"))
        (tmp_path / "job").mkdir()
        yield Case(server, "vllm-omni", tmp_path / "job", stack)


# --- what is sent ---


def test_a_request_is_written_as_each_server_reads_it(case: Case) -> None:
    job = a_job(
        prompt="a \"ring\"\r\n--x, ü", negative_prompt="blur", steps=30, guidance_scale=4.5, seed=7, fps=16.0
    )  # fmt: skip
    case.delivered(job)
    (made,) = case.server.made
    size = {"size": "64x48"} if case.dialect == "sglang" else {"width": 64, "height": 48}
    assert made == size | {
        "prompt": "a \"ring\"\r\n--x, ü", "negative_prompt": "blur", "num_inference_steps": 30, "guidance_scale": 4.5,
        "seed": 7, "fps": 16, "num_frames": 32, "model": "tiny",
    }  # fmt: skip


def test_length_and_seed_are_said_where_the_request_says_none(case: Case) -> None:
    case.delivered(a_job(seconds=1.5), fps=10.0)
    case.server.jobs.clear()
    (case.folder / "video.mp4").unlink()
    (case.folder / "upstream.json").unlink()
    case.delivered(a_job(frames=9), fps=10.0)
    first, second = case.server.made
    assert (first["num_frames"], first["fps"]) == (15, 10) and second["num_frames"] == 9
    assert first["seed"] == second["seed"]  # of the job, so that another attempt makes the same
    assert "negative_prompt" not in first and "guidance_scale" not in first


def test_an_image_goes_along_byte_by_byte(case: Case, tmp_path: Path) -> None:
    image = tmp_path / "00.png"
    image.write_bytes(b"\n" + bytes(range(256)) * 40 + b"\r\n--boundary\r\n")
    job = a_job(sampling_op="i2v", uploads=(Upload("inputs/x/image.png", "image"),))
    source = tmp_path / "01.mp4"  # of a remix: no input of theirs
    source.write_bytes(b"not sent")
    case.delivered(job, [image, source])
    assert case.server.uploads == [image.read_bytes()]


def test_the_key_is_sent_and_shown_nowhere(case: Case, monkeypatch, caplog) -> None:
    monkeypatch.setenv("THEIR_KEY", "sk-secret-7")
    caplog.set_level(logging.DEBUG)
    wrong = answers(400, {"error": {"message": "bad key sk-secret-7 in request"}})
    case.server.always.append(("POST", "/v1/videos", wrong))
    with refuses(Refused, "bad key ... in request") as error:
        case.make(key_env="THEIR_KEY")
    assert error.value.code == "backend_failed"
    sent = {headers.get("authorization") for headers in case.server.headers}
    assert sent == {"Bearer sk-secret-7"}
    assert "sk-secret-7" not in caplog.text + repr(error.value.__context__)
    with refuses(UserError, "backend.key_env=MISSING", "not set"):
        case.backend(key_env="MISSING")


def test_the_loopback_is_asked_without_the_proxies_of_the_environment(
    case: Case, monkeypatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    case.delivered()


def test_the_key_does_not_follow_a_redirection(case: Case, monkeypatch) -> None:
    monkeypatch.setenv("THEIR_KEY", "sk-secret-7")
    other = case.stack.enter_context(serving(Server(CLIP), case.dialect))
    away = answers(302, b"", location=f"http://127.0.0.1:{other.port}/v1/models")
    case.server.always.append(("GET", "/content", away))
    with refuses(Retry, "302"):
        case.make(key_env="THEIR_KEY", patience_seconds=0.3)
    assert not other.requests
    case.nothing_partial()


# --- which server it is ---


def test_a_server_is_known_by_its_paths_or_by_who_owns_its_models(case: Case) -> None:
    assert case.backend().dialect().name == case.dialect
    assert case.backend().models() == ["tiny"]
    case.server.always.append(("GET", "/openapi.json", answers(404)))
    assert case.backend().dialect().name == case.dialect
    case.server.always.append(("GET", "/v1/models", answers(401)))
    with refuses(Retry, "backend.dialect=auto", case.server.url[:-3], "vllm-omni", "sglang"):
        case.backend().dialect()
    assert case.backend(dialect="sglang").dialect().name == "sglang"
    with pytest.raises(Unavailable):
        case.backend().models()
    assert case.backend(names={"sora-2": "big", "b": "big"}).models() == ["big"]


def test_a_gateway_like_ours_is_known_by_its_remix(case: Case) -> None:
    paths = {"paths": {"/v1/videos": {}, "/v1/videos/{id}/remix": {}}}
    case.server.always.append(("GET", "/openapi.json", answers(200, paths)))
    case.server.always.append(("GET", "/v1/models", answers(200, {"data": []})))
    assert case.backend().dialect().name == "openai"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"sampling_op": "extend", "op": "extend"}, "operation"),
        ({"sampling_op": "edit", "op": "edit"}, "operation"),
        ({"storyboard": [{"at": 0, "prompt": "a"}]}, "storyboard"),
        ({"adapters": ("zork",)}, "adapters"),
        ({"character": ("char_1",)}, "characters"),
        ({"strength": 0.5}, "strength"),
        ({"uploads": (Upload("inputs/x/video.mp4", "video"),)}, "input_reference"),
        ({"uploads": (Upload("i/image.png", "image"), Upload("i/b.png", "image"))}, "input_reference"),
        ({"uploads": (Upload("inputs/x/last_image.png", "image"),)}, "last_image"),
    ],
)  # fmt: skip
def test_what_no_server_makes_is_refused_by_name_with_none_around(values, param) -> None:
    backend = OpenAIBackend(BackendSettings(kind="openai", url="http://127.0.0.1:9/v1"))
    with refuses(BadRequest, f"'{param}'" if param in values else "the server of this model") as e:
        backend.check(asked(**values))
    assert e.value.param == param
    backend.check(asked(steps=500))  # nobody knows yet which server it is


@pytest.mark.parametrize(
    ("dialect", "values", "param"),
    [
        ("vllm-omni", {"steps": 201}, "steps"),
        ("vllm-omni", {"guidance_scale": 20.5}, "guidance_scale"),
        ("sglang", {"fps": 23.976}, "fps"),
        ("openai", {"seconds": 1.5}, "seconds"),
        ("openai", {"steps": 10}, "steps"),
        ("openai", {"frames": 10}, "frames"),
        ("openai", {"seed": 0}, "seed"),
        ("openai", {"negative_prompt": "blur"}, "negative_prompt"),
    ],
)
def test_what_one_server_does_not_take_is_refused_by_name(dialect, values, param) -> None:
    backend = OpenAIBackend(
        BackendSettings(kind="openai", url="http://127.0.0.1:9", dialect=dialect)
    )
    with refuses(BadRequest, f"'{param}'") as error:
        backend.check(asked(**values))
    assert error.value.param == param
    backend.check(asked())


@pytest.mark.parametrize("url", ["", "gpu1:8000", "ftp://gpu1/v1", "http:///v1", "http://u:p@gpu1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with refuses(UserError, "backend.url"):
        OpenAIBackend(BackendSettings(kind="openai", url=url))


def test_plain_fields_of_openai_are_sent_to_a_server_that_knows_no_others(vllm: Case) -> None:
    seen: list[bytes] = []

    async def took(send) -> None:
        seen.append(b"")
        await answers(200, vllm.server.begin({"prompt": "x"}, None))(send)

    vllm.server.moods.append(("POST", "/v1/videos", took))
    vllm.delivered(dialect="openai")
    assert len(seen) == 1 and len(vllm.server.made) == 1


# --- the course of a job ---


def test_progress_grows_whatever_the_server_says(case: Case) -> None:
    says_ = (5, 60, 20, "much", None, -3, 250, 61, True, 100)
    case.server.looks = len(says_)
    case.server.steps = [{"progress": one} for one in says_]
    case.delivered()
    assert case.told == [5, 60, 61]


def test_a_status_never_seen_before_is_waited_for(case: Case) -> None:
    case.server.steps = [{"status": "warming_up"}, {"status": "validating"}]
    case.delivered()
    assert len(case.server.made) == 1


def test_a_status_that_never_changes_ends_the_job_in_time_and_frees_the_server(case: Case) -> None:
    case.server.looks = 10**6
    begin = time.monotonic()
    with refuses(Refused, "did not complete this video within 0.4 s", "'in_progress'"):
        case.make(job_seconds=0.4)
    assert time.monotonic() - begin < 20 and len(case.server.deleted) == 1
    case.nothing_partial()


def test_the_time_of_a_video_is_counted_over_attempts(case: Case) -> None:
    case.server.looks = 10**6
    stops = iter([False] * 5)
    with pytest.raises(Cancelled):
        case.make(wanted=lambda: next(stops, True))
    note = json.loads((case.folder / "upstream.json").read_text())
    (case.folder / "upstream.json").write_text(json.dumps(note | {"accepted": time.time() - 99}))
    with refuses(Refused, "within 90 s"):
        case.make()
    assert len(case.server.made) == 1


def test_their_failure_is_passed_on_with_its_reason(case: Case) -> None:
    case.server.failing = "CUDA out of memory\nTried to allocate 9 GiB"
    with refuses(Refused, "CUDA out of memory Tried to allocate 9 GiB") as error:
        case.make()
    assert error.value.code == "backend_failed" and len(case.server.made) == 1
    case.nothing_partial()


def test_a_request_that_they_refuse_is_not_sent_again(case: Case) -> None:
    told = answers(422, {"detail": [{"loc": ["body", "seed"], "msg": "too large"}]})
    case.server.always.append(("POST", "/v1/videos", told))
    with refuses(Refused, "too large"):
        case.make()
    assert case.server.requests.count(("POST", "/v1/videos")) == 1


def test_what_is_delivered_is_deleted_there(case: Case) -> None:
    case.delivered()
    assert len(case.server.deleted) == 1 and not case.server.jobs


# --- restarts ---


def test_a_killed_worker_goes_on_with_the_same_video(case: Case) -> None:
    stops = iter([False] * 5)
    with pytest.raises(Cancelled):
        case.make(wanted=lambda: next(stops, True))
    assert not case.server.deleted, "a worker that stops gives its job back"
    case.delivered()
    assert len(case.server.made) == 1


def test_a_video_that_is_there_is_not_asked_for_again(case: Case) -> None:
    case.delivered()
    before = len(case.server.requests)
    case.delivered()
    after_ = case.server.requests[before:]
    assert all(method == "DELETE" for method, _ in after_)


def test_a_note_of_another_server_means_nothing(case: Case) -> None:
    note = {"server": "http://127.0.0.1:9", "id": "x", "accepted": 0.0, "lost": 5, "unsure": 5}
    (case.folder / "upstream.json").write_text(json.dumps(note))
    case.delivered()


def test_a_server_that_forgot_everything_is_asked_again(case: Case) -> None:
    case.server.looks = 6
    seen = itertools.count()

    def wanted() -> bool:
        if next(seen) == 8:
            case.server.restart()
        return False

    case.delivered(wanted=wanted)
    assert len(case.server.made) == 2
    first, second = case.server.made
    assert first == second
    keys = [h["idempotency-key"] for h in case.server.headers if "idempotency-key" in h]
    assert keys == [f"{JOB_ID}-0", f"{JOB_ID}-1"]


def test_a_server_that_forgets_every_time_is_given_up(case: Case) -> None:
    case.server.looks = 10**6
    case.server.always.append(("GET", "", after(case.server.restart, answers(404))))
    with refuses(Refused, "lost this video 5 times"):
        case.make(dialect=case.dialect)
    assert len(case.server.made) == 5
    case.nothing_partial()


def test_one_of_several_servers_that_does_not_know_a_video_does_not_double_it(case: Case) -> None:
    case.server.looks = 3
    for _ in range(2):
        case.server.moods.append(("GET", "", answers(404, {"detail": "Video not found"})))
    case.delivered(dialect=case.dialect)
    assert len(case.server.made) == 1


def test_a_server_that_is_down_for_a_while_is_waited_for(tmp_path: Path) -> None:
    server = Server(CLIP)
    with serving(server, "vllm-omni"):
        pass  # its port is known now, and nothing listens
    (tmp_path / "job").mkdir()
    case = Case(server, "vllm-omni", tmp_path / "job", ExitStack())
    done: list[Path] = []
    thread = threading.Thread(target=lambda: done.append(case.make(dialect="vllm-omni")))
    thread.start()
    time.sleep(0.4)
    with serving(server, "vllm-omni"):
        thread.join(60)
    assert done and len(server.made) == 1
    assert json.loads((case.folder / "upstream.json").read_text())["unsure"] == 0


def test_a_server_that_stays_away_gives_the_job_back(tmp_path: Path) -> None:
    server = Server(CLIP, port=9)
    case = Case(server, "vllm-omni", tmp_path, ExitStack())
    begin = time.monotonic()
    with refuses(Retry, "127.0.0.1:9", "trouble for 0.5 s", "refused"):
        case.make(patience_seconds=0.5)
    assert 0.4 < time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "trouble", ["503", "500", "429", "garbage", "list", "reset", "silent", "huge"]
)
@pytest.mark.parametrize("looking", [False, True], ids=["creating", "looking"])
def test_trouble_that_passes_is_outlasted(vllm: Case, trouble: str, looking: bool) -> None:
    mood = {
        "503": answers(503, {"error": "loading"}),
        "500": answers(500, b"<html>"),
        "429": answers(429, {"error": {"message": "slow down"}}, retry_after="0.3"),
        "garbage": answers(200, b"{\xff"),
        "list": answers(200, [1]),
        "reset": resets,
        "silent": silent(30),
        "huge": answers(200, b" " * (5 << 20)),
    }[trouble]
    place = ("GET", "") if looking else ("POST", "/v1/videos")
    vllm.server.moods += [(*place, mood)] * 2
    begin = time.monotonic()
    seconds = 1.0 if trouble == "silent" else 20.0
    vllm.delivered(dialect="vllm-omni", answer_seconds=seconds)
    assert len(vllm.server.made) == 1 and not vllm.server.moods
    if trouble == "429":
        assert time.monotonic() - begin > 0.6, "it was not left alone"


def test_an_answer_that_was_lost_is_asked_for_with_the_same_key_a_few_times(vllm: Case) -> None:
    begun = after(lambda: vllm.server.begin({}, None), resets)
    vllm.server.moods.append(("POST", "/v1/videos", begun))
    vllm.delivered()
    keys = [h["idempotency-key"] for h in vllm.server.headers if "idempotency-key" in h]
    assert keys == [f"{JOB_ID}-0"] * 2 and len(vllm.server.made) == 2

    vllm.server.always.append(("POST", "/v1/videos", begun))
    (vllm.folder / "video.mp4").unlink()
    (vllm.folder / "upstream.json").unlink()
    with refuses(Refused, "lost this video 5 times"):
        vllm.make()
    assert len(vllm.server.made) == 2 + 5


@pytest.mark.parametrize("theirs", ["../../x", "..", "", "a/b", "a b", 7, None, "x" + "\n"])
def test_an_id_that_is_none_is_not_followed(vllm: Case, theirs) -> None:
    vllm.server.moods.append(
        ("POST", "/v1/videos", answers(200, {"id": theirs, "status": "queued"}))
    )
    vllm.delivered()
    assert len(vllm.server.made) == 1


def test_what_is_told_of_another_video_is_not_believed(vllm: Case) -> None:
    vllm.server.moods.append(("GET", "", answers(200, {"id": "other", "status": "completed"})))
    vllm.server.moods.append(("GET", "", answers(500, {"id": "other", "status": "failed"})))
    vllm.delivered(dialect="vllm-omni")
    assert len(vllm.server.made) == 1


# --- downloads ---

BOXES = {
    "not_all": cut_off(CLIP[: len(CLIP) // 2], len(CLIP)),
    "not_all_and_no_length": answers(200, CLIP[:-100]),
    "error page": answers(200, b"<html>busy</html>"),
    "empty": answers(200, b""),
    "junk after": answers(200, CLIP + b"tail"),
    "no picture": answers(200, CLIP[:32] + b"\0\0\0\x08moov" + b"\0\0\0\x08mdat"),
    "reset": resets,
    "500": answers(500),
    "drip": drips(CLIP, 0.05),
    "404": answers(404),
}  # fmt: skip


@pytest.mark.parametrize("name", BOXES)
def test_a_download_that_is_not_whole_is_made_again(vllm: Case, name: str) -> None:
    vllm.server.moods += [("GET", "/content", BOXES[name])] * 2
    vllm.delivered(download_seconds=1.5 if name == "drip" else 20.0)
    assert len(vllm.server.made) == 1 and not vllm.server.moods


@pytest.mark.parametrize("name", [name for name in BOXES if name != "404"])
def test_downloads_that_never_are_whole_give_the_job_back(vllm: Case, name: str) -> None:
    vllm.server.always.append(("GET", "/content", BOXES[name]))
    begin = time.monotonic()
    with pytest.raises(Retry):
        vllm.make(download_seconds=0.3, patience_seconds=0.6)
    assert time.monotonic() - begin < 20
    vllm.nothing_partial()
    vllm.server.always.clear()
    vllm.delivered()
    assert len(vllm.server.made) == 1


@pytest.mark.parametrize("length", [{}, {"transfer_encoding": "chunked", "content_length": ""}])
def test_a_huge_download_is_stopped(vllm: Case, length: dict[str, str]) -> None:
    async def endless(send) -> None:
        headers = [] if length else [(b"content-length", b"99999999999")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": CLIP, "more_body": True})

    vllm.server.always.append(("GET", "/content", endless))
    with refuses(Refused, "larger than 1 MiB"):
        vllm.make(download_bytes=1 << 20)
    assert len(vllm.server.deleted) == 1
    vllm.nothing_partial()


def test_a_file_that_they_lost_is_made_again(vllm: Case) -> None:
    vllm.server.moods += [("GET", "/content", answers(404, {"detail": "not found on disk"}))] * 3
    vllm.delivered()
    assert len(vllm.server.made) == 2


# --- all at once ---

SHORT = {"patience_seconds": 2.0, "download_seconds": 2.0, "answer_seconds": 2.0}


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_a_job_ends_whole_or_with_a_reason(vllm: Case, seed: int) -> None:
    """Trouble of all kinds at random places; forgetting everything is the one reason to make a video again."""
    draw, server = random.Random(seed), vllm.server
    common = [answers(500), answers(503), answers(200, b"{"), answers(204), resets]
    downloads = [mood for name, mood in BOXES.items() if name not in ("drip", "404")]
    forgetting = after(server.restart, answers(503))
    forgets = draw.random() < 0.5
    for _ in range(draw.randrange(12)):
        place = draw.choice(
            [("POST", "/v1/videos"), ("GET", ""), ("GET", "/content"), ("DELETE", "")]
        )
        pool = common + (downloads if place[1] == "/content" else [])
        pool = pool + [forgetting, answers(404)] * 2 if forgets and place[0] == "GET" else pool
        server.moods.append((*place, draw.choice(pool)))
    server.looks = draw.randrange(6)
    for _ in range(3):  # a worker takes it again as often as it is given back
        try:
            vllm.delivered(**SHORT, dialect="vllm-omni")
            break
        except Retry:
            vllm.nothing_partial()
        except Refused as error:
            says(error, "lost this video 5 times")
            return vllm.nothing_partial()
    else:
        pytest.fail("the trouble was over, and the video did not come")
    assert len(server.made) == 1 or forgets


# --- their servers of our models ---


def test_an_export_tells_how_both_servers_are_started_on_it(tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "it's mine"
    monkeypatch.setattr(adapter_file, "holds_adapter", lambda run: False)
    monkeypatch.setattr(to_diffusers, "export_pipeline", lambda *_, **__: f"wrote {out}")
    command.ckpt_export("runs/mine", out)
    lines = capsys.readouterr().out.splitlines()
    vllm, sglang = (shlex.split(line.partition(": ")[2]) for line in lines[1:])
    # As their own documents have it: `vllm serve MODEL --omni`, `sglang serve --model-path MODEL`.
    assert vllm[:4] == ["vllm", "serve", str(out), "--omni"]
    assert sglang[:4] == ["sglang", "serve", "--model-path", str(out)]
    for words in (vllm, sglang):
        flags = dict(itertools.pairwise(words))
        assert flags["--served-model-name"] == "it's mine" and flags["--host"] == "127.0.0.1"
        assert flags["--port"].isdecimal()


# --- with a worker ---


class Here:
    def __init__(self, case: Case, folder: Path, **settings):
        self.store = JobStore(f"sqlite:///{folder}/jobs.db")
        self.files = FileStore(folder / "files")
        backend = case.backend(**settings)
        pace = Pace(lease=3.0, poll=0.01, retry=0.05, news=0.05, sweep=99)
        self.worker = Worker(self.store, self.files, backend, folder / "work", pace=pace)
        self.thread = threading.Thread(target=self.worker.run)

    def until(self, true: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.02)

    def stop(self) -> None:
        self.worker.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.store.database.close()


def test_a_job_of_a_worker_is_delivered_and_one_that_is_deleted_is_stopped_there(
    vllm: Case, tmp_path: Path
) -> None:
    here = Here(vllm, tmp_path)
    here.thread.start()
    first, _ = here.store.create("o", asked())
    here.until(lambda: here.store.get(first.id).status == "completed")
    vllm.server.looks, vllm.server.deleted = 10**6, []
    second, _ = here.store.create("o", asked())
    here.until(lambda: vllm.server.jobs)
    (theirs,) = vllm.server.jobs
    assert here.store.delete(second.id, "o")
    here.until(lambda: vllm.server.deleted == [theirs])
    here.stop()


def test_a_worker_that_stops_leaves_their_video_to_the_next(vllm: Case, tmp_path: Path) -> None:
    vllm.server.looks = 10**6
    here = Here(vllm, tmp_path)
    here.thread.start()
    job, _ = here.store.create("o", asked())
    here.until(lambda: vllm.server.jobs)
    here.until((tmp_path / "work" / job.id / "upstream.json").exists)
    here.stop()
    assert not vllm.server.deleted
    vllm.server.looks = 1
    here = Here(vllm, tmp_path)
    assert here.worker.work_one()
    assert here.store.get(job.id).status == "completed" and len(vllm.server.made) == 1


def test_their_video_of_a_job_deleted_without_a_worker_is_swept(vllm: Case, tmp_path: Path) -> None:
    vllm.server.looks = 10**6
    here = Here(vllm, tmp_path)
    job, _ = here.store.create("o", asked())
    folder = here.worker.work / job.id
    folder.mkdir(parents=True)
    stops = iter([False] * 5)
    with pytest.raises(Cancelled):
        here.worker.backend.make(job, [], folder, int, lambda: next(stops, True))
    here.store.delete(job.id, "o")
    sweep(here.store, here.files, here.worker.work, here.worker.backend.forget)
    assert len(vllm.server.deleted) == 1 and not folder.exists()


def test_a_job_that_they_fail_fails_with_their_reason(vllm: Case, tmp_path: Path) -> None:
    vllm.server.failing = "bad latents"
    here = Here(vllm, tmp_path)
    job, _ = here.store.create("o", asked())
    assert here.worker.work_one()
    failed = here.store.get(job.id)
    assert failed.status == "failed" and failed.error["code"] == "backend_failed"
    says(failed.error["message"], "bad latents")
    assert vllm.server.url not in failed.error["message"]

"""The real client of OpenAI against our server: every call of `client.videos`, every field of its answers.

Also run with the last release of its second generation: see test_sdk_old.py.
"""

import io
import json
import time
from pathlib import Path

import av
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient
from stub_backend import HOME, Server, clip, picture

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
omit = openai.omit
FIELDS = {"id", "object", "created_at", "completed_at", "expires_at", "error", "model", "progress"}
FIELDS |= {"prompt", "remixed_from_video_id", "seconds", "size", "status"}
NONE = {"completed_at", "expires_at", "error", "remixed_from_video_id"}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path, poll_ms=5)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    http = TestClient(server.app, base_url=HOME)
    return openai.OpenAI(api_key="any", base_url=f"{HOME}/v1", http_client=http, max_retries=0)


def shown(video, **expected) -> None:
    """Every field of a video that was just asked for is there, and is what is expected."""
    assert set(video.model_dump(exclude_unset=True)) >= FIELDS, "the server sends every field"
    assert video.id.startswith("video_") and len(video.id) == 30
    assert abs(video.created_at - time.time()) < 60
    values = {
        "object": "video",
        "model": "tiny",
        "progress": 0,
        "status": "queued",
        "size": "64x48",
    }
    values |= dict.fromkeys(NONE) | {"seconds": "4", "prompt": "a ring"} | expected
    for name, value in values.items():
        assert getattr(video, name) == value, name


def test_create(client: openai.OpenAI):
    shown(client.videos.create(prompt="a ring"))
    video = client.videos.create(prompt="a ring", model="other", seconds="8", size="720x1280")
    shown(video, model="other", seconds="8", size="720x1280")


def test_a_video_is_retrieved_until_it_is_done(client: openai.OpenAI, server: Server):
    video = client.videos.create(prompt="a ring")
    shown(client.videos.retrieve(video.id), id=video.id)
    server.work()
    done = client.videos.retrieve(video.id)
    expected = {"status": "completed", "progress": 100, "completed_at": done.completed_at}
    shown(done, **expected, expires_at=done.expires_at, id=video.id)
    assert done.created_at <= done.completed_at <= time.time()
    assert done.expires_at == done.completed_at + 3600
    assert done.usage == {
        "model": "tiny",
        "size_class": "48p",
        "seconds": 4.0,
        "cost": 0.4,
        "currency": "USD",
    }
    assert done.provenance == {"signed": False, "watermark": False} and done.seed >= 0
    assert (done.fps, done.frames, done.operation) == (8.0, 32, "t2v")


def test_create_and_poll_waits_as_long_as_it_is_told(client: openai.OpenAI, server: Server):
    raw = client.videos.with_raw_response.create(prompt="a ring")
    assert raw.headers["openai-poll-after-ms"] == "5"
    video = raw.parse()
    server.work()
    assert client.videos.poll(video.id).status == "completed"
    lease_less = server.service.store
    failing = client.videos.create(prompt="b")
    lease = lease_less.claim("w", lease_seconds=9)
    lease_less.fail(lease, code="worker_lost", message="5 workers took this job")
    failed = client.videos.poll(failing.id)
    assert failed.status == "failed" and failed.completed_at is None
    assert (failed.error.code, failed.error.message) == ("worker_lost", "5 workers took this job")


def test_download(client: openai.OpenAI, server: Server):
    video = client.videos.create(prompt="a ring", seconds="2")
    with pytest.raises(openai.BadRequestError) as early:
        client.videos.download_content(video.id)
    assert early.value.code == "video_not_ready"
    server.work()
    with av.open(io.BytesIO(client.videos.download_content(video.id).read())) as file:
        assert sum(1 for _ in file.decode(video=0)) == 16
    for variant, kind in (("thumbnail", "WEBP"), ("spritesheet", "JPEG")):
        answer = client.videos.download_content(video.id, variant=variant)
        assert Image.open(io.BytesIO(answer.read())).format == kind
        assert answer.response.headers["content-type"] == f"image/{kind.lower()}"


def test_list_pages_through_everything(client: openai.OpenAI):
    made = [client.videos.create(prompt=f"p{number}").id for number in range(7)]
    page = client.videos.list(limit=3)
    assert [video.id for video in page.data] == made[:3:-1] and page.has_more is True
    assert page.last_id == made[4] and page.first_id == made[6] and page.object == "list"
    shown(page.data[0], prompt="p6")
    assert [video.id for video in client.videos.list(limit=3)] == made[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == made
    assert [video.id for video in client.videos.list(after=made[2])] == made[1::-1]


def test_delete(client: openai.OpenAI):
    video = client.videos.create(prompt="a ring")
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError) as missing:
            call(video.id)
        assert missing.value.code == "not_found" and missing.value.param == "video_id"
    assert not client.videos.list().data


def test_remix(client: openai.OpenAI, server: Server):
    source = client.videos.create(prompt="a ring", seconds="8", extra_body={"seed": 3, "steps": 5})
    with pytest.raises(openai.BadRequestError) as early:
        client.videos.remix(source.id, prompt="a cube")
    assert early.value.code == "video_not_ready"
    server.work()
    remix = client.videos.remix(source.id, prompt="a cube")
    shown(remix, prompt="a cube", seconds="8", remixed_from_video_id=source.id, seed=3)
    assert server.service.store.get(remix.id).asked.steps == 5


def test_edit(client: openai.OpenAI, server: Server):
    shown(
        client.videos.edit(prompt="a ring", video=clip(frames=12)), seconds="1.5", operation="edit"
    )
    source = client.videos.create(prompt="a", seconds="3", size="32x32")
    server.work_all()
    by_id = {"video": {"id": source.id}, "strength": 0.5}
    edit = client.videos.edit(prompt="a ring", video=omit, extra_body=by_id)
    shown(edit, seconds="3", size="32x32", operation="edit")
    asked = server.service.store.get(edit.id).asked
    assert asked.source == source.id and asked.strength == 0.5 and asked.uploads == ()


def test_extend_reports_the_whole_and_bills_what_is_new(client: openai.OpenAI, server: Server):
    source = client.videos.create(prompt="a", seconds="4")
    server.work()
    by_id = {"video": {"id": source.id}}
    longer = client.videos.extend(prompt="a ring", seconds="8", video=omit, extra_body=by_id)
    shown(longer, seconds="12", operation="extend")
    server.work()
    done = client.videos.retrieve(longer.id)
    assert done.seconds == "12" and done.usage["seconds"] == 8.0 and done.usage["cost"] == 0.8
    given = client.videos.extend(prompt="a ring", seconds="4", video=("a.mp4", clip(), "video/mp4"))
    shown(given, seconds="6", operation="extend")
    back = {"direction": "backward"}
    before = client.videos.extend(prompt="a ring", seconds="4", video=clip(), extra_body=back)
    shown(before, seconds="6", operation="extend-back")


def test_characters(client: openai.OpenAI, server: Server):
    made = client.videos.create_character(name="Zork", video=clip())
    assert made.id.startswith("char_") and made.name == "Zork"
    assert abs(made.created_at - time.time()) < 60
    again = client.videos.get_character(made.id)
    assert (again.id, again.name, again.created_at) == (made.id, "Zork", made.created_at)
    video = client.videos.create(prompt="Zork", extra_body={"characters": [made.id]})
    assert server.service.store.get(video.id).asked.character == (made.id,)


@pytest.mark.parametrize("sent", ["bytes", "named", "form", "json"])
def test_an_image_arrives_in_every_way_the_client_has(client, server: Server, sent: str):
    image, url = picture(), "https://pictures.example/a.png"
    server.fetched[url] = image
    reference = {"input_reference": {"image_url": url}}
    if sent == "bytes":
        video = client.videos.create(prompt="a ring", input_reference=image)
    elif sent == "named":
        video = client.videos.create(prompt="a ring", input_reference=("a.png", image, "image/png"))
    elif sent == "form":
        video = client.videos.create(prompt="a ring", extra_body=reference)
    else:
        as_json = {"Content-Type": "application/json"}
        video = client.videos.create(prompt="a ring", extra_body=reference, extra_headers=as_json)
    shown(video, operation="i2v")
    (upload,) = server.service.store.get(video.id).asked.uploads
    assert upload.name == f"inputs/{video.id}/image.png" and upload.kind == "image"
    with server.service.files.open(upload.name) as file:
        assert file.read() == image


def test_our_own_fields_survive_the_form(client: openai.OpenAI, server: Server):
    server.service.settings.backend.adapters.update(zork="zork.safetensors")
    cues = [{"at": 0, "prompt": "a"}, {"at": 1, "prompt": "b"}]
    own = {"frames": 16, "fps": 8, "steps": 5, "guidance_scale": 2.5, "seed": 9}
    own |= {"negative_prompt": "blur", "adapters": ["zork"], "storyboard": json.dumps(cues)}
    video = client.videos.create(prompt="a ring", extra_body=own)
    shown(video, seconds="2", seed=9, fps=8.0, frames=16)
    asked = server.service.store.get(video.id).asked
    assert (asked.frames, asked.fps, asked.steps, asked.guidance_scale) == (16, 8.0, 5, 2.5)
    assert (asked.negative_prompt, asked.adapters) == ("blur", ("zork",))
    assert asked.storyboard == [{"at": 0.0, "prompt": "a"}, {"at": 1.0, "prompt": "b"}]


def test_a_list_that_the_client_destroys_is_refused_with_the_remedy(client: openai.OpenAI):
    cues = [{"at": 0, "prompt": "a"}, {"at": 1, "prompt": "b"}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="a ring", extra_body={"storyboard": cues})
    assert refused.value.param == "storyboard" and "json.dumps" in refused.value.body["message"]
    as_json = {"Content-Type": "application/json"}
    body = {"storyboard": cues}
    shown(client.videos.create(prompt="a ring", extra_body=body, extra_headers=as_json))


def test_errors_carry_what_the_client_reads(client: openai.OpenAI, server: Server):
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="a ring", seconds="many")
    error = refused.value
    assert (error.param, error.code, error.type) == (
        "seconds",
        "invalid_value",
        "invalid_request_error",
    )
    assert error.request_id.startswith("req_") and "'seconds'" in error.body["message"]
    server.key()
    with pytest.raises(openai.AuthenticationError) as unknown:
        client.videos.list()
    assert unknown.value.code == "invalid_api_key"


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny", "other"]

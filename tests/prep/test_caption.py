"""Laws of captions: none is invented, none is paid twice, one that fails keeps no other from its caption."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep import calls
from data_prep.captioning import asking
from data_prep.captioning.camera_words import contradiction
from data_prep.captioning.language import LATIN, other_language
from data_prep.captioning.schema import Rubbish, parsed, prompt
from data_prep.captioning.settings import CaptionConfig
from data_prep.captioning.spending import Spending, Usage, spending_of
from data_prep.engines.base import Bound
from data_prep.engines.processes import Processes
from data_prep.ledger import Ledger
from data_prep.pipeline import bound_stages, stages_of
from data_prep.settings import parse
from data_prep.stage import DROPS, Stage, Workspace, load_stage
from sora_train.data.captions.texts import as_prompt, named_captions
from sora_train.data.sample import Failure
from sora_train.errors import ConfigError, Fault, UserError
from tests.prep.endpoint import GOOD, Endpoint, completion, endpoint
from tests.prep.tiny_captioner import tiny_captioner
from tests.sentences import refuses, says

STAGE: Stage = load_stage("data_prep.stages.caption")
FRAMES, SIZE = 24, 64


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of a second whose frames grow brighter."""
    path = tmp_path_factory.mktemp("clip") / "prep" / "files" / "clip.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES)
        stream.width = stream.height = SIZE
        for number in range(FRAMES):
            picture = np.full((SIZE, SIZE, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def workspace(tmp_path: Path, clip_file: Path) -> Workspace:
    files = tmp_path / "out" / "prep" / "files"
    files.mkdir(parents=True)
    (files / "clip.mp4").write_bytes(clip_file.read_bytes())
    return Workspace(tmp_path / "out")


@pytest.fixture(autouse=True)
def nothing_failed_before() -> Iterator[None]:
    asking._failed.ended(well=True)
    yield


def table(count: int, workspace: Workspace, **columns: Any) -> pa.Table:
    """Rows of `count` clips that share a file; each has a digest of its own."""
    size = (workspace.files / "clip.mp4").stat().st_size
    row = {
        "kind": "video",
        "file": "clip.mp4",
        "bytes": size,
        "frames": FRAMES,
        "fps": float(FRAMES),
        "width": SIZE,
        "height": SIZE,
        "duration": 1.0,
        "start": 0.0,
        "traits": "",
        "motion": 0.3,
        "camera": "static",
        "given_caption": "A given caption.",
        "given_captions": "",
        "drop_stage": "",
        "drop_reason": "",
        "drop_detail": "",
    } | columns
    return pa.Table.from_pylist(
        [{"key": f"clip{n}", "digest": f"digest{n}", **row} for n in range(count)]
    )


def asked(served: Endpoint, **settings: Any) -> CaptionConfig:
    known: dict[str, Any] = {"by": "endpoint", "endpoint": served.url, "model": "m", "backoff": 0.0}
    return CaptionConfig(**(known | settings))


def run(rows: pa.Table, settings: CaptionConfig, workspace: Workspace) -> list[dict[str, Any]]:
    return calls.checked(STAGE, rows, STAGE.run(rows, settings, workspace)).to_pylist()


# --- given, templates ---


def test_given_captions_are_kept_with_the_others_by_name(workspace: Workspace) -> None:
    rows = table(1, workspace, given_captions=json.dumps({"short": "Short."}))
    row = run(rows, CaptionConfig(), workspace)[0]
    assert (row["caption"], row["caption_source"]) == ("A given caption.", "given")
    assert named_captions(row["captions"]) == {"short": "Short."}
    assert row["drop_reason"] == ""


@pytest.mark.parametrize("allowed", [False, True])
def test_no_caption_is_a_reason_unless_allowed(workspace: Workspace, allowed: bool) -> None:
    rows = table(1, workspace, given_caption="")
    row = run(rows, CaptionConfig(allow_empty=allowed), workspace)[0]
    assert (row["drop_reason"], row["caption"]) == ("" if allowed else "no_caption", "")


def test_a_template_is_filled_from_columns(workspace: Workspace) -> None:
    settings = CaptionConfig(
        by="template", template="{camera} shot at {fps:.0f} fps, {given_caption}"
    )
    row = run(table(1, workspace, camera="pan_left"), settings, workspace)[0]
    assert row["caption"] == "pan left shot at 24 fps, A given caption."
    # Half a sentence is no caption.
    row = run(table(1, workspace, camera=None), settings, workspace)[0]
    assert row["drop_reason"] == "no_caption"


def test_measured_columns_go_behind_every_caption(workspace: Workspace) -> None:
    rows = table(1, workspace, given_captions=json.dumps({"short": "Short"}))
    words = CaptionConfig(append=("motion", "fps", "camera", "given_captions_missing"))
    row = run(rows, words, workspace)[0]
    assert row["caption"] == "A given caption. Motion: high. 24 fps. Camera: static."
    assert (
        named_captions(row["captions"])["short"] == "Short. Motion: high. 24 fps. Camera: static."
    )
    row = run(rows, CaptionConfig(append=("motion",), append_as="numbers"), workspace)[0]
    assert row["caption"] == "A given caption. Motion: 0.3."


def test_a_template_names_only_columns_that_there_are(tmp_path: Path) -> None:
    stages = stages_of()
    settings = parse(
        ["input=a", "output=b", "caption.by=template", "caption.template='{speed} {key}'"], stages
    )
    with refuses(UserError, "caption", "'speed'"):
        bound_stages(stages, settings, Workspace(tmp_path))
    with refuses(UserError, "caption.template"):
        STAGE.check(CaptionConfig(by="template"))
    for key in (
        "caption.template='{} b'",
        "caption.language=klingon",
        "caption.endpoint=file:///a",
    ):
        with refuses(ConfigError, key.partition("=")[0]):
            parse(["input=a", "output=b", key], stages)


def test_what_a_template_names_is_part_of_a_rows_address(workspace: Workspace) -> None:
    settings = CaptionConfig(by="template", template="{camera} {motion}")
    ledger = Ledger(workspace.ledger, STAGE, settings)
    addresses = {ledger.addresses(table(1, workspace, motion=m))[0] for m in (0.1, 0.2, 0.1)}
    assert len(addresses) == 2


# --- an endpoint that answers ---


def test_a_description_becomes_captions_by_name(workspace: Workspace) -> None:
    with endpoint() as served:
        settings = asked(served, price_in=1.0, price_out=10.0, frames=3)
        row = run(table(1, workspace), settings, workspace)[0]
    assert row["caption"] == GOOD["dense"]
    named = named_captions(row["captions"])
    assert {*named} == {"dense", "short", "fields", "given"}
    assert named["short"] == GOOD["short"] and named["given"] == "A given caption."
    assert as_prompt(named["fields"]).startswith("a red circle. it moves")
    assert json.loads(row["caption_fields"])["lighting"] == "even light"
    assert row["caption_tokens"] == 1000
    assert row["caption_cost"] == pytest.approx((900 * 1 + 100 * 10) / 1e6)
    body = served.bodies[0]
    assert body["response_format"]["json_schema"]["schema"]["required"] == [*GOOD]
    *pictures, text = body["messages"][0]["content"]
    assert '"lighting"' in text["text"]
    shown = [
        Image.open(io.BytesIO(base64.b64decode(one["image_url"]["url"].partition(",")[2])))
        for one in pictures
    ]
    brightness = [np.asarray(one).mean() for one in shown]
    # Frames at a sixth, a half and five sixths of a clip that goes from 0 to 230.
    assert brightness == pytest.approx([40, 120, 200], abs=15)
    assert [one.size for one in shown] == [(SIZE, SIZE)] * 3


def test_the_main_caption_the_request_and_the_key_are_the_users(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "s3cret")
    with endpoint() as served:
        settings = asked(
            served,
            main="short",
            api_key_env="TEST_KEY",
            structured=False,
            request={"temperature": 1.5},
            frame_size=32,
        )
        row = run(table(1, workspace), settings, workspace)[0]
    assert row["caption"] == GOOD["short"]
    assert served.keys == ["Bearer s3cret"]
    assert "response_format" not in served.bodies[0]
    assert served.bodies[0]["temperature"] == 1.5
    assert "s3cret" not in json.dumps(settings.model_dump()) + json.dumps(row)


def test_the_version_follows_the_prompt_and_the_model(workspace: Workspace) -> None:
    with endpoint() as served:
        versions = {
            run(table(1, workspace), asked(served, **changed), workspace)[0]["caption_version"]
            for changed in ({}, {"prompt": "Describe it."}, {"model": "n"}, {"version": "2"})
        }
    assert len(versions) == 4 and sum(one.startswith("2-") for one in versions) == 1


def test_clips_are_asked_for_at_once(workspace: Workspace) -> None:
    def slow(number: int, body: dict) -> Any:
        time.sleep(0.2)
        return completion(GOOD)

    with endpoint(slow) as served:
        run(table(6, workspace), asked(served, concurrency=3), workspace)
    assert served.most_at_once == 3


# --- an endpoint that fails ---


def _drip(number: int, body: dict) -> Any:
    time.sleep(1.0)
    return completion(GOOD)


RUBBISH: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no chat completion": ((200, {}, b"<html>hello"), ("no chat completion", "<html>hello")),
    "not even text": ((200, {}, b"\xff\xfe\x00"), ("no chat completion",)),
    "a list": ((200, {}, b"[]"), ("no chat completion",)),
    "prose": (completion("A red circle on grey."), ("no JSON", "A red circle")),
    "empty": (completion(""), ("answers nothing",)),
    "null": (completion(None), ("answers nothing",)),
    "cut JSON": (completion('{"subject": "a'), ("no JSON",)),
    "missing field": (completion({"subject": "a"}), ("leaves out the field 'action'",)),
    "wrong type": (completion(GOOD | {"camera": 3}), ("int in the field 'camera'",)),
    "empty dense": (completion(GOOD | {"dense": "  "}), ("leaves the field 'dense' empty",)),
    "surrogate": (completion(GOOD | {"short": "a \ud83d b"}), ("no text in 'short'",)),
    "refusal": (completion("I'm sorry, but I can't help with that."), ("refuses",)),
    "refusal in a field": (completion(GOOD | {"dense": "I cannot describe it."}), ("refuses",)),
    "refusal by name": (completion(None, message={"refusal": "policy"}), ("refuses", "policy")),
    "filter": (completion(None, finish_reason="content_filter"), ("refuses", "content filter")),
    "cut off": (completion("{", finish_reason="length"), ("caption.max_answer_tokens=1024",)),
    "German": (
        completion(GOOD | {"dense": "Ein roter Kreis bewegt sich durch das graue Bild."}),
        ("the words of 'de'", "caption.language=en"),
    ),
    "Chinese": (completion(GOOD | {"dense": "一个红色的圆圈在灰色背景上移动。"}), ("cjk letters",)),
    "too long": (
        completion(GOOD | {"dense": "It is red. " * 400}),
        ("caption.max_characters=3000",),
    ),
    "overloaded": ((503, {}, b"overloaded"), ("503", "overloaded")),
    "limited": ((429, {}, b'{"error": "slow down"}'), ("429", "slow down")),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_a_failed_answer_is_tried_again_then_counted_in_a_sentence(
    workspace: Workspace, kind: str
) -> None:
    answer, words = RUBBISH[kind]
    with endpoint(lambda number, body: answer) as served:
        row = run(table(1, workspace), asked(served, retries=2), workspace)[0]
        assert len(served.bodies) == 3
    assert (row["later_reason"], row["caption"], row["drop_reason"]) == ("caption_failed", None, "")
    says(row["later_detail"], *words, "3 of 3 tries")
    assert len(row["later_detail"]) < 400
    # What a rubbish answer cost is counted too.
    spent = spending_of(workspace).total().tokens
    assert spent == (3000 if answer[0] == 200 and b"usage" in answer[2] else 0)


def test_a_later_try_succeeds_and_says_something_new(workspace: Workspace) -> None:
    def third(number: int, body: dict) -> Any:
        return completion(GOOD) if number == 2 else completion("no")

    with endpoint(third) as served:
        row = run(table(1, workspace), asked(served), workspace)[0]
    assert row["caption"] == GOOD["dense"] and row["caption_tokens"] == 3000
    assert [body["seed"] for body in served.bodies] == [0, 1, 2]


def test_slow_down_and_out_of_reach_are_one_sentence(workspace: Workspace) -> None:
    with endpoint(_drip) as served:
        row = run(table(1, workspace), asked(served, timeout=0.2, retries=1), workspace)[0]
        says(row["later_detail"], "does not answer within 0.2 s", "2 of 2 tries")
    row = run(table(1, workspace), asked(served, retries=1), workspace)[0]
    says(row["later_detail"], "cannot be reached", "2 of 2 tries")


def test_the_endpoints_wish_to_wait_is_honoured_up_to_a_limit(workspace: Workspace) -> None:
    def limited(number: int, body: dict) -> Any:
        return completion(GOOD) if number else (429, {"Retry-After": "0.5"}, b"")

    with endpoint(limited) as served:
        row = run(table(1, workspace), asked(served), workspace)[0]
        assert row["caption"] and 0.5 <= served.times[1] - served.times[0] < 3
    with endpoint(lambda number, body: (429, {"Retry-After": "3600"}, b"")) as served:
        row = run(table(1, workspace), asked(served, version="2"), workspace)[0]
        assert len(served.bodies) == 1
    says(row["later_detail"], "429", "asks to wait 3600 s", "1 of 5 tries")


def test_waits_double(workspace: Workspace) -> None:
    with endpoint(lambda number, body: (500, {}, b"")) as served:
        run(table(1, workspace), asked(served, backoff=0.1, retries=3), workspace)
    waits = np.diff(served.times)
    assert all(w >= expected for w, expected in zip(waits, (0.1, 0.2, 0.4), strict=True))


def test_what_no_try_can_mend_is_tried_once(workspace: Workspace) -> None:
    with endpoint(lambda number, body: (400, {}, b"image too large")) as served:
        row = run(table(1, workspace), asked(served), workspace)[0]
        assert len(served.bodies) == 1
    says(row["later_detail"], "400", "image too large")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run(workspace: Workspace, status: int) -> None:
    with (
        endpoint(lambda number, body: (status, {}, b"no")) as served,
        refuses(UserError, f"caption.endpoint={served.url}", str(status), "correct"),
    ):
        run(table(1, workspace), asked(served), workspace)


def test_one_that_fails_keeps_no_other_from_its_caption(workspace: Workspace) -> None:
    rows = table(5, workspace)
    settings = CaptionConfig()
    with endpoint(lambda number, body: completion(GOOD if number % 2 else "no")) as served:
        settings = asked(served, retries=0, concurrency=1)
        found = run(rows, settings, workspace)
    assert [bool(row["caption"]) for row in found] == [False, True, False, True, False]
    ledger = Ledger(workspace.ledger, STAGE, settings)
    addresses = ledger.addresses(rows)
    result = STAGE.run(rows, settings, workspace)
    answer = calls.Answer(1.0, calls.as_bytes(calls.checked(STAGE, rows, result)))
    failures = calls.settled(ledger, addresses, answer)
    assert {*failures} == {addresses[0], addresses[2], addresses[4]}
    assert {*ledger.done()} == {addresses[1], addresses[3]}
    shown = ledger.apply(rows, failures).to_pylist()
    assert [row["drop_reason"] for row in shown] == [
        "caption_failed",
        "",
        "caption_failed",
        "",
        "caption_failed",
    ]
    assert [row["drop_stage"] for row in shown] == ["caption", "", "caption", "", "caption"]


def test_of_several_rows_whose_process_ended_none_is_blamed_for_good(workspace: Workspace) -> None:
    rows = table(2, workspace)
    ledger = Ledger(workspace.ledger, STAGE, CaptionConfig())
    addresses = ledger.addresses(rows)
    died = Failure(0, "decoder_crashed", "the decode process ended with code -9")
    assert calls.settled(ledger, addresses, died).keys() == set(addresses)
    assert not ledger.done()
    assert not calls.settled(ledger, addresses[:1], died) and {*ledger.done()} == {addresses[0]}


def test_an_endpoint_that_stays_down_costs_a_try_a_clip(workspace: Workspace) -> None:
    with endpoint(lambda number, body: (500, {}, b"")) as served:
        settings = asked(served, retries=3, concurrency=1)
        run(table(asking.MANY_FAILED + 4, workspace), settings, workspace)
        assert len(served.bodies) == asking.MANY_FAILED * 4 + 4


# --- a local model ---


def test_a_local_model_is_asked_for_the_same_fields(workspace: Workspace, tmp_path: Path) -> None:
    folder = tiny_captioner(tmp_path / "model", json.dumps(GOOD))
    settings = CaptionConfig(by="model", model_path=str(folder), frames=2)
    STAGE.check(settings)
    row = run(table(1, workspace), settings, workspace)[0]
    assert row["caption"] == GOOD["dense"] and row["caption_source"] == "model"
    # Its one-token answer and the end, and what it was sent: 5 tokens a picture and the words of the prompt.
    words = len(prompt(settings).split())
    assert row["caption_tokens"] == 2 + 2 * 5 + words + 1
    assert row["caption_cost"] == 0


def test_a_local_model_that_says_no_description_has_failed(
    workspace: Workspace, tmp_path: Path
) -> None:
    folder = tiny_captioner(tmp_path / "model", "lovely")
    settings = CaptionConfig(by="model", model_path=str(folder), retries=1, backoff=0.0)
    row = run(table(1, workspace), settings, workspace)[0]
    says(row["later_detail"], "no JSON", "'lovely'", "2 of 2 tries")


def test_a_folder_of_another_model_is_told(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    settings = CaptionConfig(by="model", model_path=str(tmp_path))
    with refuses(UserError, f"caption.model_path={tmp_path}", "image-text-to-text"):
        run(table(1, workspace), settings, workspace)


# --- before any work ---


def test_what_is_missing_is_told_before_any_work(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with endpoint() as served:
        STAGE.check(asked(served))  # its list of models is a 404, which many endpoints answer
        with refuses(UserError, "caption.model"):
            STAGE.check(asked(served, model=""))
        with refuses(UserError, "caption.price_in"):
            STAGE.check(asked(served, max_cost=1.0))
        with refuses(UserError, "caption.api_key_env=TEST_KEY", "export"):
            STAGE.check(asked(served, api_key_env="TEST_KEY"))
        monkeypatch.setenv("TEST_KEY", "a\nb")
        with refuses(UserError, "caption.api_key_env=TEST_KEY", "line end"):
            STAGE.check(asked(served, api_key_env="TEST_KEY"))
    with refuses(UserError, f"caption.endpoint={served.url}", "cannot be reached"):
        STAGE.check(asked(served))
    with refuses(UserError, "caption.endpoint"):
        STAGE.check(CaptionConfig(by="endpoint"))
    with refuses(UserError, "caption.model_path"):
        STAGE.check(CaptionConfig(by="model"))
    with refuses(UserError, f"caption.model_path={tmp_path}", "config.json"):
        STAGE.check(CaptionConfig(by="model", model_path=str(tmp_path)))


def test_sources_without_any_caption_are_told_before_the_long_work(workspace: Workspace) -> None:
    none = table(3, workspace, given_caption="")
    with refuses(UserError, "caption.by=given", "3 sources", "caption.allow_empty=true"):
        STAGE.check_sources(none, CaptionConfig())
    STAGE.check_sources(none, CaptionConfig(allow_empty=True))
    STAGE.check_sources(none, CaptionConfig(by="template", template="{key}"))
    STAGE.check_sources(table(1, workspace), CaptionConfig())
    STAGE.check_sources(none.slice(0, 0), CaptionConfig())


def test_a_silent_endpoint_is_told_before_any_work(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.captioning import endpoint as module

    monkeypatch.setattr(module, "CHECK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with refuses(UserError, f"caption.endpoint={url}", "cannot be reached", "timed out"):
            STAGE.check(CaptionConfig(by="endpoint", endpoint=url, model="m"))


# --- budget and resume ---


@pytest.mark.parametrize(
    "limits", [{"max_tokens_total": 5000}, {"max_cost": 5e-3, "price_in": 1e0, "price_out": 1e0}]
)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_budget_is_passed_by_no_more_than_the_calls_in_flight(
    workspace: Workspace, limits: dict[str, Any], concurrency: int
) -> None:
    with endpoint() as served:
        settings = asked(served, concurrency=concurrency, **limits)
        found = run(table(14, workspace), settings, workspace)
        # 1000 tokens an answer.
        assert 5 <= len(served.bodies) <= 5 + concurrency - 1
        # Another process of the run has the same budget.
        spending_of.cache_clear()
        again = run(table(14, workspace), settings, workspace)
        assert len(served.bodies) <= 5 + concurrency - 1
    late = [row for row in found if row["later_reason"]]
    assert len(late) == 14 - len(served.bodies)
    assert {row["later_reason"] for row in late} == {"caption_budget"}
    says(late[0]["later_detail"], next(f"caption.{name}={limits[name]:g}" for name in limits))
    assert [row["caption"] for row in again] == [row["caption"] for row in found]


def test_a_budget_ends_the_tries_of_a_clip(workspace: Workspace) -> None:
    with endpoint(lambda number, body: completion("no")) as served:
        row = run(table(1, workspace), asked(served, max_tokens_total=2000), workspace)[0]
        assert len(served.bodies) == 2
    assert row["later_reason"] == "caption_budget"


def test_no_budget_is_kept_where_usage_is_not_told(workspace: Workspace) -> None:
    silent = json.loads(completion(GOOD)[2])
    del silent["usage"]
    with endpoint(lambda number, body: (200, {}, json.dumps(silent).encode())) as served:
        with refuses(UserError, "caption.max_tokens_total", "tokens it used"):
            run(table(1, workspace), asked(served, max_tokens_total=9), workspace)
        assert run(table(1, workspace), asked(served), workspace)[0]["caption_tokens"] == 0


def test_no_answer_is_paid_twice(workspace: Workspace) -> None:
    """Nor after a kill before the ledger had it, nor where settings change that the answer does not depend on."""
    rows = table(4, workspace)
    with endpoint() as served:
        first = run(rows, asked(served), workspace)
        changed = asked(served, concurrency=2, timeout=9.0, append=("fps",), max_tokens_total=4000)
        second = run(rows, changed, workspace)
        assert len(served.bodies) == 4
        other = run(rows.slice(0, 1), asked(served, model="other"), workspace)
        assert len(served.bodies) == 5 and other[0]["caption"]
    assert [row["caption_tokens"] for row in second] == [row["caption_tokens"] for row in first]
    assert second[0]["caption"] == first[0]["caption"] + " 24 fps."


def test_a_run_goes_on_with_what_failed(workspace: Workspace) -> None:
    """Over real worker processes: 20 clips, of which the service fails every third at first."""
    rows = table(20, workspace)
    is_well = False

    def plays(number: int, body: dict) -> Any:
        return completion(GOOD if is_well or number % 3 else "no")

    with endpoint(plays) as served:
        settings = asked(served, retries=0)
        bound = Bound(STAGE, settings, Ledger(workspace.ledger, STAGE, settings))
        engine = Processes(workspace.out, 1, 4.0)
        failures = engine.run([bound], rows)
        assert len(served.bodies) == 20
        assert len(failures) == 7 and {reason for reason, _ in failures.values()} == {
            "caption_failed"
        }
        is_well = True
        assert not engine.run([bound], rows)
        assert len(served.bodies) == 27
    shown = bound.ledger.apply(rows, {})
    assert shown["caption"].to_pylist() == [GOOD["dense"]] * 20
    assert not any(shown[name].to_pylist()[0] for name in DROPS.names)


def test_a_wrong_key_in_a_worker_is_a_fault_that_names_it(workspace: Workspace) -> None:
    with endpoint(lambda number, body: (401, {}, b"")) as served:
        settings = asked(served)
        bound = Bound(STAGE, settings, Ledger(workspace.ledger, STAGE, settings))
        with refuses(Fault, "caption", "401"):
            Processes(workspace.out, 1, 4.0).run([bound], table(2, workspace))


def _spend(path: Path, count: int) -> None:
    spending = Spending(path)
    for _ in range(count):
        spending.add("r", Usage(2, 1, 0.5))


def test_processes_share_one_account(tmp_path: Path) -> None:
    path = tmp_path / "a" / "spending.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_spend, args=(path, 25)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    reader = Spending(path)
    assert reader.total() == Usage(200, 100, 50.0)
    # A line cut short by a kill is left out, and the next is not joined to it.
    with path.open("ab") as file:
        file.write(b'{"sent": 99, "answ')
    assert reader.total().tokens == 300
    reader.add("r", Usage(7, 3, 0.0))
    assert reader.total().tokens == 310 == Spending(path).total().tokens


# --- languages and camera words ---

TEXTS = {
    "en": "A woman in a red coat walks along the river while the sun sets behind her.",
    "de": "Eine Frau in einem roten Mantel geht am Fluss entlang, während die Sonne hinter ihr untergeht.",
    "fr": "Une femme vêtue d'un manteau rouge marche le long de la rivière et le soleil se couche derrière elle.",
    "es": "Una mujer con un abrigo rojo camina por la orilla del río mientras el sol se pone detrás de ella.",
    "it": "Una donna con un cappotto rosso cammina lungo il fiume mentre il sole tramonta dietro di lei nella sera.",
    "pt": "Uma mulher com um casaco vermelho caminha ao longo do rio enquanto o sol se põe atrás dela em silêncio.",
    "nl": "Een vrouw in een rode jas loopt langs de rivier terwijl de zon achter haar ondergaat en het donker wordt.",
    "ru": "Женщина в красном пальто идёт вдоль реки, а солнце садится за её спиной.",
    "zh": "一位穿着红色外套的女士沿着河边行走，太阳在她身后落下。",
    "ja": "赤いコートを着た女性が川沿いを歩き、彼女の後ろで太陽が沈む。",
    "ko": "빨간 코트를 입은 여자가 강을 따라 걷고 있다.",
    "ar": "امرأة ترتدي معطفا أحمر تمشي على طول النهر.",
    "hi": "लाल कोट में एक महिला नदी के किनारे चल रही है।",
    "th": "ผู้หญิงในเสื้อโค้ทสีแดงเดินไปตามแม่น้ำ",
    "el": "Μια γυναίκα με κόκκινο παλτό περπατά κατά μήκος του ποταμού.",
    "he": "אישה במעיל אדום הולכת לאורך הנהר.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_every_language_is_known_from_every_other(language: str) -> None:
    for written, text in TEXTS.items():
        assert bool(other_language(text, language)) == (written != language), written
        assert not other_language(text, "any")


@pytest.mark.parametrize(
    "text",
    [
        "Red car.",
        "A man holds a sign that reads 停止 and walks away from the camera.",
        "Time-lapse, die-cut paper animation of Los Angeles at night.",
        "A café in El Paso, the word LA in neon on its wall.",
        "123",
        "",
    ],
)
def test_foreign_words_make_no_foreign_caption(text: str) -> None:
    assert other_language(text, "en") == ""


@given(st.text(max_size=60), st.sampled_from([*LATIN, "zh", "ja", "any"]))
def test_any_text_is_judged(text: str, language: str) -> None:
    assert isinstance(other_language(text, language), str)


@given(
    st.one_of(
        st.text(max_size=60),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from([*GOOD, "x"]), inner, max_size=8)
            ),
            max_leaves=12,
        ).map(json.dumps),
    )
)
def test_an_answer_is_a_description_or_rubbish(text: str) -> None:
    try:
        found = parsed(text, CaptionConfig())
    except Rubbish as error:
        assert str(error)
    else:
        assert found.short and found.dense


@pytest.mark.parametrize(
    "wrapped",
    ["```json\n{}\n```", "Here it is:\n{}\nI hope it helps.", "  {}", "<think>hm</think>{}"],
)
def test_an_answer_may_be_wrapped(wrapped: str) -> None:
    answer = json.dumps(GOOD | {"subject": ["a circle", "a  square"]})
    found = parsed(wrapped.replace("{}", answer), CaptionConfig())
    assert found.dense == GOOD["dense"] and found.fields["subject"] == "a circle, a square"


@pytest.mark.parametrize(
    ("text", "measured", "contradicts"),
    [
        ("The camera pans left across a lake.", "pan_left", False),
        ("The camera pans left across a lake.", "pan_right", True),
        ("The camera slowly pans to the right.", "pan_left", True),
        ("The camera slowly pans from left to right.", "pan_right", False),
        ("The camera slowly pans from left to right.", "pan_left", True),
        ("The camera pans across a lake.", "pan_left", False),
        ("The camera pans across a lake.", "static", True),
        ("A static shot of a lake.", "static", False),
        ("A static shot of a lake.", "zoom_in", True),
        ("The camera does not move.", "static", False),
        ("The camera does not move.", "pan_left", True),
        ("No camera movement.", "tilt_up", True),
        ("The camera zooms in on a face.", "zoom_out", True),
        ("The camera pushes in on a face.", "zoom_in", False),
        ("The camera tilts up to the sky.", "tilt_up", False),
        ("The camera tilts down while it pans left.", "tilt_down", False),
        ("The camera tilts down while it pans left.", "zoom_in", True),
        ("Handheld camera follows a dog.", "shake", False),
        ("Handheld camera follows a dog.", "static", True),
        ("She tilts her head and turns left. A man pans for gold.", "static", False),
        ("A child moves right in front of the lake.", "pan_left", False),
        ("A lake at dawn.", "pan_left", False),
        ("The camera never zooms in.", "static", False),
        ("The camera pans left.", None, False),
    ],
)
def test_camera_words_against_the_measured_movement(
    text: str, measured: str | None, contradicts: bool
) -> None:
    assert bool(contradiction(text, "", measured)) == contradicts


def test_contradictions_are_recorded_and_keep_the_clip(workspace: Workspace) -> None:
    with endpoint() as served:
        row = run(table(1, workspace, camera="pan_left"), asked(served), workspace)[0]
    says(row["caption_contradicts"], "'static'", "against pan_left")
    assert row["drop_reason"] == ""
    assert contradiction("A lake.", "slow zoom in", "zoom_out")
    # What is written behind a caption agrees by nature, and is no claim of the caption's.
    given = table(1, workspace, camera="pan_left", given_caption="The camera tilts up.")
    (row,) = run(given, CaptionConfig(append=("camera",)), workspace)
    assert row["caption"].endswith("Camera: pan left.")
    says(row["caption_contradicts"], "'tilts up'", "against pan_left")

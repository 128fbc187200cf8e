"""Longer prompts keep what the short ones name, whoever wrote them, and an endpoint that fails costs a sentence."""

import json
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses, says

from sora_train.data.shapes import captions as shapes
from sora_train.data.shapes.world import sample_scene
from sora_train.errors import UserError
from sora_train.sampling.prompts import upsampling
from sora_train.sampling.prompts.entities import COLOURS, NUMBERS, lost
from sora_train.sampling.prompts.rules import SHORT, expanded, shapes_parts
from sora_train.sampling.prompts.upsampling import KEY, Upsampler
from tests.prep.endpoint import completion, endpoint

THINGS = ("dogs", "balloon", "Marta", "bicycles", "old teapot", "M\u00fcnchen", "R2-D2")
DOES = ("runs", "spins", "is jumping", "sleeps", "moves left", "falls down")


def always(text: str) -> bool:
    return True


@st.composite
def prompts(draw) -> str:
    """One or two things with a number or a colour, what they do, and what there is not."""
    colours, numbers = st.sampled_from(sorted(COLOURS)), st.sampled_from(sorted(NUMBERS)[1:])
    things = draw(st.lists(st.sampled_from(THINGS), min_size=1, max_size=2, unique=True))
    named = " and ".join(
        f"{draw(st.one_of(colours, numbers, st.just('')))} {thing}".strip() for thing in things
    )
    denied = draw(st.sampled_from(["", " without people", ", no snow", " with no rain"]))
    return f"{named} {draw(st.sampled_from(DOES))}{denied}"


# -- what must be kept --


@given(prompts(), st.integers(0, 9))
def test_rules_keep_every_word_and_are_the_same_each_time(prompt, seed):
    longer = expanded(prompt, "clips", seed, always)
    assert longer.startswith(prompt) and not lost(prompt, longer)
    assert longer == expanded(prompt, "clips", seed, always)
    assert expanded(prompt, "clips", seed, lambda text: False) in (prompt, f"{prompt}.")
    assert len({expanded("a dog runs", "clips", seed, always) for seed in range(12)}) > 3


@given(prompts(), st.data())
def test_a_text_without_one_of_its_words_has_lost_it(prompt, data):
    words = prompt.replace(",", "").split()
    place = data.draw(st.integers(0, len(words) - 1))
    if words[place].lower() in ("and", "is", "with", "one"):
        return
    kept = " ".join(words[:place] + words[place + 1 :])
    assert lost(prompt, f"A quiet scene. {kept}. Soft light.")


@pytest.mark.parametrize(
    ("prompt", "longer", "gone"),
    [
        ("a dog runs", "The dog is running over a field.", []),
        ("two dogs", "2 brown dogs sleep.", []),
        ("a red circle and a blue square", "A red circle beside a blue square.", []),
        (
            "a red circle and a blue square",
            "A blue circle and a red square.",
            ["red circle", "blue square"],
        ),
        ("three cats", "Two cats, three dogs.", ["3 cats"]),
        ("a street without cars", "A street with cars.", ["no cars"]),
        ("a street without cars", "A street with no parked cars.", []),
        ("a street with cars", "A street, no cars in sight.", ["cars"]),
        ("a ball rolls down", "A ball rolls up.", ["down"]),
        ("a sign that says 'OPEN 24'", "A sign says 'Open 24'.", ["'OPEN 24'"]),
        ("Anna waves", "A woman waves.", ["anna"]),
        ("\u732b\u304c\u8d70\u308b", "\u732b\u304c\u8d70\u308b\u3002\u660e\u308b\u3044\u3002", []),
        (
            "\u732b\u304c\u8d70\u308b",
            "\u72ac\u304c\u8d70\u308b\u3002",
            ["\u732b\u304c\u8d70\u308b"],
        ),
    ],
)
def test_what_a_text_has_lost(prompt, longer, gone):
    assert lost(prompt, longer) == gone


@given(prompts(), st.integers(0, 9))
def test_long_prompts_and_other_letters_are_left_alone(prompt, seed):
    long = " ".join([prompt, *["slowly"] * SHORT])
    assert expanded(long, "clips", seed, always) == long
    assert expanded("ein Hund l\u00e4uft", "clips", seed, always) == "ein Hund l\u00e4uft"


def test_what_the_prompt_says_itself_is_not_said_again():
    prompt = "a dog runs on a beach at sunset, handheld camera, anime"
    assert expanded(prompt, "clips", 0, always) == prompt


# -- the shapes world --


@given(st.integers(0, 3000), st.sampled_from(["train", "held_out"]))
def test_captions_of_shapes_are_read_and_completed_within_their_grammar(index, split):
    scene = sample_scene(0, index, split)
    assert shapes_parts(scene.caption) == shapes.parts(scene, scene.phrasing)
    longer = expanded(scene.caption, "shapes", 0, always)
    assert len(longer.encode()) <= shapes.MAX_CAPTION_BYTES
    assert shapes_parts(scene.caption).items() <= shapes_parts(longer).items()
    assert not lost(scene.caption, longer)


@pytest.mark.parametrize(
    "prompt",
    ["a dog runs", "red circle moves left, anime", "Red circle moves left", "red circle flies", ""],
)
def test_what_is_no_caption_of_shapes_is_left_alone_and_told(prompt):
    one = Upsampler("rules", "", "shapes", 0, always)
    assert one.all([prompt]) == [prompt]
    says(one.notes[0], "left as it is", "shapes world")


# -- an endpoint --


def asked(url: str, source: str = "clips", fits=always) -> Upsampler:
    return Upsampler(url, "m", source, 0, fits, backoff=0.0)


def test_a_good_answer_is_taken_and_the_key_goes_with_it(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    longer = "A red dog runs\nover a meadow. Static camera."
    with endpoint(lambda number, body: completion(longer)) as served:
        one = asked(f"{served.url}/chat/completions")
        assert one.all(["a red dog runs"]) == ["A red dog runs over a meadow. Static camera."]
    assert served.keys == ["Bearer secret"] and served.bodies[0]["model"] == "m"
    assert served.bodies[0]["messages"][1]["content"] == "a red dog runs"
    says(one.notes[0], "a red dog runs", "is expanded to", "meadow")


def test_a_long_prompt_is_not_sent():
    with endpoint() as served:
        long = " ".join(["dog"] * (SHORT + 1))
        assert asked(served.url).all([long]) == [long]
    assert not served.bodies


@pytest.mark.parametrize(
    ("answer", "facts"),
    [
        (completion("A green dog runs."), ("lost red",)),
        (completion("A cat runs by a red dog house. No red dog runs."), ()),
        (completion("A red dog does not run."), ("lost runs",)),
        (completion(""), ("is empty",)),
        (completion(None), ("is empty",)),
        (completion("a red dog runs\x07"), ("is no text",)),
        (completion("A red dog runs and", finish_reason="length"), ("is cut off",)),
        (completion(None, message={"refusal": "no dogs"}), ("is a refusal", "no dogs")),
        (completion("I'm sorry, I can't help with that."), ("lost red",)),
        (completion(f"A red dog runs. {'Slowly. ' * 90}"), ("longer than the model reads",)),
    ],
)  # fmt: skip
def test_rules_take_the_place_of_an_answer_of_no_use(answer, facts):
    with endpoint(lambda number, body: answer) as served:
        one = asked(served.url, fits=lambda text: len(text) < 300)
        (text,) = one.all(["a red dog runs"])
    if facts:
        assert text == expanded("a red dog runs", "clips", 0, always)
        says(one.notes[0], served.url, "a red dog runs", *facts, "rules take its place")
    assert len(one.notes[0]) < 400


@pytest.mark.parametrize(
    ("plays", "facts"),
    [
        (lambda number, body: (500, {}, b"boom"), ("500",)),
        (lambda number, body: (200, {}, b"<html>"), ("no chat completion",)),
        (lambda number, body: (200, {}, b"[" * 90_000), ("no chat completion",)),
        (lambda number, body: (200, {}, json.dumps({"choices": []}).encode()), ("no chat",)),
        (lambda number, body: (429, {"Retry-After": "3600"}, b"later"), ("429",)),
        (lambda number, body: (200, {}, b" " * (1 << 21)), ("more than",)),
    ],
)
def test_an_endpoint_that_fails_is_told_once_and_not_asked_again(plays, facts):
    with endpoint(plays) as served:
        one = asked(served.url)
        texts = one.all(["a red dog runs", "two cats sleep"])
    assert len(served.bodies) <= upsampling.TRIES
    assert texts == [
        expanded(text, "clips", 0, always) for text in ("a red dog runs", "two cats sleep")
    ]
    said = [note for note in one.notes if served.url in note]
    assert len(said) == 1
    says(said[0], *facts, "by rules")


def test_an_endpoint_that_is_slow_or_away_is_told(monkeypatch):
    monkeypatch.setattr(upsampling, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        one = asked(url)
        assert one.all(["a dog runs"]) == [expanded("a dog runs", "clips", 0, always)]
        says(one.notes[0], url, "does not answer within 0.2 s")
    one = asked(url)
    one.all(["a dog runs"])
    says(one.notes[0], url, "cannot be reached")


def test_a_later_try_succeeds():
    def third(number, body):
        return completion("A dog runs far.") if number == 2 else (503, {}, b"")

    with endpoint(third) as served:
        assert asked(served.url).all(["a dog runs"]) == ["A dog runs far."]
    assert [body["seed"] for body in served.bodies] == [0, 1, 2]


@pytest.mark.parametrize(("status", "remedy"), [(401, KEY), (404, "--upsample-model")])
def test_a_refused_key_or_model_is_the_users(status, remedy):
    with (
        endpoint(lambda number, body: (status, {}, b"no")) as served,
        refuses(UserError, f"--upsample {served.url}", str(status), remedy),
    ):
        asked(served.url).all(["a dog runs"])


def test_a_model_of_shapes_gets_no_text_of_another_world():
    answer = "A red circle moves left over a meadow."
    good = "red circle moves left, bright light"
    with endpoint(lambda number, body: completion(good if number else answer)) as served:
        one = asked(served.url, source="shapes")
        by_rules, by_model = one.all(["red circle moves left"] * 2)
    assert by_model == good
    assert by_rules == expanded("red circle moves left", "shapes", 0, always)
    says(one.notes[0], "no caption of the shapes world")


@pytest.mark.parametrize(
    ("by", "model", "facts"),
    [
        ("rule", "", ("--upsample is 'rule'", "http://")),
        ("file:///a", "m", ("--upsample is 'file:///a'",)),
        ("http://localhost:1/v1", "", ("--upsample-model",)),
    ],
)
def test_a_wrong_flag_is_told(by, model, facts):
    with refuses(UserError, *facts):
        Upsampler(by, model, "clips", 0, always)


@settings(max_examples=200)
@given(st.text(max_size=40), st.text(max_size=60))
def test_any_text_can_be_compared_and_expanded(prompt, longer):
    assert isinstance(lost(prompt, longer), list)
    assert not lost(prompt, prompt)
    expanded(prompt, "clips", 0, always)
    expanded(prompt, "shapes", 0, always)

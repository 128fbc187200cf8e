"""A script of cues: prompts that hold from a moment on, and frames that are given at one."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.sampling.prompts.script import Cue, Script

TIMES = st.lists(st.integers(0, 240), min_size=1, max_size=6, unique=True).map(sorted)


@st.composite
def scripts(draw):
    """Cues at quarters of a second, some with a prompt of their own number."""
    times = draw(TIMES)
    speaks = draw(st.lists(st.booleans(), min_size=len(times), max_size=len(times)))
    cues = (
        Cue(at / 4, f"p{i}" if say else "")
        for i, (at, say) in enumerate(zip(times, speaks, strict=True))
    )
    return Script(tuple(cues))


@given(scripts(), st.integers(0, 320).map(lambda eighths: eighths / 8))
def test_a_prompt_holds_from_its_cue_up_to_the_next_one(script, seconds):
    starts = [cue for cue in script.cues if cue.prompt]
    if not starts:
        assert script.prompt_at(seconds) == ""
        return
    assert all(script.prompt_at(cue.at) == cue.prompt for cue in starts)
    if len(starts) > 1:
        assert script.prompt_at(starts[1].at - 0.01) == starts[0].prompt
    bounds = [0.0, *(cue.at for cue in starts[1:]), float("inf")]
    (held,) = [
        cue.prompt
        for cue, (begin, end) in zip(starts, pairwise(bounds), strict=True)
        if begin <= seconds < end
    ]
    assert script.prompt_at(seconds) == held


@given(st.floats(0, 1e6))
def test_a_plain_prompt_holds_from_beginning_to_end(seconds):
    assert Script.of("a cat").prompt_at(seconds) == "a cat"


def _run(value: int, frames: int) -> np.ndarray:
    return np.full((frames, 2, 2, 3), value, np.uint8)


@given(TIMES, st.integers(1, 9), st.integers(1, 500))
def test_given_frames_lie_in_the_video_and_none_on_another(times, length, frames):
    script = Script(tuple(Cue(at / 4, frames=_run(i, length)) for i, at in enumerate(times)))
    shown = script.given(8.0, frames)
    places = [first + i for first, run in shown for i in range(len(run))]
    assert places == sorted(set(places))
    assert all(place < frames for place in places)
    for number, at in enumerate(times):
        inside = [first for first, run in shown if run[0, 0, 0, 0] == number]
        assert inside == ([at * 2] if at * 2 < frames else [])


def test_cues_out_of_order_are_refused():
    with pytest.raises(ValueError, match="order of time"):
        Script((Cue(2.0, "a"), Cue(1.0, "b")))
    with pytest.raises(ValueError, match="before the start"):
        Script((Cue(-1.0, "a"),))


def test_a_script_of_prompts_alone_gives_nothing():
    assert Script.of("red circle").given(8.0, 24) == []

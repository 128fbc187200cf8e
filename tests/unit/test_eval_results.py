"""What an evaluation says of its numbers: means, intervals that hold what they promise, and pairs."""

import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses

from sora_train.data.decode.video_io import encode_h264
from sora_train.data.shapes import world
from sora_train.data.shapes.captions import ACTIONS
from sora_train.errors import Fault, UserError
from sora_train.evaluation.cases import Case, Sampled, asked_by
from sora_train.evaluation.paired import of_pairs
from sora_train.evaluation.registry import METRICS, TIERS
from sora_train.tools.eval.compare import compared
from sora_train.tools.eval.folder import read_folder
from sora_train.tools.eval.results import Evaluation, interval, means
from sora_train.tools.eval.vbench import vbench

FRAME = np.zeros((1, 2, 2, 3), np.uint8)


def evaluation(**values: list[float]) -> Evaluation:
    """Clips of one prompt each with these numbers."""
    count = len(next(iter(values.values())))
    clips = [
        Sampled(
            Case("t2v", f"prompt {n}"),
            FRAME,
            8.0,
            numbers={name: values[name][n] for name in values},
        )
        for n in range(count)
    ]
    return Evaluation("a", Path(), {}, clips)


def test_every_metric_says_what_it_is():
    for name, metric in METRICS.items():
        assert metric.tier in TIERS, name
        assert metric.unit and metric.meaning and metric.source, name
        assert metric.better in ("higher", "lower", "zero", ""), name


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_an_interval_of_shares_holds_the_truth_as_often_as_it_says(share: float):
    random = np.random.default_rng(0)
    draws = (random.random((2000, 16)) < share).astype(float)
    ends = [interval(list(row), shares=True) for row in draws]
    held = np.mean([low - 1e-12 <= share <= high + 1e-12 for low, high in ends])
    assert held >= 0.92


def test_an_interval_of_differences_holds_the_truth_as_often_as_it_says():
    """And an unpaired one is far wider where the clips differ more than the models do."""
    random, held, widths = np.random.default_rng(1), [], []
    for _ in range(1000):
        prompt = random.normal(0, 10, 12)
        first, second = (prompt + random.normal(gap, 1, 12) for gap in (0.0, 0.5))
        found = of_pairs(second.tolist(), first.tolist(), 0.95, "clips")
        held.append(found.low <= 0.5 <= found.high)
        widths.append(found.unpaired / (found.high - found.low))
    assert 0.93 <= np.mean(held) <= 0.97
    assert np.mean(widths) > 5


def test_a_share_without_exception_is_not_sure():
    low, high = interval([1.0] * 16, shares=True)
    assert low == pytest.approx(0.806, abs=1e-3) and high == 1
    assert all(map(math.isnan, interval([1.0])))


@given(st.integers(0, 50))
def test_the_better_one_is_named_whatever_the_direction(seed: int):
    base = np.random.default_rng(seed).uniform(-1, 1, 8)
    noise = np.random.default_rng(seed + 1).uniform(-1e-3, 1e-3, 8)
    first = evaluation(flicker=list(base), fidelity=list(base), brisque=list(base))
    second = evaluation(
        flicker=list(base + 1 + noise),
        fidelity=list(base - 1 + noise),
        brisque=list(base - 1 + noise),
    )
    verdicts = {one.name: one.verdict for one in compared(first, second)}
    assert verdicts == {"flicker": "second", "fidelity": "first", "brisque": "second"}


def test_of_drifts_the_distance_from_zero_is_compared():
    first = evaluation(drift_mean=[-8.0, 8.1, -7.9, 8.2])
    second = evaluation(drift_mean=[1.0, -1.1, 0.9, -0.8])
    (one,) = compared(first, second)
    assert (one.verdict, one.difference.mean) == ("second", pytest.approx(-7.1))


def test_few_clips_that_all_differ_alike_tell_nothing():
    first, second = evaluation(oracle_shape=[0.0] * 3), evaluation(oracle_shape=[1.0] * 3)
    assert compared(first, second)[0].verdict == "too few clips to tell"
    first, second = evaluation(oracle_shape=[0.0] * 6), evaluation(oracle_shape=[1.0] * 6)
    assert compared(first, second)[0].verdict == "second"


def test_clips_of_other_prompts_are_no_pairs():
    other = evaluation(flicker=[1.0])
    other.clips[0] = Sampled(Case("t2v", "another"), FRAME, 8.0, numbers={"flicker": 1.0})
    with refuses(UserError, "share no prompt", "--prompts"):
        compared(evaluation(flicker=[1.0]), other)


def test_means_are_of_the_clips_that_have_a_number():
    one = evaluation(flicker=[1.0, 2.0, 3.0])
    one.clips[0].numbers["fidelity"] = 30.0
    one.of_set["transnet_fd"] = 5.0
    found = {mean.name: (mean.value, mean.count) for mean in means(one)}
    assert found == {"flicker": (2.0, 3), "fidelity": (30.0, 1), "transnet_fd": (5.0, 3)}


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_of_the_shapes_world_are_understood(held_out: bool):
    for prompt in world.eval_prompts(60, held_out=held_out):
        assert asked_by(prompt.text) == prompt


@pytest.mark.parametrize("motion", ACTIONS)
def test_both_wordings_of_a_motion_are_understood(motion: str):
    for wording in ACTIONS[motion]:
        found = asked_by(f"small red circle {wording} on a plain background, static camera")
        assert found is not None
        assert (found.colour, found.shape, found.motion) == ("red", "circle", motion)


def test_other_prompts_ask_nothing_of_the_oracle():
    for text in ("", "a dog runs", "red circle", "a pink elephant moves left", "x" * 10_000):
        assert asked_by(text) is None


# --- folders ---


def clip(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 32, 32, 3), np.uint8)


def test_a_folder_of_samples_is_read_with_its_prompts_and_a_torn_clip_is_accounted(tmp_path: Path):
    rows = []
    for number in range(3):
        encode_h264(clip(number), 8, tmp_path / f"{number:03d}.mp4")
        rows.append({"prompt": f"prompt {number}", "file": f"{number:03d}.mp4", "seed": 0})
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    torn = tmp_path / "001.mp4"
    torn.write_bytes(torn.read_bytes()[:-2000])
    clips, notes = read_folder(tmp_path, 16)
    assert [one.case.prompt for one in clips] == ["prompt 0", "prompt 2"]
    assert clips[0].clip.shape == (6, 32, 32, 3) and clips[0].fps == 8
    assert len(notes) == 1 and "001.mp4 is left out" in notes[0]


def test_folders_without_clips_are_told(tmp_path: Path):
    with refuses(UserError, "there is no folder"):
        read_folder(tmp_path / "no", 16)
    with refuses(UserError, "holds no clips"):
        read_folder(tmp_path, 16)
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    with refuses(UserError, "no clip", "a.mp4"):
        read_folder(tmp_path, 16)
    (tmp_path / "prompts.json").write_text("{")
    with refuses(UserError, "prompts.json is damaged"):
        read_folder(tmp_path, 16)


# --- VBench in an environment of its own ---

STAND_IN = """#!/usr/bin/env python3
import json, os, sys
told = dict(zip(sys.argv[4::2], sys.argv[5::2]))
assert sys.argv[1] == "-c" and sys.argv[3] == "evaluate" and told["--mode"] == "custom_input"
assert os.environ["VBENCH_CACHE_DIR"] == "/weights"
name = told["--dimension"]
if name == "imaging_quality":
    sys.exit("RuntimeError: no GPU")
os.makedirs(told["--output_path"])
count = len(os.listdir(told["--videos_path"]))
written = {name: [0.5 + count / 100, [{"video_path": "a", "video_results": 1}]]}
if name != "dynamic_degree":
    open(os.path.join(told["--output_path"], "results_x_eval_results.json"), "w").write(json.dumps(written))
"""


def test_vbench_is_run_by_its_own_interpreter_and_its_json_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VBENCH_CACHE_DIR", "/weights")
    python, clips = tmp_path / "python", tmp_path / "clips"
    python.write_text(STAND_IN)
    clips.mkdir()
    out = tmp_path / "vbench.json"
    with refuses(UserError, "--python", "is no interpreter"):
        vbench(clips, python, ["motion_smoothness"], out)
    os.chmod(python, python.stat().st_mode | stat.S_IXUSR)
    with refuses(UserError, "holds no mp4 files"):
        vbench(clips, python, ["motion_smoothness"], out)
    for number in range(3):
        encode_h264(clip(number), 8, clips / f"{number}.mp4")
    (clips / "prompts.json").write_text("[]")
    names = ["motion_smoothness", "subject_consistency"]
    assert vbench(clips, python, names, out) == dict.fromkeys(names, 0.53)
    assert json.loads(out.read_text())["scores"]["motion_smoothness"] == 0.53
    with refuses(UserError, "--dimension color", "subject_consistency"):
        vbench(clips, python, ["color"], out)
    with refuses(Fault, "imaging_quality", "no GPU", "VBENCH_CACHE_DIR"):
        vbench(clips, python, ["imaging_quality"], out)
    with refuses(Fault, "without a score of dynamic_degree"):
        vbench(clips, python, ["dynamic_degree"], out)

"""`sora bench cost`: the fit is exact, the measurement ends in two values a run takes."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train import cli
from sora_train.config.compose import compose
from sora_train.device.measuring import Stats, grid_of
from sora_train.errors import UserError
from sora_train.tools.plan.cost import (
    Fit,
    check_lengths,
    clip_of,
    default_lengths,
    fit,
    parse_tokens,
    run,
    table,
)
from sora_train.training.pipeline.plan import cost_model

COEFFICIENT = st.one_of(st.just(0.0), st.floats(0.1, 10.0))


@given(COEFFICIENT, COEFFICIENT, COEFFICIENT)
@settings(max_examples=60, deadline=None)
def test_exact_times_give_their_coefficients_back(a: float, b: float, c: float):
    lengths = [100, 300, 1000, 3000]
    truth = Fit(a * 1e-4, b * 1e-7, c * 1e-2)
    if a == b == 0:
        with refuses(UserError, "grow", "tokens"):
            fit(lengths, [truth(length) + 1e-3 for length in lengths])
        return
    found = fit(lengths, [truth(length) for length in lengths])
    assert [found(s) for s in lengths] == pytest.approx([truth(s) for s in lengths], rel=1e-6)
    assert found.a == pytest.approx(truth.a, rel=1e-4, abs=1e-9)
    assert found.b == pytest.approx(truth.b, rel=1e-4, abs=1e-12)


@given(st.lists(st.floats(0.01, 100.0), min_size=5, max_size=5))
@settings(max_examples=100, deadline=None)
def test_no_coefficient_is_negative_and_none_nearby_fits_better(seconds: list[float]):
    lengths = np.array([10.0, 40.0, 160.0, 640.0, 2560.0])
    times = np.array(seconds)

    def error(values: np.ndarray) -> float:
        a, b, c = values
        return float(np.square((c + a * lengths + b * lengths**2) / times - 1).sum())

    try:
        found = fit(lengths.tolist(), seconds)
    except UserError:
        return
    best = np.array([found.a, found.b, found.c])
    assert (best >= 0).all()
    scale = times.max() / np.array([2560.0, 2560.0**2, 1.0])
    for axis in range(3):
        for step in (-1e-3, 1e-3):
            moved = best.copy()
            moved[axis] = max(0.0, moved[axis] + step * scale[axis])
            assert error(moved) >= error(best) * (1 - 1e-9) - 1e-12


def test_the_table_sets_measured_beside_predicted():
    text = table(Fit(1e-3, 0.0, 0.1), {100: Stats.of([0.25]), 1000: Stats.of([1.1])})
    assert "| 100 | 0.25 | 0.2 | -20.0 % |" in text
    assert "| 1,000 | 1.1 | 1.1 | +0.0 % |" in text
    assert "data.cost_a=0.001 data.cost_b=0" in text


@pytest.mark.parametrize("text", ["tokens=", "tokens=a,2", "tokens=0,1,2", "tokens=5,-1"])
def test_a_wrong_list_of_tokens_is_named(text: str):
    with pytest.raises(UserError, match=re.escape(text) + " is not a list"):
        parse_tokens(text)
    assert parse_tokens("tokens=[1, 20,300]") == parse_tokens("tokens=1,20,300") == [1, 20, 300]


def test_what_cannot_be_measured_is_refused_before_anything_is_built(tmp_path: Path):
    with refuses(UserError, "3", "lengths"):
        run(["experiment=parity_tiny"], tokens=[5, 5, 9], repeats=1, out=tmp_path)
    with pytest.raises(UserError, match="--repeats 0"):
        run(["experiment=parity_tiny"], tokens=None, repeats=0, out=tmp_path)
    with pytest.raises(UserError, match="task=vae"):
        run(["experiment=tiny_vae"], tokens=None, repeats=1, out=tmp_path)


def test_lengths_reach_the_largest_bucket_and_a_whole_micro_batch():
    short = default_lengths(compose(["experiment=quickstart", "data.micro_batch_tokens=1"]).config)
    whole = default_lengths(compose(["experiment=quickstart"]).config)
    assert len(whole) == 6 and whole[-1] == 480 and whole[0] == 30
    assert len(short) >= 3 and short[-1] < 480


@given(st.integers(1, 2**19))
@settings(max_examples=200, deadline=None)
def test_a_grid_holds_the_tokens(tokens: int):
    assert math.prod(grid_of(tokens)) == tokens


@pytest.mark.parametrize("name", ["wan_1_3b_finetune", "wan_14b_finetune", "wan_5b_finetune"])
def test_lengths_of_a_recipe_are_clips_that_its_model_takes(name: str):
    cfg = compose([f"experiment={name}", "data.source=x"]).config
    lengths = default_lengths(cfg)
    check_lengths(cfg, lengths)
    assert lengths[-1] > 16_000
    clip = clip_of(cfg, 32_768, torch.device("cpu"))
    frames, height, width = clip.x.shape[2:]
    assert (frames, height, width) == (4, 128, 256) and clip.mask_BT.shape == (1, 4)


def test_a_length_that_is_one_long_row_is_refused_with_one_that_is_not():
    cfg = compose(["experiment=parity_tiny"]).config
    with refuses(UserError, "tokens=8191", "model.rope_max_length=1024", "tokens=8192"):
        check_lengths(cfg, [64, 8191])


def test_a_toy_model_is_measured_and_its_values_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    arguments = ["bench", "cost", "experiment=parity_tiny", "tokens=16,256,2048", "run.device=cpu"]
    assert cli.run([*arguments, "--repeats", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    values = re.search(r"data\.cost_a=(\S+) data\.cost_b=(\S+)", printed)
    assert values is not None and "| 2,048 |" in printed
    cost = cost_model(compose(["experiment=parity_tiny", *values.group(0).split()]).config)
    assert 0 < cost(16) < cost(2048)
    read = json.loads((tmp_path / "cost.json").read_text())
    assert list(read["measured"]) == ["16 tokens", "256 tokens", "2048 tokens"]
    assert read["facts"]["to paste"] == values.group(0)

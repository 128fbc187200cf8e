"""The interval that may be looked at after every block: its level holds over all looks together."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.evaluation.paired import student
from sora_train.evaluation.sequential import (
    LEAST_BLOCKS,
    SHARPEST,
    block_means,
    sequential_interval,
)

RUNS, BLOCKS = 300, 50


def ever_wrong(values_RT: np.ndarray, truth_T: np.ndarray | float, confidence: float) -> float:
    """Share of the runs in which some look leaves out the truth."""
    truth = np.broadcast_to(truth_T, values_RT.shape[1:])
    wrong = 0
    for values in values_RT:
        looks = (
            (sequential_interval(values[:t], confidence), truth[t - 1])
            for t in range(LEAST_BLOCKS, len(values) + 1)
        )
        wrong += any(not look.low <= mean <= look.high for look, mean in looks)
    return wrong / len(values_RT)


def noise(seed: int, lag: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((RUNS, BLOCKS))
    for t in range(1, BLOCKS):
        values[:, t] += lag * values[:, t - 1]
    return values


@pytest.mark.parametrize("lag", [0.0, 0.2])
def test_over_all_looks_it_is_wrong_no_more_often_than_it_says(lag: float):
    # 0.05, and three standard deviations of the share of 300 runs.
    assert ever_wrong(noise(1, lag), 0.0, 0.95) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / RUNS)


def test_an_ordinary_interval_is_wrong_far_more_often_when_it_is_looked_at_again_and_again():
    wrong = 0
    for values in noise(1):
        for t in range(LEAST_BLOCKS, BLOCKS + 1):
            half = student(0.95, t - 1) * values[:t].std(ddof=1) / math.sqrt(t)
            if abs(values[:t].mean()) > half:
                wrong += 1
                break
    assert wrong / RUNS > 0.15


def test_a_mean_that_changes_on_the_way_is_the_mean_so_far():
    drift = np.linspace(2.0, -0.5, BLOCKS)
    so_far = np.cumsum(drift) / np.arange(1, BLOCKS + 1)
    assert ever_wrong(noise(2)[:100] + drift, so_far, 0.95) < 0.1


def test_a_clear_difference_is_seen_soon():
    looks = [sequential_interval(values[:20], 0.95) for values in noise(3) + 1.5]
    assert sum(look.low > 0 for look in looks) > 0.97 * RUNS


@pytest.mark.parametrize("alpha", [0.05, 0.2])
@pytest.mark.parametrize("t", [12, 40, 300])
def test_at_its_bound_the_mixture_of_likelihoods_is_one_over_alpha(alpha: float, t: int):
    """Robbins' normal mixture, 1 / sqrt(1 + t rho^2) exp(rho^2 S^2 / (2 (1 + t rho^2))), crosses 1 / alpha there."""
    values = np.resize([1.0, -1.0], t)  # neighbours that are not alike in the least
    look = sequential_interval(values, 1 - alpha)
    rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / SHARPEST
    spread = values.std(ddof=1) * student(1 - alpha, t - 1) / NormalDist().inv_cdf(1 - alpha / 2)
    total = look.high * t / spread
    mixture = math.exp(rho2 * total**2 / (2 * (1 + t * rho2))) / math.sqrt(1 + t * rho2)
    assert mixture == pytest.approx(1 / alpha)


def test_neighbours_that_are_alike_widen_it_as_an_autoregression_does():
    """By sqrt((1 + q) / (1 - q)), which is 2 for q = 0.6; few values show a little less of it."""
    widths = []
    for lag in (0.0, 0.6):
        looks = [sequential_interval(v, 0.95) for v in noise(4, lag) * math.sqrt(1 - lag**2)]
        widths.append(np.mean([look.high - look.low for look in looks]))
    assert 1.5 < widths[1] / widths[0] < 2.0


def test_too_few_blocks_say_nothing():
    look = sequential_interval([1.0] * (LEAST_BLOCKS - 1), 0.95)
    assert look.mean == 1.0 and math.isnan(look.low) and not look.sure
    assert sequential_interval([1.0] * LEAST_BLOCKS, 0.95).sure


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 60), st.integers(0, 60))
def test_blocks_are_means_of_whole_steps_in_common(size: int, first: int, a: int, b: int):
    ours = {step: 3.0 * step for step in range(1, a + 1)}
    theirs = {step: float(step) for step in range(1, b + 1)}
    found = block_means(ours, theirs, size, first)
    assert len(found) == max(0, min(a, b) - first + 1) // size
    # 2 * step, so a block's mean is twice the step in its middle.
    middles = [first + n * size + (size - 1) / 2 for n in range(len(found))]
    assert found == pytest.approx([2 * middle for middle in middles])


def test_a_step_without_a_finite_loss_ends_the_blocks():
    ours = dict.fromkeys(range(1, 21), 1.0) | {11: math.nan}
    assert block_means(ours, dict.fromkeys(range(1, 21), 0.0), 5, 1) == [1.0, 1.0]

"""Laws of the judge of steps: it draws nothing, one outlier does not move it, and its state is all it knows."""

import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sentences import refuses

from sora_train.config import SpikeDetectionConfig
from sora_train.monitoring.metrics import MetricsFile
from sora_train.monitoring.report.run_charts import skipped_steps, training_charts
from sora_train.training.outputs.step_metrics import KindOfClips
from sora_train.training.resilience.spike_detector import SpikeDetector, StepVerdict
from sora_train.training.resilience.spike_detector import judge as judged

BAD = st.sampled_from([math.nan, math.inf, -math.inf])
VALUES = st.floats(1e-6, 1e6)
CURVES = st.lists(st.tuples(VALUES, VALUES), min_size=3, max_size=40)
SMALL = SpikeDetectionConfig(warmup=5, window=12, spike_sigma=6.0, grad_norm_sigma=6.0)


def verdict(
    judge: SpikeDetector, loss: float, norm: float, kinds: dict[str, KindOfClips] | None = None
) -> StepVerdict:
    """That of a step with this loss, whose kinds have the parts of it that they say."""
    held = kinds or {}
    limits = judge.limits({name: kind.share for name, kind in held.items()})
    unjudged = sum(held[name].share * held[name].loss for name in limits.unjudged)
    return judged(loss, loss - unjudged, norm, limits)


def follow(judge: SpikeDetector, curve: list[tuple[float, float]]) -> list[str]:
    """SpikeDetector and count each step; the reasons."""
    reasons = []
    for loss, norm in curve:
        found = verdict(judge, loss, norm)
        if found.bad:
            judge.skip(1)
        else:
            judge.accept(loss, norm)
        reasons.append(found.reason)
    return reasons


@given(CURVES)
def test_during_warm_up_no_spike_is_judged(curve: list[tuple[float, float]]) -> None:
    judge = SpikeDetector(SpikeDetectionConfig(warmup=len(curve), window=50))
    assert follow(judge, curve) == [""] * len(curve)


@given(CURVES, BAD, st.booleans(), st.integers(0, 40))
def test_what_is_not_finite_is_always_bad(
    curve: list[tuple[float, float]], bad: float, in_loss: bool, at: int
) -> None:
    """In warm-up and after it, with spikes looked for or not; and nothing of it enters the statistic."""
    for cfg in (SMALL, SpikeDetectionConfig(spike_sigma=0.0, grad_norm_sigma=0.0)):
        judge, clean = SpikeDetector(cfg), SpikeDetector(cfg)
        follow(judge, curve[:at])
        follow(clean, curve[:at])
        found = verdict(judge, *((bad, 1.0) if in_loss else (1.0, bad)))
        assert found.reason == "non_finite"
        judge.skip(1)
        assert follow(judge, curve[at:]) == follow(clean, curve[at:])


@given(CURVES, st.floats(-20, 20), st.floats(-20, 20))
def test_other_units_change_no_verdict(
    curve: list[tuple[float, float]], loss_power: float, norm_power: float
) -> None:
    """Powers of two scale exactly; their logarithms do so to the last digits, which the limits leave room for."""
    a, b = 2.0 ** round(loss_power), 2.0 ** round(norm_power)
    one, other = SpikeDetector(SMALL), SpikeDetector(SMALL)
    for loss, norm in curve:
        seen, scaled = verdict(one, loss, norm), verdict(other, a * loss, b * norm)
        if math.isfinite(seen.loss_limit):
            assert scaled.loss_limit == pytest.approx(a * seen.loss_limit, rel=1e-9)
            assert scaled.grad_norm_limit == pytest.approx(b * seen.grad_norm_limit, rel=1e-9)
        near = any(
            math.isclose(value, limit, rel_tol=1e-9)
            for value, limit in ((loss, seen.loss_limit), (norm, seen.grad_norm_limit))
        )
        assert near or seen.reason == scaled.reason
        one.accept(loss, norm)
        other.accept(a * loss, b * norm)


@given(st.lists(st.floats(0.5, 2.0), min_size=20, max_size=20), st.integers(0, 19), VALUES)
def test_one_outlier_among_good_steps_hardly_moves_the_limit(
    losses: list[float], at: int, outlier: float
) -> None:
    """However large it is: median and deviation each move at most to a neighbouring value of the good ones."""
    cfg = SpikeDetectionConfig(warmup=20, window=20, spike_sigma=6.0)
    clean, spoiled = SpikeDetector(cfg), SpikeDetector(cfg)
    for number, loss in enumerate(losses):
        clean.accept(loss, 1.0)
        spoiled.accept(outlier if number == at else loss, 1.0)
    # All values lie within log(2) of 1, so a window of them can never allow more than this.
    most = math.exp(math.log(2) + 6 * 1.4826 * 2 * math.log(2))
    assert verdict(spoiled, 1.0, 1.0).loss_limit <= most
    assert verdict(clean, 1.0, 1.0).loss_limit <= most


@settings(max_examples=50)
@given(CURVES, st.integers(0, 40))
def test_a_judge_that_was_stored_judges_as_one_that_was_not(
    curve: list[tuple[float, float]], at: int
) -> None:
    straight, broken = SpikeDetector(SMALL), SpikeDetector(SMALL)
    expected = follow(straight, curve)
    found = follow(broken, curve[:at])
    resumed = SpikeDetector(SMALL)
    resumed.load(json.loads(json.dumps(broken.state())))
    assert found + follow(resumed, curve[at:]) == expected
    assert resumed.state() == straight.state()


def test_the_limit_is_the_medians_by_hand() -> None:
    judge = SpikeDetector(
        SpikeDetectionConfig(warmup=3, window=5, spike_sigma=4.0, grad_norm_sigma=0.0)
    )
    for loss in (1e9, 1.0, 2.0, 4.0, 8.0, 16.0):  # the first has left the window
        judge.accept(loss, loss)
    found = verdict(judge, 1.0, 1e30)
    # log2: 0 1 2 3 4, median 2, deviations 2 1 0 1 2, their median 1.
    assert found.loss_limit == pytest.approx(2 ** (2 + 4 * 1.4826))
    assert found.grad_norm_limit == math.inf and not found.bad


def test_a_flat_curve_is_not_judged_by_its_last_digits() -> None:
    judge = SpikeDetector(SMALL)
    for _ in range(20):
        judge.accept(1.0, 1.0)
    assert not verdict(judge, 1.5, 1.5).bad
    assert verdict(judge, 2.0, 1.0).reason == "loss_spike"
    assert verdict(judge, 1.0, 2.0).reason == "grad_norm_spike"


def test_gaussian_deviations_are_deviations() -> None:
    """1.4826 makes sigma mean what it says for values that are normal."""
    judge = SpikeDetector(SpikeDetectionConfig(warmup=1000, window=1000, spike_sigma=4.0))
    quantiles = NormalDist(0.0, 0.5).quantiles(n=1001)
    for value in np.random.default_rng(0).permutation(quantiles):
        judge.accept(math.exp(value), 1.0)
    assert math.log(verdict(judge, 1.0, 1.0).loss_limit) == pytest.approx(4 * 0.5, rel=0.01)


def test_a_loss_of_zero_or_less_is_taken_and_not_judged() -> None:
    judge = SpikeDetector(SMALL)
    for loss in (0.0, -1.0) * 10:
        assert not verdict(judge, loss, 1.0).bad
        judge.accept(loss, 1.0)
    assert verdict(judge, 1e9, 1.0).loss_limit == math.inf
    assert verdict(judge, -1.0, 1e9).reason == "grad_norm_spike"


def test_skips_in_a_row_exhaust_and_a_good_step_forgives() -> None:
    judge = SpikeDetector(SpikeDetectionConfig(max_skips=2))
    judge.skip(3)
    assert not judge.exhausted
    judge.accept(1.0, 1.0)
    judge.skip(3)
    assert not judge.exhausted and judge.counters.skipped == 2
    judge.skip(4)
    assert judge.exhausted
    assert judge.metrics() == {"train/skipped": 3, "train/rollbacks": 0, "train/lost_clips": 10}


def test_a_shorter_window_keeps_the_newest_steps() -> None:
    judge = SpikeDetector(SMALL)
    for loss in range(1, 13):
        judge.accept(float(loss), 1.0)
    short = SpikeDetector(SpikeDetectionConfig(window=3, warmup=3))
    short.load(judge.state())
    assert short.state()["losses"] == [math.log(loss) for loss in (10, 11, 12)]


# --- what a step holds ---


def synthetic(rng: np.random.Generator, share: float, times: float, mixed: bool, steps: int):
    """(loss, norm, kinds, is of the minority, is a spike) of steps whose losses vary by 6 %; 2 % are 5 times their own.

    `mixed`: a step holds both kinds, the minority on average with its share.
    """
    for _ in range(steps):
        if mixed:
            held = float(np.clip(rng.beta(4 * share, 4 * (1 - share)), 0.001, 0.999))
        else:
            held = float(rng.random() < share)
        planted = rng.random() < 0.02
        scale = 5.0 if planted else 1.0
        means = {
            "usual": scale * math.exp(0.06 * rng.standard_normal()),
            "rare": scale * times * math.exp(0.06 * rng.standard_normal()),
        }
        shares = {"usual": 1 - held, "rare": held}
        kinds = {
            name: KindOfClips(share, means[name]) for name, share in shares.items() if share > 0
        }
        loss = sum(kind.share * kind.loss for kind in kinds.values())
        yield loss, loss * math.exp(0.2 * rng.standard_normal()), kinds, held > 0.5, planted


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("times", [2.0, 10.0, 0.1])
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_no_minority_is_skipped_and_what_is_five_times_its_own_kind_is(
    share: float, times: float, mixed: bool
) -> None:
    judge = SpikeDetector(SpikeDetectionConfig())
    rng = np.random.default_rng(7)
    counts = {(rare, planted): [0, 0] for rare in (False, True) for planted in (False, True)}
    for number, (loss, norm, kinds, rare, planted) in enumerate(
        synthetic(rng, share, times, mixed, 3000)
    ):
        bad = verdict(judge, loss, norm, kinds).bad
        judge.skip(1) if bad else judge.accept(loss, norm, kinds)
        if number >= 300:
            counts[rare, planted][0] += bad
            counts[rare, planted][1] += 1
    for (_, planted), (skipped, steps) in counts.items():
        if planted and steps > 20:
            assert skipped >= 0.95 * steps
        elif not planted and steps:
            assert skipped <= 0.01 * steps


def test_the_limit_of_a_step_is_that_of_its_kinds_by_hand() -> None:
    judge = SpikeDetector(SpikeDetectionConfig(warmup=8, spike_sigma=10.0, grad_norm_sigma=0.0))
    for _ in range(4):
        judge.accept(1.0, 1.0, {"a": KindOfClips(1.0, 1.0)})
        judge.accept(8.0, 1.0, {"b": KindOfClips(1.0, 8.0)})
    kinds = {"a": KindOfClips(0.75, 3.0), "b": KindOfClips(0.25, 3.0)}
    # 0.75 * 1 + 0.25 * 8, and e for ten deviations of 0.1
    assert verdict(judge, 3.0, 1.0, kinds).loss_limit == pytest.approx(2.75 * math.e)
    # Of a kind not met before neither the part of the loss nor a level counts.
    new = {"a": KindOfClips(0.75, 3.0), "c": KindOfClips(0.25, 1e9)}
    found = verdict(judge, 0.75 * 3.0 + 0.25e9, 1.0, new)
    assert found.loss_limit == pytest.approx(0.75 * math.e)
    assert found.loss == pytest.approx(0.75 * 3.0) and found.reason == "loss_spike"
    unseen = {"c": KindOfClips(0.6, 1e9), "a": KindOfClips(0.4, 1.0)}
    assert not verdict(judge, 6e8, 1.0, unseen).bad


def test_a_state_from_before_there_were_kinds_begins_anew() -> None:
    judge = SpikeDetector(SMALL)
    judge.load(
        {"losses": [0.0] * 12, "grad_norms": [0.0] * 12, "accepted": 500, "tally": {"skipped": 3}}
    )
    assert judge.counters.skipped == 3 and judge.accepted == 0
    assert not verdict(judge, 1e9, 1e9).bad


def test_a_sigma_that_would_skip_ordinary_steps_is_refused() -> None:
    with refuses(ValidationError, "spike_detection.grad_norm_sigma=1", "skip"):
        SpikeDetectionConfig(grad_norm_sigma=1.0)
    assert SpikeDetectionConfig(spike_sigma=0.0)


def test_rows_taken_back_are_gone_and_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    for step in range(1, 6):
        file.write(step, {"a": math.nan if step == 2 else float(step), "b": math.inf})
    file.go_back(3)
    file.write(4, {"a": 40.0})
    file.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(row["step"], row.get("a")) for row in found] == [(1, 1), (2, None), (3, 3), (4, 40)]


def test_skipped_steps_are_marked_in_the_chart_and_not_drawn() -> None:
    def row(step: int, loss: float, skipped: float, rollbacks: float = 0.0) -> dict[str, float]:
        return {"step": step, "train/loss": loss, "train/skipped": skipped, "train/rollbacks": rollbacks}  # fmt: skip

    rows = [row(1, 1, 0), row(2, 900, 1), row(3, 1, 1), row(4, 1.1, 3, 1), row(5, 800, 4, 1)]
    assert skipped_steps(rows) == [2, 5], "not step 4, the first after a roll-back"
    (title, svg), *_ = training_charts(rows)
    assert title == "Training loss"
    assert [f"step {step} was skipped" in svg for step in range(1, 6)] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert "900" not in svg

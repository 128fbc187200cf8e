"""What the clip ledger concludes from losses that are known beforehand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.tools.data.ledger_lists import memorised, mislabelled, never_learned, scores_of
from sora_train.tools.data.ledger_losses import EXCHANGED, Losses

CLIPS, WRONG = 400, 20
HELP = np.array([0.0, 0.02, 0.1, 0.3])
"""How much a right caption lowers the loss at each noise level; at the lowest it tells nothing."""


def world(seed: int, help_by_level: np.ndarray = HELP, noise: float = 0.03) -> Losses:
    """Clips of two shapes, some plainer than others; the first WRONG ones have captions that are not theirs."""
    rng = np.random.default_rng(seed)
    levels = len(help_by_level)
    plain = rng.uniform(0.2, 1.0, (CLIPS, 1)) + rng.normal(0, 0.2, (1, levels)) ** 2

    def loss(*shape: int) -> np.ndarray:
        return np.float64(rng.normal(0, noise, (CLIPS, levels, *shape)))

    others = plain[..., None] + help_by_level[:, None] + loss(EXCHANGED)
    own = plain + loss()
    own[:WRONG] += help_by_level
    shapes = np.where(np.arange(CLIPS) % 3 == 0, "1x32x32", "9x32x32").astype(object)
    return Losses(np.arange(CLIPS), shapes, own, others, plain + help_by_level / 2 + loss())


def changed(losses: Losses, **columns: np.ndarray) -> Losses:
    return dataclasses.replace(losses, **columns)


def found(scores: np.ndarray) -> float:
    """The share of the wrong captions among the tenth of the clips with the highest scores."""
    return float((np.argsort(-scores)[: CLIPS // 10] < WRONG).sum()) / WRONG


@given(st.integers(0, 100), st.booleans())
@settings(max_examples=20, deadline=None)
def test_captions_that_do_not_help_are_found(seed: int, by_empty: bool):
    """A wrong caption is as bad as another clip's, which is worse than none by as much as a right one is better."""
    losses = world(seed)
    scores = mislabelled(losses, by_empty=by_empty)
    assert found(scores) == 1.0
    assert np.median(scores[WRONG:]) == pytest.approx(0.0, abs=0.1)
    assert np.median(scores[:WRONG]) == pytest.approx(2.0 if by_empty else 1.0, rel=0.25)
    listed = scores_of(losses, losses, None, None).listed()["mislabelled"]
    assert set(range(WRONG)) <= set(listed.tolist()) and len(listed) <= WRONG + CLIPS // 20


@given(st.integers(0, 100), st.floats(0.1, 10.0))
@settings(max_examples=20, deadline=None)
def test_a_score_is_about_captions_and_not_about_clips_or_units(seed: int, unit: float):
    losses = world(seed)
    rng = np.random.default_rng(seed + 1)
    offset = rng.normal(0, 3, losses.own.shape)
    moved = changed(
        losses,
        own=unit * (losses.own + offset),
        exchanged=unit * (losses.exchanged + offset[..., None]),
        empty=unit * (losses.empty + offset),
    )
    for by_empty in (True, False):
        before, after = (mislabelled(one, by_empty=by_empty) for one in (losses, moved))
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-9)


def test_a_level_at_which_captions_tell_nothing_has_no_say():
    """Forty such levels beside the one that tells would drown it, were they counted alike."""
    weak = np.concatenate([np.zeros(40), [0.3]])
    scores = mislabelled(world(3, weak, noise=0.05))
    assert found(scores) >= 0.9
    plain = world(3, weak, noise=0.05)
    unweighted = (plain.own - plain.empty).mean(axis=1)
    assert found(unweighted) < 0.5


def test_a_model_that_does_not_read_captions_judges_none():
    losses = world(0)
    same = changed(losses, empty=losses.own)
    assert np.isnan(mislabelled(same)).all()
    unknown = changed(losses, exchanged=np.full_like(losses.exchanged, np.nan))
    assert np.isnan(mislabelled(unknown, by_empty=False)).all()


def test_other_captions_that_were_the_same_do_not_count():
    losses = world(5)
    exchanged = losses.exchanged.copy()
    exchanged[:, :, 0] = np.nan
    scores = mislabelled(changed(losses, exchanged=exchanged), by_empty=False)
    kept = mislabelled(changed(losses, exchanged=losses.exchanged[:, :, 1:]), by_empty=False)
    np.testing.assert_array_equal(scores, kept)


def test_a_clip_known_by_heart_is_told_from_a_plain_one():
    """Clip 0 was plain from the first, clip 1 fell far below the held-out clips; the others fell as these did."""
    held, last = world(7), world(8)
    first, held_first = (changed(one, own=one.own + 0.5) for one in (last, held))
    own, before = last.own.copy(), first.own.copy()
    own[0], before[0] = held.own.mean(axis=0) - 4 * held.own.std(axis=0), before[0] - 3
    own[1] = held.own.mean(axis=0) - 4 * held.own.std(axis=0)
    last, first = changed(last, own=own), changed(first, own=before)
    scores = memorised(last, held, first, held_first)
    assert scores[1] > 2.0 > scores[0]
    assert scores.argmax() == 1
    alone = memorised(last, held, None, None)
    assert set(np.argsort(-alone)[:2].tolist()) == {0, 1}, "one checkpoint cannot tell them apart"
    assert np.isnan(memorised(last, held.at(np.zeros(0, int)), None, None)).all()


def test_a_clip_whose_loss_hardly_fell_was_never_learned():
    last = world(9)
    rng = np.random.default_rng(0)
    first = changed(last, own=last.own * np.exp(rng.normal(1.0, 0.1, (CLIPS, 1))))
    own = first.own.copy()
    own[5] = last.own[5] * 1.01
    scores = never_learned(last, changed(first, own=own))
    assert scores[5] > 5 and not np.delete(scores, 5).any()
    assert np.isnan(never_learned(last, None)).all()

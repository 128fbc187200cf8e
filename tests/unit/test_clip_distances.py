"""Distances of sets of clips: against closed forms, against roots of matrices, against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.evaluation.distances import frechet, polynomial_mmd


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows with exactly this mean and this (unbiased) covariance."""
    rows = np.random.default_rng(seed).standard_normal((count, len(mean)))
    rows -= rows.mean(axis=0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


@given(st.integers(0, 1000), st.lists(st.floats(0.1, 5), min_size=6, max_size=6))
def test_frechet_of_independent_gaussians_is_the_closed_form(seed: int, values: list[float]):
    # Of diagonal covariances: |m_a - m_b|^2 + sum of (s_a - s_b)^2.
    deviations = np.array(values).reshape(2, 3)
    means = np.random.default_rng(seed).uniform(-3, 3, (2, 3))
    sets = [
        gaussian(means[i], np.diag(deviations[i] ** 2), count, seed + i)
        for i, count in enumerate((20, 31))
    ]
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet(*sets) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [8, 200])
def test_frechet_is_what_a_root_of_a_matrix_gives(count: int):
    """Of fewer clips than features too, as most FVDs compute it: tr sqrtm(C_a C_b)."""
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    random = np.random.default_rng(3)
    mixing = random.standard_normal((12, 12))
    a, b = random.standard_normal((count, 12)) @ mixing, random.standard_normal((count + 3, 12)) + 1
    root = np.real(sqrtm(np.cov(a.T) @ np.cov(b.T)))
    difference = a.mean(axis=0) - b.mean(axis=0)
    expected = difference @ difference + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-4)


@given(st.integers(0, 1000))
def test_a_set_is_at_no_distance_from_itself_and_the_order_does_not_matter(seed: int):
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((9, 5)), random.standard_normal((7, 5)) * 2
    for distance in (frechet, polynomial_mmd):
        assert distance(a, a) == pytest.approx(0, abs=1e-9)
        assert distance(a, b) == pytest.approx(distance(b, a))
        assert distance(a, b) > 0


def test_mmd_is_its_definition():
    random = np.random.default_rng(5)
    a, b = random.standard_normal((6, 4)), random.standard_normal((5, 4))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return np.mean([(np.dot(p, q) / 4) ** 2 for p in x for q in y])

    expected = 100 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert polynomial_mmd(a, b) == pytest.approx(expected)


def test_mmd_is_the_published_code():
    """videojedi/mmd_polynomial.py with its defaults, times 100."""
    kernel = pytest.importorskip("sklearn.metrics.pairwise").polynomial_kernel
    random = np.random.default_rng(6)
    x, y = random.standard_normal((6, 8)), random.standard_normal((9, 8))
    theirs = kernel(x, x, 2, None, 0).mean() + kernel(y, y, 2, None, 0).mean()
    theirs -= 2 * kernel(x, y, 2, None, 0).mean()
    assert polynomial_mmd(x, y) == pytest.approx(100 * theirs)

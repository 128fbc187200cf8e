"""How far apart two sets of clips are, by features of each clip: (N, D) arrays, a row a clip."""

from __future__ import annotations

import numpy as np


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the sets' means and (unbiased) covariances; two rows at least.

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), Dowson and Landau, "The Frechet distance between
    multivariate normal distributions", 1982. With C = X'X of the centred rows X, the eigenvalues of C_a C_b are the
    squared singular values of X_a X_b', so no root of a matrix is taken, and fewer clips than features do no harm.
    """
    mean_a, mean_b = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
    rows_a, rows_b = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    spread = float((rows_a**2).sum() + (rows_b**2).sum())
    shared = float(np.linalg.svd(rows_a @ rows_b.T, compute_uv=False).sum())
    return float(((mean_a - mean_b) ** 2).sum()) + spread - 2 * shared


def polynomial_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / D)^2, over all pairs, times 100, as JEDi takes it.

    Luo et al. 2024, "Beyond FVD: enhanced evaluation metrics for video generation quality", arXiv:2410.05203.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)

    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(((x @ y.T / x.shape[1]) ** 2).mean())

    return 100 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))

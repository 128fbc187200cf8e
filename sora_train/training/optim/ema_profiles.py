"""Power-function averages of the weights, and any other one made of them after training (post-hoc EMA).

Karras et al. 2024 (EDM2), arXiv:2312.02696, section 3.1: instead of a decay, an average has a width
sigma_rel, its standard deviation as a share of the training so far. After step t (1-based) weights of
step tau count as tau^gamma (their eq. 2), kept up to date by avg <- beta avg + (1 - beta) weights with
beta = (1 - 1/t)^(gamma + 1) (eq. 127). Section 3.2 and appendix C: of stored snapshots of a few such
averages any profile is made by least squares over the stored ones (algorithm 3).

The paper's inner products are integrals over continuous time (eq. 151). Here profiles are what the
update really gives, constant over each step, and compared on a grid of steps: the same problem, exact
where the grid is as fine as the steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDEST = math.sqrt(1 / 12)
"""sigma_rel of gamma = 0, the plain mean of all steps: no average of this kind is wider."""
CELLS = 4096  # of the grid in time; a run of fewer steps is exact
CUTOFF = 1e-6
"""Directions this much weaker than the strongest are left out: snapshots are rounded, and what tells
two of them apart by less than their rounding would be noise, multiplied."""


@dataclass(frozen=True)
class Profile:
    """A power-function average at the end of step `steps` (counted from 1)."""

    sigma_rel: float
    steps: int


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a width: the largest root of eq. 126 (their algorithm 2)."""
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """The width of an exponent, eq. 123."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def power_decay(sigma_rel: float, step: int) -> float:
    """beta of the update after step `step` (0-based), eq. 127; 0 at the first, which forgets the initial weights."""
    return (1.0 - 1.0 / (step + 1)) ** (gamma_of(sigma_rel) + 1.0)


def mass(profile: Profile, edges: np.ndarray) -> np.ndarray:
    """What an average holds of the weights of each span of steps, `edges` being their ends from 0: (len - 1,).

    The update's products telescope: the share of steps 1 to s is (s / t)^(gamma + 1).
    """
    share = np.minimum(edges / profile.steps, 1.0) ** (gamma_of(profile.sigma_rel) + 1.0)
    return np.diff(share)


def time_grid(profiles: Sequence[Profile], cells: int = CELLS) -> np.ndarray:
    """Ends of spans of whole steps, from 0 to the last profile's step, with every profile's own among them."""
    ends = {profile.steps for profile in profiles}
    even = np.unique(np.linspace(0, max(ends), min(max(ends), cells) + 1).round())
    return np.union1d(even, np.array(sorted(ends), dtype=np.float64))


def solve(
    stored: Sequence[Profile], wanted: Profile, cutoff: float = CUTOFF
) -> tuple[np.ndarray, float]:
    """How much of each stored average makes the wanted one, and how far the profile made is from the wanted.

    Returns:
        Coefficients that add up to 1, and the L2 distance of the two profiles over the norm of the wanted.
    """
    edges = time_grid([*stored, wanted])
    # A span counts by the mean height of the profile in it, so mass is divided by the root of its length.
    scale = 1.0 / np.sqrt(np.diff(edges))
    columns = np.stack([mass(profile, edges) * scale for profile in stored], axis=1)
    target = mass(wanted, edges) * scale
    # Columns of equal norm, or narrow profiles would outweigh wide ones in what the cutoff leaves out.
    norms = np.linalg.norm(columns, axis=0)
    coefficients = np.linalg.lstsq(columns / norms, target, rcond=cutoff)[0] / norms
    coefficients = coefficients / coefficients.sum()
    distance = np.linalg.norm(columns @ coefficients - target) / np.linalg.norm(target)
    return coefficients, float(distance)

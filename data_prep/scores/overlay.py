"""Overlays: logos, watermarks and tickers, which stay while the picture around them moves."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.scores.passing import SmallFrame
from sora_train.evaluation.detectors.opencv import opencv

LEAST_FRAMES = 8
LEAST_MOVING, MOST_STAYING = 0.2, 0.4
"""Share of the picture that must move for what stays to be told from it, and of its edges that may stay."""
MOVING, STILL = 8.0, 3.0
"""Levels of 255 by which a pixel deviates over time: at least where something moves, at most of what is opaque."""
EDGE = 3.0
"""Levels a pixel of the mean edge that an overlay has."""
COHERENT = 0.85
"""Of an edge that stays: its mean over time by the root of its mean square."""
EDGED, SURROUNDED = 0.5, 0.6
"""Shares of an overlay's border that must be such edges, and of its surroundings that must move."""
CALMER = 0.5
"""An overlay's deviation by that of its surroundings, at most: what the centre of a zoom does not reach."""
FEWEST_PIXELS, LARGEST = 12, 0.3
"""Pixels of a small frame, and share of it: a background behind things that move is larger."""


class Overlay:
    """`overlay_area`: share of the picture that stays while its surroundings move, in [0, 1]; null where too little
    moves for that to be seen. Edges that stay are looked for as Dekel et al., "On the effectiveness of visible
    watermarks", 2017, do, so that what is half transparent is found too.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums = np.zeros(0)

    def see(self, frame: SmallFrame) -> None:
        if not frame.is_tick:
            return
        cv2 = opencv()
        grey = frame.grey.astype(np.float32)
        x, y = (
            cv2.Sobel(grey, cv2.CV_32F, *along, scale=1 / 8).astype(np.float64)
            for along in ((1, 0), (0, 1))
        )
        found = np.stack([grey, grey * grey, x, y, x * x + y * y])
        self._sums = self._sums + found if self._count else found
        self._count += 1

    def scores(self) -> dict[str, Any]:
        if self._count < LEAST_FRAMES:
            return {}
        mean, square, x, y, edges = self._sums / self._count
        deviation = np.sqrt(np.maximum(0, square - mean * mean))
        if (deviation > MOVING).mean() < LEAST_MOVING:
            return {}
        edge, usual = np.hypot(x, y), np.sqrt(edges)
        stays = (edge > EDGE) & (edge > COHERENT * usual)
        if stays.sum() > MOST_STAYING * (usual > EDGE).sum():
            return {}
        return {"overlay_area": float(overlaid(stays, deviation).mean())}


def overlaid(stays: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Where overlays are, bool (H, W), by which edges stay (H, W) and how each pixel deviates over time (H, W)."""
    cv2 = opencv()
    still = (stays | (deviation < STILL)).astype(np.uint8)
    closed = cv2.morphologyEx(still, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(closed)
    near_edge = _grown(stays, 1)
    found = np.zeros(stays.shape, bool)
    for label in range(1, count):
        if not FEWEST_PIXELS <= stats[label, cv2.CC_STAT_AREA] <= LARGEST * stays.size:
            continue
        inside = labels == label
        around = _grown(inside, 5) & ~_grown(inside, 1)
        border = inside & _grown(~inside, 1)
        is_edged = border.any() and near_edge[border].mean() >= EDGED
        moves = around.any() and (deviation[around] > MOVING).mean() >= SURROUNDED
        if is_edged and moves and deviation[inside].mean() < CALMER * deviation[around].mean():
            found |= inside
    return found


def _grown(area: np.ndarray, pixels: int) -> np.ndarray:
    """An area, bool (H, W), with this many pixels more on every side."""
    kernel = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    return opencv().dilate(area.astype(np.uint8), kernel) > 0

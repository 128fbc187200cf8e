"""How the camera moves: a similarity fitted to points tracked from frame to frame, and the word for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.scores.passing import SHORT_SIDE
from sora_train.evaluation.detectors.opencv import opencv

WORDS = (
    "static",
    "pan_left",
    "pan_right",
    "tilt_up",
    "tilt_down",
    "zoom_in",
    "zoom_out",
    "roll",
    "shake",
)
"""As a person behind the camera says it: in `pan_right` the camera turns right, and the picture moves left."""
STILL = 0.012
"""Short sides a second below which a movement is none: about a pixel of 720p each frame of 8 a second."""
CELL = 12
"""Pixels of the squares of a small frame, in each of which a point is tracked."""
LEAST_CORNER = 1e-5
LEAST_POINTS = 8
"""The fewest that a fit is believed of."""
OUTLIER_PIXELS = 0.8
LEAST_INLIERS = 0.3
SMOOTH_SECONDS = 0.75
"""What is quicker than this is shaking, what is slower a movement."""


@dataclass(frozen=True)
class Fit:
    """A similarity from one small frame to the next, about the picture's centre."""

    seconds: float
    """Between the two frames."""
    x: float
    """Short sides that the picture moves right."""
    y: float
    """Short sides that the picture moves down."""
    zoom: float
    """Logarithm of the scale; above 0 the picture grows."""
    roll: float
    """Radians that the picture turns, clockwise as it is seen."""

    def flow(self, height: int, width: int) -> np.ndarray:
        """The movement in pixels of each point of a small frame, float32 (H, W, 2), x first."""
        across = np.arange(width, dtype=np.float32) - (width - 1) / 2
        down = (np.arange(height, dtype=np.float32) - (height - 1) / 2)[:, None]
        cosine, sine = (
            np.float32(np.exp(self.zoom) * turn(self.roll)) for turn in (np.cos, np.sin)
        )
        x = (cosine - 1) * across - sine * down + np.float32(self.x * SHORT_SIDE)
        y = sine * across + (cosine - 1) * down + np.float32(self.y * SHORT_SIDE)
        return np.stack([x, y], axis=-1)


def fit(before: np.ndarray, after: np.ndarray, seconds: float) -> Fit | None:
    """The camera's share of the movement between two small grey frames, uint8 (H, W); None where it shows in none."""
    cv2 = opencv()
    found = _corners(before)
    if len(found) < LEAST_POINTS:
        return None
    there, back_error = _tracked(before, after, found)
    good = back_error < OUTLIER_PIXELS
    if good.sum() < LEAST_POINTS:
        return None
    source, target = found[good, 0], there[good]
    matrix, inliers = cv2.estimateAffinePartial2D(
        source, target, method=cv2.RANSAC, ransacReprojThreshold=OUTLIER_PIXELS, maxIters=500
    )
    if matrix is None or inliers.sum() < max(LEAST_POINTS, LEAST_INLIERS * len(source)):
        return None
    height, width = before.shape
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    moved = matrix[:, :2] @ centre + matrix[:, 2] - centre
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    return Fit(
        seconds,
        float(moved[0]) / SHORT_SIDE,
        float(moved[1]) / SHORT_SIDE,
        float(np.log(scale)),
        float(np.arctan2(matrix[1, 0], matrix[0, 0])),
    )


def _corners(grey: np.ndarray) -> np.ndarray:
    """The best point to track in each square of a small frame that has one: float32 (N, 1, 2), x first.

    Squares, so that a background of little contrast says as much as the things before it.
    """
    height, width = (side // CELL * CELL for side in grey.shape)
    corners = opencv().cornerMinEigenVal(grey, 7)[:height, :width]
    cells = corners.reshape(height // CELL, CELL, width // CELL, CELL).swapaxes(1, 2)
    cells = cells.reshape(height // CELL, width // CELL, CELL * CELL)
    rows, columns = np.nonzero(cells.max(axis=-1) > LEAST_CORNER)
    down, across = np.divmod(cells.argmax(axis=-1)[rows, columns], CELL)
    points = np.stack([columns * CELL + across, rows * CELL + down], axis=-1)
    return points.astype(np.float32)[:, None]


def _tracked(
    before: np.ndarray, after: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where points (N, 1, 2) are in the next frame, (N, 2), and how far from itself each is when tracked back, (N,)."""
    cv2 = opencv()
    window = {"winSize": (21, 21), "maxLevel": 3}
    there, found, _ = cv2.calcOpticalFlowPyrLK(before, after, points, None, **window)
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, **window)
    error = np.hypot(*(back - points)[:, 0].T)
    error[(found[:, 0] == 0) | (found_back[:, 0] == 0)] = np.inf
    return there[:, 0], error


def camera_of(fits: Sequence[Fit]) -> tuple[str | None, float | None]:
    """The word for a clip's camera, and its strength in short sides a second; (None, None) where no fit was found.

    Turning and zooming count as the speed of a point half a short side from the centre. A movement is what stays when
    speeds are averaged over SMOOTH_SECONDS, shaking what does not; the largest names the clip.
    """
    if not fits:
        return None, None
    speeds = np.array([[f.x, f.y, f.zoom / 2, f.roll / 2] for f in fits])
    speeds /= np.array([[f.seconds] for f in fits])
    smooth = _averaged(speeds, SMOOTH_SECONDS / float(np.median([f.seconds for f in fits])))
    moving = np.abs(smooth).mean(axis=0)
    shaking = float(np.sqrt(((speeds - smooth) ** 2).sum(axis=1).mean()))
    axis = int(np.argmax(moving))
    strength = float(moving[axis])
    if max(strength, shaking) < STILL:
        return "static", strength
    if shaking > strength:
        return "shake", shaking
    is_positive = smooth[:, axis].sum() > 0
    words = (
        ("pan_left", "pan_right"),
        ("tilt_up", "tilt_down"),
        ("zoom_in", "zoom_out"),
        ("roll", "roll"),
    )
    return words[axis][0 if is_positive else 1], strength


def _averaged(speeds: np.ndarray, length: float) -> np.ndarray:
    """The moving average over about `length` rows of (N, K), of fewer at both ends."""
    half = round(length) // 2
    return np.stack(
        [speeds[max(0, n - half) : n + half + 1].mean(axis=0) for n in range(len(speeds))]
    )

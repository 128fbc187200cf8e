"""How much moves in a clip, with and without the camera's share: optical flow between small frames."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from data_prep.scores.camera import Fit, camera_of, fit
from data_prep.scores.passing import SHORT_SIDE, SmallFrame
from sora_train.evaluation.detectors.opencv import opencv

LEAST_MOTION = 1e-3
"""Short sides a second below which nothing moves that could do so evenly."""


class Motion:
    """`motion`, `object_motion`: mean speed of a clip's points, in short sides of the picture a second.

    At 1 every point crosses the picture's shorter side in a second; the second is what stays when the camera's
    movement is taken off. `motion_smoothness`: 1 where the speed is even over time, 0 where every other pair stands
    still; null where nothing moves. `camera` and `camera_strength` are those of `camera_of`.
    """

    def __init__(self) -> None:
        self._before: SmallFrame | None = None
        self._fits: list[Fit] = []
        self._speeds: list[tuple[float, float, float]] = []

    def see(self, frame: SmallFrame) -> None:
        if not frame.is_tick:
            return
        before, self._before = self._before, frame
        if before is None:
            return
        seconds = frame.time - before.time
        found = fit(before.grey, frame.grey, seconds)
        flow = _flow().calc(before.grey, frame.grey, None)
        speed = rest = _speed(flow, seconds)
        if found:
            self._fits.append(found)
            # A camera that stands is fitted with a little noise, which is no movement of things.
            rest = min(speed, _speed(flow - found.flow(*frame.grey.shape), seconds))
        self._speeds.append((seconds, speed, rest))

    def scores(self) -> dict[str, Any]:
        camera, strength = camera_of(self._fits)
        if not self._speeds:
            return {"camera": camera, "camera_strength": strength}
        seconds, speeds, rests = np.array(self._speeds).T
        motion = float(np.average(speeds, weights=seconds))
        return {
            "motion": motion,
            "object_motion": float(np.average(rests, weights=seconds)),
            "motion_smoothness": smoothness(speeds) if motion > LEAST_MOTION else None,
            "camera": camera,
            "camera_strength": strength,
        }


def smoothness(speeds: np.ndarray) -> float | None:
    """1 - (the sum of changes) / (twice the sum of speeds), in [0, 1]; None of fewer than two speeds (N,)."""
    if len(speeds) < 2:
        return None
    return float(1 - np.abs(np.diff(speeds)).sum() / (2 * speeds.sum()))


def _speed(flow: np.ndarray, seconds: float) -> float:
    return float(np.hypot(flow[..., 0], flow[..., 1]).mean()) / SHORT_SIDE / seconds


@cache
def _flow() -> Any:
    cv2 = opencv()
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    flow.setFinestScale(1)
    return flow

"""Light and colour of a picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.scores.passing import SmallFrame
from sora_train.evaluation.detectors.opencv import grey_of


class Colour:
    """The mean of `colours` over a clip."""

    def __init__(self) -> None:
        self._found: list[dict[str, float]] = []

    def see(self, frame: SmallFrame) -> None:
        if frame.is_tick:
            self._found.append(colours(frame.rgb))

    def scores(self) -> dict[str, Any]:
        return {
            name: float(np.mean([found[name] for found in self._found])) for name in self._found[0]
        }


def colours(rgb: np.ndarray) -> dict[str, float]:
    """Of a picture, uint8 (H, W, 3) RGB.

    `exposure`: mean luma in [0, 1]. `colourfulness`: of Hasler and Suesstrunk, "Measuring colourfulness in natural
    images", 2003 (their M^(3)): 0 of greys, about 15 slightly, 45 quite, 80 and more highly colourful. `saturation`:
    mean of max - min of a pixel's channels over the mean of their max, in [0, 1]: dark pixels weigh as little as they
    are seen.
    """
    red, green, blue = (rgb[..., channel].astype(np.float32) for channel in range(3))
    yellow_blue, red_green = (red + green) / 2 - blue, red - green
    spread = np.hypot(red_green.std(), yellow_blue.std())
    centre = np.hypot(red_green.mean(), yellow_blue.mean())
    most, least = (pick(rgb, axis=-1).mean(dtype=np.float64) for pick in (np.max, np.min))
    return {
        "exposure": float(grey_of(rgb).mean()) / 255,
        "colourfulness": float(spread + 0.3 * centre),
        "saturation": float((most - least) / most) if most else 0.0,
    }

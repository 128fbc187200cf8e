"""What of a clip's frames is kept: all of it."""

from dataclasses import dataclass

import numpy as np

from sora_train.config.sections.base import Section


class CropConfig(Section):
    """`clip.crop:`"""


@dataclass(frozen=True)
class Crop:
    """A box in displayed pixels, of even sides, and why."""

    left: int
    top: int
    width: int
    height: int
    reason: str = ""


def find_crop(samples: np.ndarray, settings: CropConfig) -> Crop:
    """samples: uint8 (N, H, W, 3)."""
    return Crop(0, 0, samples.shape[2] // 2 * 2, samples.shape[1] // 2 * 2)

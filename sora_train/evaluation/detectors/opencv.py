"""OpenCV, which is imported here alone and when it is needed."""

from functools import cache
from typing import Any

import numpy as np

from sora_train.errors import UserError


@cache
def opencv() -> Any:
    """The module `cv2`, on one thread. Raises UserError where it is missing or of a version without cascades."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "scores of pictures need OpenCV; install it with `pip install 'sora_train[prep]'`, 'sora_train[eval]' or "
            "'sora_train[serve]'"
        ) from error
    if not cv2.__version__.startswith("4."):
        raise UserError(
            f"OpenCV {cv2.__version__} is installed, whose wheels have no cascades for faces; install 4.x with "
            "`pip install 'opencv-python-headless<5'`"
        )
    cv2.setNumThreads(1)
    return cv2


def grey_of(rgb: np.ndarray) -> np.ndarray:
    """Luma of BT.601, uint8 (H, W), of uint8 (H, W, 3) RGB."""
    cv2 = opencv()
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)


def limited(rgb: np.ndarray, longest: int) -> np.ndarray:
    """A picture (H, W, 3) or (H, W) whose longer side has at most this many pixels."""
    height, width = rgb.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return np.ascontiguousarray(rgb)
    cv2 = opencv()
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(np.ascontiguousarray(rgb), size, interpolation=cv2.INTER_AREA)

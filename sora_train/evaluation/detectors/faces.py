"""Faces: how many, and how large."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from sora_train.errors import UserError
from sora_train.evaluation.detectors.opencv import grey_of, limited, opencv

LARGEST = 640
"""Pixels of the longer side of a picture that is searched."""
SMALLEST = 1 / 12
"""Of the shorter side: smaller faces are not looked for."""
SAME_PLACE = 0.3
"""Share of their union that a face and the one after must have in common."""
NEIGHBOURS = 8
YUNET_CONFIDENCE = 0.8
Box = tuple[float, float, float, float]
"""Left, top, width, height, as shares of the picture's width and height."""
_ONE_AT_A_TIME = Lock()
"""OpenCV's detectors keep a state while they look, and a server asks from several threads."""


def faces(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], model: str, name: str = "score.face_model"
) -> dict[str, Any]:
    """Of pairs of pictures, uint8 (H, W, 3) RGB, a little apart in time; a still picture is a pair with itself.

    A face counts where both show it in about the same place, since cascades see faces in folds and leaves. `faces`:
    the most in one pair. `face_area`: the largest face's share of its picture, in [0, 1]. `model` is a YuNet file,
    or '' for the cascades of OpenCV's wheel. Raises UserError, which begins with `name`, for a file that is none.
    """
    count, area = 0, 0.0
    for pair in pairs:
        one, other = (boxes(picture, model, name) for picture in pair)
        seen = in_both(one, other)
        count = max(count, len(seen))
        area = max([area, *(box[2] * box[3] for box in seen)])
    return {"faces": count, "face_area": float(area)}


def boxes(rgb: np.ndarray, model: str, name: str) -> list[Box]:
    """Each face of one picture, false ones among them."""
    rgb = limited(rgb, LARGEST)
    height, width = rgb.shape[:2]
    with _ONE_AT_A_TIME:
        found = _by_yunet(rgb, model, name) if model else _by_cascade(rgb)
    return [(x / width, y / height, w / width, h / height) for x, y, w, h in found]


def in_both(one: Sequence[Box], other: Sequence[Box]) -> list[Box]:
    """The faces of one picture that another one has in about the same place."""
    return [box for box in one if any(_in_common(box, later) >= SAME_PLACE for later in other)]


def _by_cascade(rgb: np.ndarray) -> list[list[float]]:
    smallest = max(20, round(min(rgb.shape[:2]) * SMALLEST))
    found = _cascade().detectMultiScale(
        opencv().equalizeHist(grey_of(rgb)),
        scaleFactor=1.1,
        minNeighbors=NEIGHBOURS,
        minSize=(smallest, smallest),
    )
    return [[float(side) for side in box] for box in found]


def _by_yunet(rgb: np.ndarray, model: str, name: str) -> list[list[float]]:
    detector = _yunet(model, name)
    detector.setInputSize((rgb.shape[1], rgb.shape[0]))
    found = detector.detect(np.ascontiguousarray(rgb[:, :, ::-1]))[1]
    return [] if found is None else [[float(side) for side in box[:4]] for box in found]


def _in_common(one: Sequence[float], other: Sequence[float]) -> float:
    """The intersection of two boxes over their union."""
    across, down = (
        min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)
    )
    shared = max(0.0, across) * max(0.0, down)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


@cache
def _cascade() -> Any:
    cv2 = opencv()
    return cv2.CascadeClassifier(
        str(Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml")
    )


@cache
def _yunet(model: str, name: str) -> Any:
    cv2 = opencv()
    try:
        return cv2.FaceDetectorYN.create(model, "", (320, 320), YUNET_CONFIDENCE)
    except cv2.error as error:
        raise UserError(
            f"{name}={model} cannot be loaded: {error}; give an ONNX file of YuNet"
        ) from error

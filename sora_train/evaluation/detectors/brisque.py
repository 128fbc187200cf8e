"""Technical quality without a reference: BRISQUE, of the statistics of a picture's local contrast.

Mittal, Moorthy and Bovik, "No-reference image quality assessment in the spatial domain", 2012. The regression and the
ranges of its features are the files of the package `brisque`; the features follow the authors' release, which halves
the picture with a filter against aliasing.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sora_train.errors import Fault
from sora_train.evaluation.detectors.opencv import opencv

WINDOW, SIGMA = 7, 7 / 6
"""Of the Gaussian that local mean and contrast are taken with."""
SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))
"""Rows and columns to the neighbours that each value is multiplied with."""


def brisque(grey: np.ndarray) -> float:
    """The score of a picture, uint8 (H, W): about 0 to 100, lower is better. Noise, blur and coding raise it."""
    from libsvm.svmutil import svm_predict

    model, lows, highs = _model()
    scaled = 2 * (features(grey) - lows) / (highs - lows) - 1
    values, _, _ = svm_predict([], [scaled.tolist()], model, "-q")
    return float(values[0])


def features(grey: np.ndarray) -> np.ndarray:
    """The 36 features of a picture, uint8 (H, W), float64: 18 at its size and 18 at half of it."""
    half = max(1, (grey.shape[1] + 1) // 2), max(1, (grey.shape[0] + 1) // 2)
    # Pillow's takes the mean over what it leaves out, as MATLAB's does and OpenCV's cubic does not.
    halved = Image.fromarray(grey.astype(np.float32)).resize(half, Image.Resampling.BICUBIC)
    return np.concatenate(
        [_of_one_size(values) for values in (grey.astype(np.float32), np.asarray(halved))]
    )


def _of_one_size(values: np.ndarray) -> np.ndarray:
    """Shape and variance of the normalised values; shape, mean, left and right variance of each neighbours' product."""
    normal = normalised(values)
    found = [_symmetric_shape(normal), float((normal**2).mean())]
    for shift in SHIFTS:
        found += _asymmetric(normal * np.roll(normal, shift, (0, 1)))
    return np.array(found)


def normalised(values: np.ndarray) -> np.ndarray:
    """Each value less its surroundings' mean, by their deviation: float64 (H, W) of values in 0..255."""
    cv2 = opencv()
    size, values = (WINDOW, WINDOW), values.astype(np.float64)
    # Zeros beyond the picture, as in the release.
    edge = {"borderType": cv2.BORDER_CONSTANT}
    mean = cv2.GaussianBlur(values, size, SIGMA, **edge)
    square = cv2.GaussianBlur(values * values, size, SIGMA, **edge)
    return (values - mean) / (np.sqrt(np.abs(square - mean * mean)) + 1)


def _symmetric_shape(values: np.ndarray) -> float:
    """The shape of a generalised Gaussian, by its moments."""
    shapes, ratios = _shapes()
    mean = float(np.abs(values).mean())
    ratio = mean**2 / float((values**2).mean()) if mean else 1.0
    return float(shapes[np.argmin(np.abs(1 / ratio - 1 / ratios))])


def _asymmetric(values: np.ndarray) -> list[float]:
    """Shape, mean, and variances left and right of zero, of an asymmetric generalised Gaussian, by its moments."""
    shapes, ratios = _shapes()
    square, is_left = values**2, values < 0
    left, right = (
        math.sqrt(float(square[side].mean())) if side.any() else 0.0
        for side in (is_left, values > 0)
    )
    mean = float(np.abs(values).mean())
    skew = left / right if right else 1.0
    ratio = mean**2 / float(square.mean()) if mean else 1.0
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = float(shapes[np.argmin((ratios - ratio) ** 2)])
    one, two, three = (math.gamma(n / shape) for n in (1, 2, 3))
    return [shape, (right - left) * two / one * math.sqrt(one / three), left**2, right**2]


@cache
def _shapes() -> tuple[np.ndarray, np.ndarray]:
    """The shapes that are tried, and of each (mean of the absolute)^2 / mean of the square."""
    shapes = np.arange(0.2, 10.0005, 0.001)
    ratios = [math.gamma(2 / a) ** 2 / (math.gamma(1 / a) * math.gamma(3 / a)) for a in shapes]
    return shapes, np.array(ratios)


class _Numbers(pickle.Unpickler):
    """Reads lists and numbers, and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise Fault(
            f"the file of BRISQUE's ranges asks for {module}.{name}; install the package `brisque` anew"
        )


@cache
def _model() -> tuple[Any, np.ndarray, np.ndarray]:
    """The regression, and the lowest and highest value of each feature, (36,)."""
    from libsvm.svmutil import svm_load_model

    # Importing the package would import its readers of pictures and addresses.
    found = importlib.util.find_spec("brisque")
    assert found is not None and found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "models"
    with (folder / "normalize.pickle").open("rb") as file:
        ranges = _Numbers(file).load()
    model = svm_load_model(str(folder / "svm.txt"))
    return model, *(np.array(ranges[name], np.float64) for name in ("min_", "max_"))

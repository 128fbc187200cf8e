"""The things in a frame of the shapes world, each by itself: two of one colour are two."""

from dataclasses import dataclass

import numpy as np

from sora_train.data.shapes.oracle import MIN_AREA, MIN_SHARE, hues
from sora_train.data.shapes.world import PALETTE


@dataclass(frozen=True)
class Blob:
    """Pixels of one colour that hang together; area and centre in fractions of the frame."""

    colour: str
    area: float
    x: float
    y: float


def blobs(clip: np.ndarray) -> list[list[Blob]]:
    """Those of each frame of uint8 (F, H, W, 3), the largest first; crumbs are left out as the oracle does."""
    hue_FHW, is_thing_FHW = hues(clip.astype(np.float32), PALETTE)
    frames = []
    for hue_HW, is_thing_HW in zip(hue_FHW, is_thing_FHW, strict=True):
        found = [
            blob
            for number, colour in enumerate(PALETTE)
            for blob in _of_colour(is_thing_HW & (hue_HW == number), colour)
        ]
        found.sort(key=lambda blob: -blob.area)
        frames.append([blob for blob in found if blob.area >= MIN_SHARE * found[0].area])
    return frames


def largest(blobs_of_frame: list[Blob], colour: str) -> Blob | None:
    return next((blob for blob in blobs_of_frame if blob.colour == colour), None)


def _of_colour(mask_HW: np.ndarray, colour: str) -> list[Blob]:
    height, width = mask_HW.shape
    found = []
    for rows, columns in _parts(mask_HW):
        area = len(rows) / mask_HW.size
        if area >= MIN_AREA:
            x, y = (columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height
            found.append(Blob(colour, area, float(x), float(y)))
    return found


def _parts(mask_HW: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of each set of pixels that touch, at corners too."""
    waiting = set(zip(*np.nonzero(mask_HW), strict=True))
    parts = []
    while waiting:
        edge, part = [waiting.pop()], []
        while edge:
            row, column = edge.pop()
            part.append((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & waiting
            waiting -= near
            edge += near
        rows, columns = np.array(part).T
        parts.append((rows, columns))
    return parts

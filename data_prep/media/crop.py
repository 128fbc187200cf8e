"""What of a clip's picture is of use: without bars at its edges, and without a logo in a corner if little is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from pydantic import Field

from sora_train.config.sections.base import Section

BAR_LEVELS = 5.0
"""Mean difference in levels of 255 between a line of a bar and the bar's colour, which coding leaves."""
EDGE_LEVELS = 10.0
"""The same of the picture's first lines: in the dark, a picture goes into black without such an edge."""
BLACK = 24
"""Levels up to which a colour is black: a bar of another has its like on the other side."""
WIDEST_BAR = 0.4
CORNER = 0.3
"""Share of the height and width in which a logo stands."""
LOGO_EDGE = 14.0
"""Change of brightness from pixel to pixel, in levels of 255, that a logo's outline keeps in all samples."""
SAMENESS = 0.85
"""The length of the mean gradient against the mean length: 1 where it stands still, about 0 where things pass."""
MOVING_LEVELS = 10
"""Change of brightness over the samples in levels of 255 from which on a pixel moves."""
LEAST_MOVING = 0.5
"""Share of the picture, and of what is around a logo, that has to move; in a still scene all looks like a logo."""
LOGO_MARGIN = 3
MIN_SAMPLES = 4
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are the first pixels outside."""


class CropConfig(Section):
    """`clip.crop:`"""

    bars: bool = True
    """Cut off bars of one colour above and below (letterbox) or at the sides (pillarbox)."""
    watermarks: bool = True
    """Cut off a strip with a logo that stands still in a corner while the picture moves."""
    min_area: float = Field(0.85, gt=0, le=1)
    """Share of the picture within the bars that has to be left; a logo that takes more stays."""


@dataclass(frozen=True)
class Crop:
    """Pixels of the displayed picture, sizes even; `reason` holds letterbox, pillarbox and watermark, or nothing."""

    left: int
    top: int
    width: int
    height: int
    reason: str


def find_crop(samples: np.ndarray, settings: CropConfig) -> Crop:
    """The part of the picture to keep, by uint8 (N, H, W, 3) RGB of frames spread over a clip."""
    _, height, width, _ = samples.shape
    box, reasons = (0, 0, width, height), list[str]()
    if settings.bars:
        box, reasons = _without_bars(samples)
    if settings.watermarks and len(samples) >= MIN_SAMPLES:
        left, top, right, bottom = box
        inside = _without_logos(samples[:, top:bottom, left:right], settings.min_area)
        if inside is not None:
            box = left + inside[0], top + inside[1], left + inside[2], top + inside[3]
            reasons.append("watermark")
    left, top, right, bottom = box
    return Crop(left, top, (right - left) // 2 * 2, (bottom - top) // 2 * 2, " ".join(reasons))


# -- bars ----------------------------------------------------------------------------------------------


def _without_bars(samples: np.ndarray) -> tuple[Box, list[str]]:
    _, height, width, _ = samples.shape
    top, bottom = _both_bars(samples)
    # Within the rows that are left, so that bars on all four sides are found.
    rows = samples[:, top : height - bottom].swapaxes(1, 2)
    left, right = _both_bars(rows)
    reasons = ["letterbox"] * bool(top or bottom) + ["pillarbox"] * bool(left or right)
    return (left, top, width - right, height - bottom), reasons


def _both_bars(samples: np.ndarray) -> tuple[int, int]:
    """Lines of the bars before and behind the picture along the second axis of (N, lines, across, 3)."""
    (first, first_colour), (second, second_colour) = _bar(samples), _bar(samples[:, ::-1])
    alike = np.abs(first_colour - second_colour).max() <= 2 * BAR_LEVELS
    if first and second and alike and abs(first - second) <= max(4, 0.25 * max(first, second)):
        return first, second
    return (
        first if first_colour.max() <= BLACK else 0,
        second if second_colour.max() <= BLACK else 0,
    )


def _bar(samples: np.ndarray) -> tuple[int, np.ndarray]:
    """How many of the first lines are a bar, and its colour; 0 where no sharp edge ends them."""
    most = int(samples.shape[1] * WIDEST_BAR)
    colour = np.median(samples[:, 0].reshape(-1, 3), axis=0)
    lines = samples[:, : int(samples.shape[1] * (WIDEST_BAR + 0.1))]
    away = np.zeros(lines.shape[1])
    for sample in lines:
        differs = np.abs(sample.astype(np.int16) - colour.astype(np.int16)).max(axis=2)
        away = np.maximum(away, differs.mean(axis=1))
    beyond = np.flatnonzero(away > BAR_LEVELS)
    if not len(beyond) or not 0 < beyond[0] <= most:
        return 0, colour
    end = int(beyond[0])
    # Coding and scaling smear an edge over some lines.
    smear = max(2, samples.shape[1] // 180)
    inside = away[end + 2 * smear : end + 5 * smear]
    picture = float(np.median(inside)) if len(inside) else 0.0
    edge = end + int(np.argmax(away[end:] >= 0.6 * picture))
    is_sharp = away[edge] - away[max(0, edge - smear)] >= 0.4 * picture
    return (edge if is_sharp and picture >= EDGE_LEVELS else 0), colour


# -- logos ---------------------------------------------------------------------------------------------


def _without_logos(samples: np.ndarray, min_area: float) -> Box | None:
    """The largest box without the logos in its corners; None where there are none or too little would be left."""
    _, height, width, _ = samples.shape
    if min(height, width) < 32:
        return None
    logos = list(_logos(*_standing_and_moving(samples)))
    boxes = [_cut_off(logos, ways, height, width) for ways in product((0, 1), repeat=len(logos))]
    box = max(boxes, key=_area)
    return box if logos and _area(box) >= min_area * height * width else None


def _standing_and_moving(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool (H, W) twice: outlines of brightness that are the same in all samples; pixels that change over them."""
    shape = samples.shape[1:3]
    total_x, total_y = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    lengths = np.zeros(shape, np.float32)
    darkest, brightest = np.full(shape, 255, np.float32), np.zeros(shape, np.float32)
    for sample in samples:
        brightness = sample.mean(axis=2, dtype=np.float32)
        down, across = np.gradient(brightness)
        total_x += across
        total_y += down
        lengths += np.hypot(across, down)
        np.minimum(darkest, brightness, out=darkest)
        np.maximum(brightest, brightness, out=brightest)
    mean = np.hypot(total_x, total_y)
    standing = (mean >= LOGO_EDGE * len(samples)) & (mean >= SAMENESS * lengths)
    # What bars leave at the edges stands still too.
    inner = np.zeros(shape, bool)
    inner[LOGO_MARGIN:-LOGO_MARGIN, LOGO_MARGIN:-LOGO_MARGIN] = True
    # An outline is a line: a pixel with fewer than two others around it is a chance.
    near = np.lib.stride_tricks.sliding_window_view(np.pad(standing, 1), (3, 3)).sum(axis=(2, 3))
    return standing & inner & (near >= 3), brightest - darkest >= MOVING_LEVELS


def _logos(standing: np.ndarray, moving: np.ndarray) -> Iterator[tuple[Box, bool, bool]]:
    """(box, is it on the right, is it below) of what stands still in each corner while all around it moves."""
    height, width = standing.shape
    rows, columns = round(CORNER * height), round(CORNER * width)
    if moving.mean() < LEAST_MOVING:
        return
    for is_below, is_right in product((False, True), repeat=2):
        y, x = np.nonzero(standing[_corner(is_below, is_right, rows, columns)])
        if len(y) < max(12, 1e-4 * standing.size):
            continue
        y, x = y + (height - rows) * is_below, x + (width - columns) * is_right
        left, top, right, bottom = int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
        # An outline that reaches out of the corner is no logo's.
        is_inside = (top > height - rows if is_below else bottom < rows) and (
            left > width - columns if is_right else right < columns
        )
        around = np.zeros_like(moving)
        side = max(8, min(bottom - top, right - left) // 2)
        around[max(0, top - side) : bottom + side, max(0, left - side) : right + side] = True
        around[
            top - LOGO_MARGIN : bottom + LOGO_MARGIN, left - LOGO_MARGIN : right + LOGO_MARGIN
        ] = False
        if is_inside and moving[around].mean() >= LEAST_MOVING:
            yield (left, top, right, bottom), is_right, is_below


def _corner(is_below: bool, is_right: bool, rows: int, columns: int) -> tuple[slice, slice]:
    return (
        slice(-rows, None) if is_below else slice(0, rows),
        slice(-columns, None) if is_right else slice(0, columns),
    )


def _cut_off(
    logos: Sequence[tuple[Box, bool, bool]], ways: Sequence[int], height: int, width: int
) -> Box:
    """What is left when each logo goes with its columns (way 0) or with its rows (way 1)."""
    left, top, right, bottom = 0, 0, width, height
    for (box, is_right, is_below), way in zip(logos, ways, strict=True):
        if way == 0 and is_right:
            right = min(right, box[0] - LOGO_MARGIN)
        elif way == 0:
            left = max(left, box[2] + LOGO_MARGIN)
        elif is_below:
            bottom = min(bottom, box[1] - LOGO_MARGIN)
        else:
            top = max(top, box[3] + LOGO_MARGIN)
    return left, top, right, bottom


def _area(box: Box) -> int:
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])

"""The oracle: reads colour, shape and motion off a clip, so that text alignment is measured.

No training and no randomness. A thing is found by its hue, which no background has; its soft mask
is the projection of the pixels on the line from the background's colour to its own; the shape is
the template, drawn by the world's own distance functions, that the masks of all frames correlate
with best; the motion is the strongest of a few fits over time, measured against the background,
whose own shift is estimated from the pixels outside the things.

Dimension key, used as suffixes of array names in this file:
  T frames    H, W rows, columns    Y, X bands of rows, columns of the background
  S shapes    A template angles    P pixels of a template
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sora_train.data.shapes.scene import Prompt
from sora_train.data.shapes.world import (
    COLOURS,
    GROW_FROM,
    MOTIONS,
    SHAPES,
    SYMMETRY,
    TRAVEL,
    TURN,
    distance,
)
from sora_train.errors import UserError

CHANCE: dict[str, float] = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "motion": 1 / len(MOTIONS),
}

MIN_CHROMA = 55.0  # 8-bit levels between a thing and the background; a dim shaded thing has 65
MIN_PIXELS = 10.0
MIN_AREA = 0.006  # of the frame; the smallest thing of the world has three times as much
MIN_SHARE = 0.2  # of the largest thing's area; what is less is fringe
SOLID = (0.2, 0.8)  # the part of the soft mask's range that is stretched to 0..1
MOVED = 0.45  # the part of a full motion that counts as having moved
TEMPLATE_SIDE = 26
TEMPLATE_REACH = 1.75  # half the template's side, in radii of the disc of the same area
TEMPLATE_BLURS = (0.08, 0.2, 0.34)  # in the same radii
TEMPLATE_SCALES = (0.92, 1.0, 1.08)  # blur fills holes and notches, which makes the area misleading
ANGLE_STEP = math.radians(6)
MAX_TURN = math.radians(180)
MIN_TURN_GAIN = 0.004  # of correlation, that a turning template must win over a fixed one
MIN_TEXTURE = 12.0  # variance over time, squared 8-bit levels, before a pan is looked for
PAN_RESIDUE = 0.5  # the part of that variance that may be left once the pan is undone
MIN_PAN = 0.12  # of the width
BANDS = 10


@dataclass(frozen=True)
class Reading:
    """What the oracle saw of one thing.

    `area` is its mean area and `x`, `y` its mean centre, in fractions of the frame; `camera` is
    the clip's; `match` is the correlation with the template of `shape`, 1 when it fits exactly.
    """

    shape: str
    colour: str
    motion: str
    area: float
    x: float
    y: float
    camera: str
    match: float


Palette = Mapping[str, tuple[int, int, int]]
"""The colours that a thing may have, by name."""


def read(clip: np.ndarray, palette: Palette = COLOURS) -> list[Reading]:
    """All things seen in `clip`, uint8 (T, H, W, 3) RGB, the largest first, each of the nearest colour of `palette`.

    Two things of one colour are seen as one; the world never makes them. Raises UserError when
    the array is not a clip.
    """
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8:
        raise UserError(f"clip is {clip.dtype} {clip.shape}: give uint8 (frames, height, width, 3)")
    pixels = clip.astype(np.float32)
    hue_THW, is_thing_THW = hues(pixels, palette)
    seeds = []
    for index, colour in enumerate(palette):
        seed_THW = is_thing_THW & (hue_THW == index)
        counts_T = seed_THW.sum(axis=(1, 2))
        area = float(counts_T.mean() / seed_THW[0].size)
        if area >= MIN_AREA and counts_T.mean() >= MIN_PIXELS:
            seeds.append((area, colour, seed_THW))
    seeds.sort(key=lambda seed: -seed[0])
    seeds = [seed for seed in seeds if seed[0] >= MIN_SHARE * seeds[0][0]]
    if not seeds:
        return []
    free_THW = ~_grown(is_thing_THW, 2)
    pan = _background_shift(pixels @ np.full(3, 1 / 3, np.float32), free_THW)
    readings = []
    for _, colour, seed_THW in seeds:
        others_THW = is_thing_THW & ~seed_THW
        mask_THW = _soft_mask(pixels, seed_THW, others_THW, free_THW)
        reading = _read_thing(mask_THW, colour, pan)
        if reading is not None:
            readings.append(reading)
    return sorted(readings, key=lambda reading: -reading.area)


def score(
    clips: Sequence[np.ndarray], prompts: Sequence[Prompt], palette: Palette = COLOURS
) -> dict[str, float]:
    """Fractions in [0, 1] of clips whose largest thing has its prompt's colour, shape and motion.

    A clip where nothing is seen is wrong in all three. Raises UserError unless there is one clip
    for every prompt and at least one of them.
    """
    if len(clips) != len(prompts) or not clips:
        raise UserError(f"score got {len(clips)} clips for {len(prompts)} prompts: give one each")
    hits = dict.fromkeys(CHANCE, 0)
    for clip, prompt in zip(clips, prompts, strict=True):
        readings = read(clip, palette)
        for factor in hits:
            hits[factor] += bool(readings) and (
                getattr(readings[0], factor) == getattr(prompt, factor)
            )
    return {factor: count / len(clips) for factor, count in hits.items()}


def _opponent(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) to the complex plane of hue (angle, red at 0) and chroma (length, 8-bit levels)."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return (red - (green + blue) / 2) + 1j * (math.sqrt(0.75) * (green - blue))


def hues(pixels: np.ndarray, palette: Palette) -> tuple[np.ndarray, np.ndarray]:
    """Nearest palette colour of each pixel, and whether it is coloured enough to be a thing.

    The background's own tint is taken off first, which keeps a thing's hue up to its soft edge.
    """
    plane_THW = _opponent(pixels)
    pale = plane_THW[np.abs(plane_THW) < MIN_CHROMA]
    if pale.size:
        plane_THW = plane_THW - (np.median(pale.real) + 1j * np.median(pale.imag))
    hues = _opponent(np.asarray(list(palette.values()), np.float32))
    hues /= np.abs(hues)
    nearness = np.stack([(plane_THW * np.conj(hue)).real for hue in hues])
    return nearness.argmax(axis=0), np.abs(plane_THW) >= MIN_CHROMA


def _grown(mask_THW: np.ndarray, steps: int) -> np.ndarray:
    """The mask with `steps` more pixels on every side."""
    grown = mask_THW.copy()
    for _ in range(steps):
        for axis in (1, 2):
            wide = grown.copy()
            ahead, behind = [slice(None)] * 3, [slice(None)] * 3
            ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
            wide[tuple(ahead)] |= grown[tuple(behind)]
            wide[tuple(behind)] |= grown[tuple(ahead)]
            grown = wide
    return grown


def _soft_mask(
    pixels: np.ndarray, seed_THW: np.ndarray, others_THW: np.ndarray, outside_THW: np.ndarray
) -> np.ndarray:
    """How much of each pixel is the thing, in [0, 1]: float32 (T, H, W).

    The projection uses brightness as well as hue, since video keeps the hue at half the
    resolution only. The background's colour is taken row by row, where it may have a gradient.
    """
    own = np.median(pixels[seed_THW], axis=0)
    free_THW = outside_THW.astype(np.float32)
    free_H = free_THW.sum(axis=(0, 2))
    sum_HC = np.einsum("thwc,thw->hc", pixels, free_THW)
    base = sum_HC.sum(axis=0) / max(float(free_H.sum()), 1.0)
    ground_HC = np.where(free_H[:, None] >= 8, sum_HC / np.maximum(free_H[:, None], 1), base)
    way_HC = own - ground_HC
    way_HC = (way_HC / np.maximum((way_HC**2).sum(axis=1, keepdims=True), 1)).astype(np.float32)
    soft_THW = np.einsum("thwc,hc->thw", pixels, way_HC)
    soft_THW -= (ground_HC * way_HC).sum(axis=1)[:, None]
    soft_THW[others_THW | ~_near(seed_THW)] = 0
    return _solid(soft_THW)


def _solid(soft: np.ndarray) -> np.ndarray:
    """The soft mask with texture and noise cut off below and shading cut off above."""
    return np.clip((soft - SOLID[0]) / (SOLID[1] - SOLID[0]), 0, 1)


def _near(seed_THW: np.ndarray) -> np.ndarray:
    """The box around the body of the seed in each frame, a few pixels wider.

    Rows and columns with next to no seed are left out, so that a stray pixel does not stretch it.
    """
    boxes = np.zeros_like(seed_THW)
    for frame in np.flatnonzero(seed_THW.any(axis=(1, 2))):
        spans = []
        for axis in (1, 0):
            profile = seed_THW[frame].sum(axis=axis)
            solid = np.flatnonzero(profile >= max(1.0, 0.12 * profile.max()))
            spans.append(slice(max(solid[0] - 3, 0), solid[-1] + 4))
        boxes[frame][tuple(spans)] = True
    return boxes


def _read_thing(mask_THW: np.ndarray, colour: str, pan: float) -> Reading | None:
    """Shape and motion of one thing from its soft masks; None when it is gone in most frames."""
    num_frames, height, width = mask_THW.shape
    area_T = mask_THW.sum(axis=(1, 2))
    seen_T = area_T >= 0.15 * area_T.max()
    if area_T.max() < MIN_PIXELS or seen_T.mean() < 0.5:
        return None
    time_T = np.arange(num_frames) / max(num_frames - 1, 1)
    mask_THW, area_T, time_T = mask_THW[seen_T], area_T[seen_T], time_T[seen_T]
    x_T = (mask_THW.sum(axis=1) * (np.arange(width) + 0.5)).sum(axis=1) / area_T
    y_T = (mask_THW.sum(axis=2) * (np.arange(height) + 0.5)).sum(axis=1) / area_T
    shape, match, matches_TA = _fit_shape(_normalised(mask_THW, x_T, y_T, area_T), area_T)
    turn = _turn(matches_TA, time_T, area_T) if shape in SYMMETRY else 0.0
    motion = "still"
    if num_frames > 1:
        motion = _fit_motion(time_T, x_T / width, y_T / height, area_T, turn, pan)
    return Reading(
        shape=shape,
        colour=colour,
        motion=motion,
        area=float(area_T.mean() / (height * width)),
        x=float(x_T.mean() / width),
        y=float(y_T.mean() / height),
        camera=_camera(pan),
        match=match,
    )


def _camera(shift: float) -> str:
    """The background goes the other way than the camera."""
    if shift == 0:
        return "static"
    return "pan_right" if shift < 0 else "pan_left"


@functools.cache
def _templates() -> dict[str, np.ndarray]:
    """For each shape (scales and blurs, angles, P): pictures of zero mean and unit length.

    A picture goes through what a mask goes through: blur, then the stretch of its solid part. At
    scale 1 its area is then that of the unit disc, as the masks' is.
    """
    pictures = {}
    for shape in SHAPES:
        angles = np.arange(round(SYMMETRY.get(shape, ANGLE_STEP) / ANGLE_STEP)) * ANGLE_STEP
        versions = []
        for blur in TEMPLATE_BLURS:
            radius = 1.0
            for _ in range(3):
                area = _picture(shape, 0.0, radius, blur).mean() * (2 * TEMPLATE_REACH) ** 2
                radius *= math.sqrt(math.pi / area)
            versions += [
                [_picture(shape, angle, radius * scale, blur) for angle in angles]
                for scale in TEMPLATE_SCALES
            ]
        flat = np.stack(versions).reshape(len(versions), len(angles), -1)
        flat = flat - flat.mean(axis=-1, keepdims=True)
        pictures[shape] = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    return pictures


def _picture(shape: str, angle: float, radius: float, blur: float) -> np.ndarray:
    """One template: float64 (TEMPLATE_SIDE, TEMPLATE_SIDE) in [0, 1]."""
    side = TEMPLATE_SIDE * 2
    grid = ((np.arange(side) + 0.5) / side * 2 - 1) * TEMPLATE_REACH
    x, y = np.meshgrid(grid / radius, grid / radius)
    cos, sin = math.cos(angle), math.sin(angle)
    outline = distance(shape, cos * x + sin * y, cos * y - sin * x)
    sharp = np.clip(0.5 - outline * radius * side / (2 * TEMPLATE_REACH), 0, 1)
    spread = np.exp(-((grid[:, None] - grid) ** 2) / (2 * blur**2))
    spread /= spread.sum(axis=1, keepdims=True)
    soft = _solid(spread @ sharp @ spread.T)
    return soft.reshape(TEMPLATE_SIDE, 2, TEMPLATE_SIDE, 2).mean(axis=(1, 3))


def _normalised(
    mask_THW: np.ndarray, x_T: np.ndarray, y_T: np.ndarray, area_T: np.ndarray
) -> np.ndarray:
    """Each mask, centred and scaled to area pi, on the templates' grid: (T, P), unit length."""
    num_frames, height, width = mask_THW.shape
    grid = ((np.arange(TEMPLATE_SIDE) + 0.5) / TEMPLATE_SIDE * 2 - 1) * TEMPLATE_REACH
    # Two rows of nothing around the frame, so that what lies outside it reads as empty.
    padded = np.pad(mask_THW, ((0, 0), (2, 2), (2, 2)))
    radius_T = np.sqrt(area_T / math.pi)
    x_TX = np.clip(x_T[:, None] + radius_T[:, None] * grid + 1.5, 0, width + 2.99)
    y_TY = np.clip(y_T[:, None] + radius_T[:, None] * grid + 1.5, 0, height + 2.99)
    left_TX, top_TY = x_TX.astype(int), y_TY.astype(int)
    u, v = (x_TX - left_TX)[:, None, :], (y_TY - top_TY)[:, :, None]
    frame, row, column = np.arange(num_frames)[:, None, None], top_TY[:, :, None], left_TX[:, None]
    upper = padded[frame, row, column] * (1 - u) + padded[frame, row, column + 1] * u
    lower = padded[frame, row + 1, column] * (1 - u) + padded[frame, row + 1, column + 1] * u
    flat = (upper * (1 - v) + lower * v).reshape(num_frames, -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _fit_shape(flat_TP: np.ndarray, area_T: np.ndarray) -> tuple[str, float, np.ndarray]:
    """The shape that correlates best over the clip, how well, and its matches by angle (T, A)."""
    weight_T = area_T / area_T.sum()
    best = ("", -1.0, np.zeros((len(flat_TP), 1)))
    for shape, pictures in _templates().items():
        for picture_AP in pictures:
            matches_TA = flat_TP @ picture_AP.T
            match = float(weight_T @ matches_TA.max(axis=1))
            if match > best[1]:
                best = (shape, match, matches_TA)
    return best


def _turn(matches_TA: np.ndarray, time_T: np.ndarray, area_T: np.ndarray) -> float:
    """Radians the thing turned over the clip: the even turn whose templates match all frames best.

    One fit over all frames cannot slip by a symmetry of the shape at a single bad frame.
    """
    num_angles = matches_TA.shape[1]
    weight_T = area_T / area_T.sum()
    turns = np.arange(-MAX_TURN, MAX_TURN + ANGLE_STEP / 2, ANGLE_STEP)
    start_A = np.arange(num_angles)
    frame = np.arange(len(time_T))[:, None]

    def best(turn: float) -> float:
        bins_TA = start_A + (turn / ANGLE_STEP * time_T)[:, None]
        low = np.floor(bins_TA).astype(int)
        part = bins_TA - low
        here = matches_TA[frame, low % num_angles] * (1 - part)
        return float((weight_T @ (here + matches_TA[frame, (low + 1) % num_angles] * part)).max())

    gains = np.array([best(turn) for turn in turns])
    turn = float(turns[gains.argmax()])
    return turn if gains.max() - best(0.0) > MIN_TURN_GAIN else 0.0


def _fit_motion(
    time_T: np.ndarray,
    x_T: np.ndarray,
    y_T: np.ndarray,
    area_T: np.ndarray,
    turn: float,
    pan: float,
) -> str:
    """The motion that shows most, each in parts of the full motion the world would draw."""
    arch_T = np.sin(np.pi * time_T)
    ones_T = np.ones_like(time_T)
    (_, drift_x), *_ = np.linalg.lstsq(
        np.stack([ones_T, time_T], 1), x_T - pan * time_T, rcond=None
    )
    (_, drift_y, arch), *_ = np.linalg.lstsq(np.stack([ones_T, time_T, arch_T], 1), y_T, rcond=None)
    (start, gain), *_ = np.linalg.lstsq(np.stack([ones_T, time_T], 1), np.sqrt(area_T), rcond=None)
    growth = math.log(max(start + gain, 1e-3) / max(start, 1e-3))
    evidence = {
        "left": -drift_x / TRAVEL[0],
        "right": drift_x / TRAVEL[0],
        "up": -drift_y / TRAVEL[0],
        "down": drift_y / TRAVEL[0],
        "bounce": abs(arch) / TRAVEL[0],
        "grow": growth / -math.log(GROW_FROM),
        "rotate": abs(turn) / TURN,
    }
    motion = max(evidence, key=lambda name: evidence[name])
    return motion if evidence[motion] >= MOVED else "still"


def _background_shift(luma_THW: np.ndarray, free_THW: np.ndarray) -> float:
    """How far the background moves sideways over the clip, in fractions of the width; 0 if still.

    The even shift that, once undone, leaves the least variance over time. All frames take part,
    so a periodic texture cannot pass for one shifted by a period.
    """
    num_frames, height, width = luma_THW.shape
    if num_frames == 1:
        return 0.0
    edges = np.linspace(0, height, BANDS + 1).astype(int)[:-1]
    weight_TYX = np.add.reduceat(free_THW.astype(np.float32), edges, axis=1)
    total_TYX = np.add.reduceat(luma_THW * free_THW, edges, axis=1)
    luma_TYX = total_TYX / np.maximum(weight_TYX, 1)
    time_T = np.arange(num_frames) / (num_frames - 1)

    def residue(shift: float) -> float:
        place_TX = np.arange(width) + (shift * time_T)[:, None]
        inside = (place_TX >= 0) & (place_TX <= width - 1)
        low = np.clip(np.floor(place_TX).astype(int), 0, width - 2)
        part = np.clip(place_TX - low, 0, 1)[:, None, :]
        take = np.repeat(low[:, None, :], BANDS, axis=1)
        low_w = np.take_along_axis(weight_TYX, take, axis=2)
        high_w = np.take_along_axis(weight_TYX, take + 1, axis=2)
        value = np.take_along_axis(luma_TYX, take, axis=2) * (1 - part)
        value = value + np.take_along_axis(luma_TYX, take + 1, axis=2) * part
        weight = np.minimum(low_w, high_w) * inside[:, None, :]
        count = weight.sum(axis=0)
        mean = (weight * value).sum(axis=0) / np.maximum(count, 1e-6)
        free = float(count.sum() - (weight.max(axis=0)).sum())
        return float((weight * (value - mean) ** 2).sum()) / max(free, 1.0)

    still = residue(0.0)
    if still < MIN_TEXTURE:
        return 0.0
    shifts = np.arange(-0.5 * width, 0.5 * width + 0.5)
    residues = [residue(float(shift)) for shift in shifts]
    best = int(np.argmin(residues))
    shift = float(shifts[best]) / width
    return shift if residues[best] < PAN_RESIDUE * still and abs(shift) >= MIN_PAN else 0.0

"""What a clip tells without any network: flicker, motion, drift, seams, and how well it keeps what it was given.

A clip is uint8 (F, H, W, 3); a level is one step of its 256. Everything is a plain float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from sora_train.evaluation.quality import psnr

LEVELS = 255.0
DARK = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness (Rec. 601)."""


def changes(clip: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean absolute difference of each frame to the one before, (F - 1,) levels; of rows by `axis` 1, columns by 2."""
    parts = np.moveaxis(clip, axis, 0)
    pairs = zip(parts[:-1], parts[1:], strict=True)
    return np.array([np.abs(a.astype(np.int16) - b).mean() for a, b in pairs], np.float64)


def flicker(clip: np.ndarray) -> float:
    """VBench's `temporal_flickering`: 1 less the mean change from frame to frame over 255. A still clip has 1."""
    return 1 - _mean(changes(clip)) / LEVELS


def motion_energy(clip: np.ndarray, fps: float) -> float:
    """Levels a second by which a pixel changes, in the mean; a frozen clip has 0."""
    return _mean(changes(clip)) * fps


def smoothness(clip: np.ndarray) -> float:
    """1 less the mean error, over 255, of taking each inner frame for the mean of its two neighbours.

    VBench's `motion_smoothness` with that mean in place of its interpolating network.
    """
    triples = zip(clip[:-2], clip[1:-1], clip[2:], strict=True)
    errors = [
        np.abs(b.astype(np.float32) - (a.astype(np.float32) + c) / 2).mean() for a, b, c in triples
    ]
    return 1 - _mean(np.array(errors, np.float64)) / LEVELS


# --- drift ---


def brightness(frame: np.ndarray) -> float:
    """Mean over all pixels and colours, in levels."""
    return float(frame.mean(dtype=np.float64))


def contrast(frame: np.ndarray) -> float:
    """Standard deviation of the grey picture, in levels."""
    return float(grey(frame).std(dtype=np.float64))


def saturation(frame: np.ndarray) -> float:
    """Mean difference of the strongest and the weakest colour of a pixel, in levels; grey has 0."""
    return float((frame.max(axis=-1) - frame.min(axis=-1)).mean(dtype=np.float64))


def sharpness(frame: np.ndarray) -> float:
    """Mean absolute difference of the grey picture from pixel to pixel, across and down, in levels."""
    picture = grey(frame)
    steps = [np.abs(np.diff(picture, axis=axis)) for axis in (0, 1) if picture.shape[axis] > 1]
    return float(np.mean([step.mean(dtype=np.float64) for step in steps])) if steps else 0.0


QUANTITIES: dict[str, Callable[[np.ndarray], float]] = {
    "mean": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "sharpness": sharpness,
}
"""What may drift, each a function of one frame."""


def drift(clip: np.ndarray, fps: float) -> dict[str, float]:
    """`drift_mean`, `drift_contrast`, `drift_saturation`, `drift_sharpness`: slopes in levels a second.

    Each is the slope of the least-squares line through the frames' values; a clip of one frame has 0.
    """
    return {
        f"drift_{name}": slope([of(frame) for frame in clip], fps)
        for name, of in QUANTITIES.items()
    }


def slope(values: Sequence[float], fps: float) -> float:
    """The slope a second of the least-squares line through values at an even rate."""
    times = np.arange(len(values)) / fps
    centred = times - times.mean()
    spread = float(centred @ centred)
    return float(centred @ np.asarray(values, np.float64)) / spread if spread else 0.0


# --- seams ---


def seam_ratio(clip: np.ndarray, seams: Sequence[int], axis: int = 0) -> float:
    """The worst seam's difference over the median of all differences that are no seam, or over one level if that is
    less.

    Args:
        seams: the first frame behind each border; rows of it for `axis` 1, columns for 2.
    """
    found = changes(clip, axis)
    wrong = [seam for seam in seams if not 0 < seam <= len(found)]
    if wrong or not seams:
        raise ValueError(f"seams {list(seams)} do not lie within 1 to {len(found)}")
    borders = np.array(sorted(set(seams))) - 1
    inner = np.delete(found, borders)
    return float(found[borders].max()) / max(1.0, float(np.median(inner)) if len(inner) else 0.0)


def loop_error(clip: np.ndarray) -> float:
    """The step from the last frame to the first one over the median step, or over one level if that is less.

    About 1 where the clip plays on from its end as it does inside.
    """
    return seam_ratio(np.concatenate([clip, clip[:1]]), [len(clip)])


# --- against what was given ---


def fidelity(made: np.ndarray, given: np.ndarray) -> float:
    """Decibels, PSNR, of frames against those that were given for them; 100 at most."""
    a, b = (
        torch.from_numpy(frames.astype(np.float32) / LEVELS * 2 - 1) for frames in (made, given)
    )
    return float(psnr(a[None], b[None])[0])


def edit_structure(source: np.ndarray, edited: np.ndarray) -> float:
    """How much of a clip's structure an edit keeps, 1 all, 0 none: the correlation of the strength of their edges.

    The mean over frames of Pearson's correlation of the grey pictures' gradient magnitudes; colours and brightness may
    change. Frames in which either has no edge are left out; without any other frame the result is 0.
    """
    found = [_correlation(_edges(a), _edges(b)) for a, b in zip(source, edited, strict=True)]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else 0.0


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / length if length > 1e-9 else None


def _edges(frame: np.ndarray) -> np.ndarray:
    """Gradient magnitudes inside the frame: those at its border, made of other differences, would look alike in all."""
    picture = grey(frame).astype(np.float64)
    return np.hypot(picture[2:, 1:-1] - picture[:-2, 1:-1], picture[1:-1, 2:] - picture[1:-1, :-2])


def grey(frame: np.ndarray) -> np.ndarray:
    """Brightness in levels, float32 (H, W)."""
    return frame.astype(np.float32) @ DARK


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0

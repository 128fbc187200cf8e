"""Which moments of a clip and which part of its frame a sample shows. Pure functions of keyed draws."""

from __future__ import annotations

import numpy as np

from sora_train.base.seeding import key_seed
from sora_train.data.sample import Bucket

TRANSFORM_VERSION = 1
"""Of how times, crop and size turn into pixels, resizing in `decode` included: raised when it gives other pixels."""
_KEY_RANGE = float(1 << 63)
# Of a frame: rates such as 23.976 against 24, or times rounded to milliseconds, must not cost a frame.
FRAME_TOLERANCE = 0.01


def uniform(seed: int, stream: str, *parts: int | str) -> float:
    """The keyed draw from [0, 1) that belongs to its arguments."""
    return min(key_seed(seed, stream, *parts) / _KEY_RANGE, 1 - 2**-53)


def sampled_frames(frames: np.ndarray, fps: np.ndarray, target_fps: float) -> np.ndarray:
    """How many frames clips have once sampled at `target_fps` (slower clips keep their own rate)."""
    rate = np.where(fps > 0, fps, 1.0)
    steps = (frames - 1) / rate * np.minimum(rate, target_fps)
    return np.floor(steps + FRAME_TOLERANCE).astype(np.int64) + 1


def window(
    frames: int, fps: float, bucket: Bucket, target_fps: float, u: float
) -> tuple[tuple[float, ...], float]:
    """Times (seconds after the first frame) of a bucket's frames in a clip, and their rate.

    The rate is min(target, the clip's own), so time always runs at its natural speed; a single
    frame has rate 0. The window starts on a frame of the clip, chosen by `u` in [0, 1).
    """
    rate = fps if fps > 0 else 1.0
    effective = min(target_fps, rate)
    steps = (bucket.frames - 1) / effective
    starts = int(np.floor(frames - 1 - steps * rate + FRAME_TOLERANCE)) + 1
    assert starts >= 1, f"a clip of {frames} frames at {fps} fps does not fill {bucket.name}"
    start = int(u * starts) / rate
    times = tuple(start + index / effective for index in range(bucket.frames))
    return times, (effective if bucket.frames > 1 else 0.0)


def crop_size(height: int, width: int, bucket: Bucket) -> tuple[float, float]:
    """Height and width of the largest part of a frame that has the bucket's aspect ratio."""
    scale = min(height / bucket.height, width / bucket.width)
    return bucket.height * scale, bucket.width * scale


def crop(
    height: int, width: int, bucket: Bucket, u_x: float, u_y: float
) -> tuple[float, float, float, float]:
    """The part of a frame to show: top, left, height, width in displayed pixels, not rounded.

    It lies in the middle half of where it could: subjects are rarely at the very edge.
    """
    crop_height, crop_width = crop_size(height, width, bucket)
    top = (height - crop_height) * (0.25 + 0.5 * u_y)
    left = (width - crop_width) * (0.25 + 0.5 * u_x)
    return top, left, crop_height, crop_width

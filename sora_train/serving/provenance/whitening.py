"""Pictures without what is large in them, so that the faint waves of a watermark weigh as much as the content.

Frames are looked at with a short side of at most SIDE pixels. Each is flattened: its local mean taken away, divided by
the local contrast. The mean of all flattened frames is what the mark is looked for in: what moves averages out of it,
the mark stands still. It is flattened once more, since edges that stand still are left in it.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import av
import numpy as np

from sora_train.errors import UserError

SIDE = 256
MAX_FRAMES = 240
"""More frames than this add little to the mean of flattened frames; of longer videos evenly spaced ones are used."""
_MEAN_RADIUS, _CONTRAST_RADIUS, _QUIET_RADIUS = 2, 2, 4
_LEVELS = 0.5
"""Added to the local contrast of a frame, in 8-bit levels: less is noise of the codec."""
_OF_MEAN = 0.1
_QUIET_LEVELS = 6.0
_MAX = 3.0
_BLACK, _WHITE, _ROOM = 16, 235, 12


def looked_at(path: Path) -> np.ndarray:
    """The flattened mean of a video's frames, [y, x]. Raises UserError where it has none that can be decoded."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video stream; give a video")
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"
            stride = max(1, stream.frames // MAX_FRAMES)
            mean = flattened_mean(
                map(small_luma, islice(container.decode(stream), 0, None, stride))
            )
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path} cannot be decoded: {error}; give a video that is whole") from error
    if mean is None:
        raise UserError(f"{path} has no frame that can be decoded; give a video that is whole")
    return mean


def flattened_mean(frames: Iterable[np.ndarray]) -> np.ndarray | None:
    """The flattened mean of luma frames [y, x], of which one is held at a time; None without frames."""
    total, count = None, 0
    for frame in frames:
        flattened = flat(frame)
        total = flattened if total is None else total + flattened
        count += 1
    return None if total is None else flat_mean(total / count)


def flat(luma: np.ndarray) -> np.ndarray:
    """A frame without its local mean, over its local contrast."""
    return _over_contrast(luma.astype(np.float32), _CONTRAST_RADIUS, _LEVELS)


def flat_mean(mean: np.ndarray) -> np.ndarray:
    """The mean of flat frames, flattened once more."""
    return _over_contrast(mean, _CONTRAST_RADIUS, _OF_MEAN)


def quietness(luma: np.ndarray) -> np.ndarray:
    """Smooth, larger where a frame has less contrast: there the same change is found more easily.

    0 on black and white: what would go beyond them is cut off by every player, and grain shows on black bars.
    """
    luma = luma.astype(np.float32)
    detail = luma - local_mean(luma, _MEAN_RADIUS)
    contrast = np.sqrt(np.maximum(local_mean(detail * detail, _QUIET_RADIUS), 0))
    room = np.clip(np.minimum(luma - _BLACK, _WHITE - luma) / _ROOM, 0, 1)
    return local_mean(room / np.sqrt(contrast + _QUIET_LEVELS), _QUIET_RADIUS)


def _over_contrast(picture: np.ndarray, radius: int, floor: float) -> np.ndarray:
    detail = picture - local_mean(picture, _MEAN_RADIUS)
    contrast = np.sqrt(np.maximum(local_mean(detail * detail, radius), 0))
    return np.clip(detail / (contrast + floor), -_MAX, _MAX)


def local_mean(picture: np.ndarray, radius: int) -> np.ndarray:
    """The mean over a square of 2 * radius + 1 pixels, of what of it lies in the picture."""
    for axis in (0, 1):
        size = picture.shape[axis]
        sums = np.zeros((size + 1, picture.shape[1 - axis]))
        np.cumsum(picture if axis == 0 else picture.T, axis=0, out=sums[1:])
        above = np.minimum(np.arange(size) + radius + 1, size)
        below = np.maximum(np.arange(size) - radius, 0)
        means = (sums[above] - sums[below]) / (above - below)[:, None]
        picture = means if axis == 0 else means.T
    return picture


def small_size(height: int, width: int) -> tuple[int, int]:
    """Height and width with a short side of at most SIDE pixels."""
    share = min(1.0, SIDE / min(height, width))
    return max(1, round(height * share)), max(1, round(width * share))


def small_luma(frame: av.VideoFrame) -> np.ndarray:
    """The luma of a frame, [y, x], as it is coded: a conversion to grey would cut off what lies below black."""
    height, width = small_size(frame.height, frame.width)
    small = frame.reformat(width, height, format="yuv444p", interpolation="AREA", threads=1)
    return small.to_ndarray()[0]

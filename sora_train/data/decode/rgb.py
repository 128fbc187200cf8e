"""A decoded video frame as the picture that it shows: uint8 RGB, upright, over a background, in SDR."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation
from PIL import ImageColor

from sora_train.data.decode import hdr

_UNSPECIFIED_MATRIX = 2
# Players take a larger picture that names no matrix for BT.709, a smaller one for BT.601 (mpv's rule).
_SD_HEIGHT, _HD_WIDTH = 576, 1280


@lru_cache
def colour(name: str) -> tuple[int, int, int]:
    """The RGB of a CSS colour name or `#rrggbb`. Raises ValueError where there is no such colour."""
    return ImageColor.getrgb(name)[:3]


def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether the frame's format holds transparency."""
    return any(component.is_alpha for component in frame.format.components)


def is_untagged_hd(frame: av.VideoFrame) -> bool:
    """Whether a frame of YUV names no matrix and is larger than SD."""
    is_large = frame.height > _SD_HEIGHT or frame.width >= _HD_WIDTH
    return is_large and frame.colorspace == _UNSPECIFIED_MATRIX and not frame.format.is_rgb


def _matrix(frame: av.VideoFrame) -> Colorspace | None:
    """The matrix of a frame that names none; None: the frame's own, or BT.601."""
    if hdr.is_hdr(frame.color_trc) and frame.colorspace == _UNSPECIFIED_MATRIX:
        return Colorspace.BT2020
    return Colorspace.ITU709 if is_untagged_hd(frame) else None


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of the container's matrix: a pixel at (x, y) is shown at (a x + c y, b x + d y).

    Only the signs count; x grows to the right, y downwards. The identity where there is none.
    """
    stored: Any = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return 1, 0, 0, 1
    values = np.frombuffer(bytes(stored), np.int32).tolist()
    a, b, c, d = values[0], values[1], values[3], values[4]
    return (a, b, c, d) if a * d != b * c else (1, 0, 0, 1)


def is_turned(frame: av.VideoFrame) -> bool:
    """Whether width and height change places when the frame is shown."""
    a, b, c, d = display_matrix(frame)
    return abs(b) + abs(c) > abs(a) + abs(d)


def is_mirrored(frame: av.VideoFrame) -> bool:
    """Whether the frame is shown mirrored, as front cameras have it."""
    a, b, c, d = display_matrix(frame)
    return a * d < b * c


def upright(rgb: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """(H, W, C) as the display matrix wants it: the nearest of its eight orientations, as a view."""
    a, b, c, d = display_matrix(frame)
    if is_turned(frame):
        rgb, across, down = rgb.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    return rgb[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def over(background: str, rgba: np.ndarray) -> np.ndarray:
    """RGB, uint8 (H, W, 3), of straight alpha, uint8 (H, W, 4), laid over a colour."""
    alpha = rgba[..., 3:].astype(np.uint16)
    below = np.array(colour(background), np.uint16)
    return ((rgba[..., :3] * alpha + below * (255 - alpha) + 127) // 255).astype(np.uint8)


def shown(frame: av.VideoFrame, background: str, reduced: int = 1) -> np.ndarray:
    """The picture a frame shows: uint8 (H, W, 3) RGB.

    `background` is the colour that lies under alpha. HDR comes `reduced` times smaller, as the tone
    curve takes a second for each frame of 4K.
    """
    matrix, alpha = _matrix(frame), has_alpha(frame)
    form = "rgba" if alpha else "rgb24"
    if not hdr.is_hdr(frame.color_trc):
        rgb = frame.to_ndarray(format=form, src_colorspace=matrix, threads=1)
    else:
        smaller: dict[str, Any] = {
            "width": frame.width // reduced,
            "height": frame.height // reduced,
            "interpolation": Interpolation.AREA if reduced > 1 else None,
        }
        wide = frame.to_ndarray(format="rgb48le", src_colorspace=matrix, threads=1, **smaller)
        rgb = hdr.as_sdr(wide, frame.color_trc, frame.color_primaries)
        if alpha:
            plain = frame.to_ndarray(format=form, src_colorspace=matrix, threads=1, **smaller)
            rgb = np.concatenate([rgb, plain[..., 3:]], axis=2)
    return upright(over(background, rgb) if alpha else rgb, frame)

"""A still picture as it is shown: upright, the first of several, 16 bits brought to 8, over a background."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps

from sora_train.data.decode.rgb import colour

MAX_PIXELS = 1 << 29
"""The largest picture that is read: as RGB it takes 1.6 GB."""

# The limit above takes the place of Pillow's, which is below the size of today's cameras.
Image.MAX_IMAGE_PIXELS = None

# In these several pictures are moments; in others they are views, pages or sizes.
_ANIMATED = ("png", "webp", "gif", "avif")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_16_BIT = 257


class NotAPicture(ValueError):
    """The file holds something else than a still picture that can be read."""


def open_picture(file: Any) -> Image.Image:
    """The picture in an open file, not yet decoded; of several (a phone's MPO, pages of a TIFF) the first.

    Raises NotAPicture where it is animated or larger than MAX_PIXELS, and what Pillow raises.
    """
    image = Image.open(cast(Any, file))
    codec = (image.format or "image").lower()
    if has_others(image) and codec in _ANIMATED:
        raise NotAPicture(f"an animated {codec} is neither image nor video; convert it to mp4")
    if image.width * image.height > MAX_PIXELS:
        raise NotAPicture(
            f"a picture of {image.width}x{image.height} pixels is larger than {MAX_PIXELS}; scale it down"
        )
    return image


def has_others(image: Image.Image) -> bool:
    """Whether the file holds more pictures than this one."""
    return getattr(image, "n_frames", 1) > 1


def has_alpha(image: Image.Image) -> bool:
    """Whether the picture has a channel or a colour of transparency."""
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def is_transparent(image: Image.Image) -> bool:
    """Whether a pixel of the picture is not opaque."""
    if not has_alpha(image):
        return False
    return int(np.asarray(_in_8_bits(image).convert("RGBA").getchannel("A")).min()) < 255


def turn_upright(image: Image.Image) -> None:
    """Turn the picture as its EXIF orientation says, without a copy of one that stands already."""
    ImageOps.exif_transpose(image, in_place=True)


def as_rgb(image: Image.Image, background: str) -> Image.Image:
    """The picture upright and in RGB; `background` is the colour that lies under transparency."""
    turn_upright(image)
    image = _in_8_bits(image)
    if not has_alpha(image):
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    laid = Image.new("RGB", image.size, colour(background))
    laid.paste(image, mask=image.getchannel("A"))
    return laid


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits in 8, where Pillow's own conversion would cut all values above 255 off."""
    if image.mode == "F":
        raise NotAPicture("a picture of floating-point numbers says nowhere what white is")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray(
        ((values.clip(0, 0xFFFF).astype(np.uint32) + _16_BIT // 2) // _16_BIT).astype(np.uint8)
    )
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey

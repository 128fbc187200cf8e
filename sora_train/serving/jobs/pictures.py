"""What is seen of a video before it is played: one frame, and a sheet of many; and its facts, measured in the file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image

from sora_train.base.files import renamed_when_whole

SHEET_COLUMNS, SHEET_FRAMES, SHEET_WIDTH = 4, 16, 320
THUMBNAIL_WIDTH = 640


@dataclass(frozen=True)
class Measured:
    """Facts of a video file."""

    seconds: float
    size: tuple[int, int]
    """Width, height."""
    fps: float
    frames: int


def measured(video: Path) -> Measured:
    """Every frame is decoded, so a file that ends too early has fewer."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or 0)
        frames = sum(1 for _ in container.decode(stream))
        seconds = round(frames / fps, 3) if fps else 0.0
        return Measured(seconds, (stream.width, stream.height), fps, frames)


def draw(video: Path, frames: int, thumbnail: Path, spritesheet: Path) -> None:
    """Write a WebP of the middle frame, and a JPEG of frames spread over the video; one pass, flat in memory."""
    spread = {round(i * (frames - 1) / (SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)}
    tiles = []
    for number, image in enumerate(_images(video)):
        if number == frames // 2:
            with renamed_when_whole(thumbnail) as partial:
                _narrowed(image, THUMBNAIL_WIDTH).save(partial, format="WEBP", quality=85)
        if number in spread:
            tiles.append(_narrowed(image, SHEET_WIDTH))
    width, height = tiles[0].size
    columns = min(SHEET_COLUMNS, len(tiles))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * width, place // columns * height))
    with renamed_when_whole(spritesheet) as partial:
        sheet.save(partial, format="JPEG", quality=85)


def _images(video: Path) -> Iterator[Image.Image]:
    with av.open(str(video)) as container:
        for frame in container.decode(container.streams.video[0]):
            yield frame.to_image()


def _narrowed(image: Image.Image, width: int) -> Image.Image:
    if image.width <= width:
        return image
    return image.resize((width, max(1, round(image.height * width / image.width))))

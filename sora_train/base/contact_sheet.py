"""A picture of many clips at once: one row a clip, its prompt on the left, frames in order of time.

Clips are scaled by whole factors without smoothing, so that what is seen is what was made; only
clips too large for a row are shrunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sora_train.base.files import renamed_when_whole

MARGIN = 24
GAP = 6
ROW_GAP = 14
LABEL_WIDTH = 250
FONT_SIZE = 14
TARGET_HEIGHT = 128  # small frames grow by whole factors to about this many pixels
MAX_FRAME = (288, 192)  # (width, height): larger frames shrink to fit
BACKGROUND = (250, 250, 248)
RULE = (226, 226, 222)
TEXT = (34, 36, 40)
FAINT = (130, 134, 140)


@dataclass(frozen=True)
class _Row:
    frames: list[Image.Image]
    lines: list[str]
    notes: list[str]

    @property
    def width(self) -> int:
        return sum(frame.width for frame in self.frames) + GAP * (len(self.frames) - 1)


def contact_sheet(
    clips: Sequence[np.ndarray],
    labels: Sequence[str],
    path: Path,
    frames_per_clip: int = 5,
    notes: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """Draw `clips` to a PNG at `path` and return it.

    clips: uint8 (T, H, W, 3) RGB each, any mix of sizes and lengths; up to `frames_per_clip` frames
    are shown, evenly spread from the first to the last. `notes` stand below the labels in place of
    the clips' sizes, their lines kept; `title` stands above all. Raises ValueError on another shape or dtype.
    """
    if len(clips) != len(labels) or not clips:
        raise ValueError(
            f"need as many labels as clips, and one or more: {len(labels)}, {len(clips)}"
        )
    font, small = _font(FONT_SIZE), _font(FONT_SIZE - 4)
    rows = [
        _Row(
            _frames(clip, frames_per_clip), _lines(label, font), _lines(note or _note(clip), small)
        )
        for clip, label, note in zip(clips, labels, notes or [""] * len(clips), strict=True)
    ]
    line_height = FONT_SIZE + 5
    heights = [
        max(row.frames[0].height, line_height * (len(row.lines) + len(row.notes))) for row in rows
    ]
    width = 2 * MARGIN + LABEL_WIDTH + max(row.width for row in rows)
    head = _wrap(title, font, width - 2 * MARGIN) if title else []
    top = MARGIN + len(head) * line_height + (ROW_GAP if head else 0)
    height = top + MARGIN + sum(heights) + 2 * ROW_GAP * (len(rows) - 1)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(head):
        draw.text((MARGIN, MARGIN + number * line_height), line, fill=TEXT, font=font)
    for index, (row, row_height) in enumerate(zip(rows, heights, strict=True)):
        for number, line in enumerate(row.lines):
            draw.text((MARGIN, top + number * line_height), line, fill=TEXT, font=font)
        below = top + len(row.lines) * line_height + 2
        for number, line in enumerate(row.notes):
            draw.text((MARGIN, below + number * (line_height - 4)), line, fill=FAINT, font=small)
        left = MARGIN + LABEL_WIDTH
        for frame in row.frames:
            sheet.paste(frame, (left, top))
            left += frame.width + GAP
        top += row_height + ROW_GAP
        if index < len(rows) - 1:
            draw.line([(MARGIN, top), (width - MARGIN, top)], fill=RULE)
        top += ROW_GAP
    with renamed_when_whole(path) as partial:
        sheet.save(partial, format="PNG", optimize=True)
    return path


def filmstrip(clip: np.ndarray, frames_per_clip: int = 5) -> Image.Image:
    """Up to `frames_per_clip` frames of a clip, uint8 (T, H, W, 3) RGB, side by side."""
    frames = _frames(clip, frames_per_clip)
    width = sum(frame.width for frame in frames) + GAP * (len(frames) - 1)
    strip = Image.new("RGB", (width, frames[0].height), BACKGROUND)
    for number, frame in enumerate(frames):
        strip.paste(frame, (number * (frame.width + GAP), 0))
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's own font has no letters beyond ASCII; most Linux machines have one with more.
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size=size)


def _frames(clip: np.ndarray, count: int) -> list[Image.Image]:
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"a clip is uint8 (T, H, W, 3), got {clip.dtype} {clip.shape}")
    num_frames, height, width, _ = clip.shape
    picks = np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int)
    shrink = min(MAX_FRAME[0] / width, MAX_FRAME[1] / height)
    if shrink < 1:
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        return [Image.fromarray(clip[i]).resize(size, Image.Resampling.LANCZOS) for i in picks]
    factor = max(1, min(round(TARGET_HEIGHT / height), int(shrink)))
    size = (width * factor, height * factor)
    return [Image.fromarray(clip[i]).resize(size, Image.Resampling.NEAREST) for i in picks]


def _note(clip: np.ndarray) -> str:
    num_frames, height, width, _ = clip.shape
    return f"{width}x{height}, {num_frames} frame{'s' if num_frames > 1 else ''}"


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The lines of a label or note, each broken where it is too long for its column."""
    width = LABEL_WIDTH - GAP * 3
    return [line for part in text.splitlines() or [""] for line in _wrap(part, font, width)]


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break `text` at spaces, or inside a word wider than a line, into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines

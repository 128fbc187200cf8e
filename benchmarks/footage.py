"""Long footage whose every cut, camera and overlay is known: what the preparation of raw video is measured on.

A shot shows things of the shapes world over a texture of its own, under a camera that moves over both. Shots are joined
by cuts, dissolves and fades. Everything follows from the seeds, so equal shots give equal frames on any machine.

Units: seconds of footage, pixels (x right, y down), speeds in shares of the frame's width, height or size a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sora_train.data.decode.video_io import Encoding, stream_h264
from sora_train.data.shapes.world import PALETTE, SHAPES, distance

CAMERAS = (
    "static",
    "pan_left",
    "pan_right",
    "tilt_up",
    "tilt_down",
    "zoom_in",
    "zoom_out",
    "roll",
    "shake",
)
JOINS = ("cut", "dissolve", "fade")
PAN = (0.10, 0.25)
"""Shares of the width or height a second, of pans and tilts."""
ZOOM = (0.10, 0.20)
ROLL = (math.radians(8), math.radians(15))
SHAKE = 0.008
"""Share of the width by which a hand-held camera sways."""
DISSOLVE, FADE = (0.5, 1.5), (0.7, 1.6)
"""Seconds that a transition takes."""
THINGS = 7
THING_RADIUS = (0.09, 0.17)
THING_SPEED = (0.0, 0.6)
BAR_SHARE = {"letterbox": (0.08, 0.16), "pillarbox": (0.08, 0.16)}
LOGO, LOGO_MARGIN = 0.11, 0.04
"""Size of a logo and its distance from the corner, in shares of the height."""


@dataclass(frozen=True)
class Shot:
    """What is shown from one join to the next; `seed` draws its texture, its things and how fast the camera goes.

    A zoom of more than ten seconds runs out of detail.
    """

    seed: int
    seconds: float = 3.0
    """Without the transitions at its ends."""
    camera: str = "static"
    is_still: bool = False
    """Nothing moves at all."""
    text: str = ""
    """A line in large letters that stands over the picture."""
    overlay: bool = False
    """A logo in a corner that stands still over all frames."""
    bars: str = ""
    """letterbox or pillarbox."""
    blur: float = 0.0
    """Standard deviation in pixels."""
    exposure: float = 1.0
    """A factor of all levels."""
    black: bool = False


@dataclass(frozen=True)
class _Thing:
    shape: str
    colour: str
    x: float
    y: float
    radius: float
    speed_x: float
    speed_y: float
    turning: float


@dataclass(frozen=True)
class Footage:
    """Shots in order and how each goes over into the next."""

    all_shots: tuple[Shot, ...]
    joins: tuple[str, ...]
    height: int
    width: int
    fps: float

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Frames of each shot alone, and of the transition behind it."""
        counts = [max(1, round(shot.seconds * self.fps)) for shot in self.all_shots]
        behind = [
            _transition_frames(join, before.seed, after.seed, self.fps)
            for join, (before, after) in zip(self.joins, pairwise(self.all_shots), strict=True)
        ]
        return list(zip(counts, [*behind, 0], strict=True))

    @property
    def num_frames(self) -> int:
        return sum(alone + behind for alone, behind in self.lengths)

    @property
    def shots(self) -> list[tuple[float, float, Shot]]:
        """(begin, end, shot) in seconds: from the first frame that shows it alone to the end of the last."""
        begins = np.cumsum([0, *(sum(pair) for pair in self.lengths)])
        return [
            (begin / self.fps, (begin + alone) / self.fps, shot)
            for begin, (alone, _), shot in zip(
                begins[:-1].tolist(), self.lengths, self.all_shots, strict=True
            )
        ]

    @property
    def transitions(self) -> list[tuple[float, float, str]]:
        """(begin, end, kind) in seconds: the frames that are mixed or darkened; of a cut the next shot's first."""
        return [
            (before[1], after[0], join)
            for join, (before, after) in zip(self.joins, pairwise(self.shots), strict=True)
        ]

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) RGB, one at a time."""
        for index, (shot, (alone, behind)) in enumerate(
            zip(self.all_shots, self.lengths, strict=True)
        ):
            for number in range(alone):
                yield self._frame(shot, number)
            if behind:
                after, join = self.all_shots[index + 1], self.joins[index]
                for number in range(behind):
                    first = self._frame(shot, alone + number).astype(np.float32)
                    second = self._frame(after, number - behind).astype(np.float32)
                    old, new = _shares(join, (number + 1) / (behind + 1))
                    yield (old * first + new * second + 0.5).astype(np.uint8)

    def _frame(self, shot: Shot, number: int) -> np.ndarray:
        return _shown(shot, number / self.fps, self.height, self.width)


def footage(
    shots: Sequence[Shot],
    joins: Sequence[str] = (),
    *,
    height: int = 180,
    width: int = 320,
    fps: float = 24.0,
) -> Footage:
    """Shots joined by `joins`, one fewer than shots; none: cuts."""
    joins = tuple(joins) or ("cut",) * (len(shots) - 1)
    assert len(joins) == len(shots) - 1 and set(joins) <= set(JOINS), f"one of {JOINS} between two"
    assert {shot.camera for shot in shots} <= set(CAMERAS), f"cameras are {CAMERAS}"
    return Footage(tuple(shots), joins, height, width, fps)


def write_footage(footage: Footage, path: Path | str, crf: int = 20) -> Path:
    """An mp4 of H.264 in BT.709, one frame in memory at a time; equal footage gives equal bytes."""
    frames = ((None, frame) for frame in footage.frames())
    stream_h264(frames, footage.fps, Path(path), Encoding(crf))
    return Path(path)


def picture_box(shot: Shot, height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of what the bars leave."""
    share = _uniform(shot.seed, "bars", *BAR_SHARE.get(shot.bars, (0.0, 0.0)))
    down = round(share * height) if shot.bars == "letterbox" else 0
    across = round(share * width) if shot.bars == "pillarbox" else 0
    return across, down, width - 2 * across, height - 2 * down


def logo_box(shot: Shot, height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of the logo, which stands in a corner of the picture."""
    left, top, inner_width, inner_height = picture_box(shot, height, width)
    size, margin = round(LOGO * height), round(LOGO_MARGIN * height)
    corner = int(_uniform(shot.seed, "corner", 0, 4))
    x = left + (margin if corner % 2 else inner_width - margin - size)
    y = top + (margin if corner < 2 else inner_height - margin - size)
    return x, y, size, size


def _shares(join: str, progress: float) -> tuple[float, float]:
    """How much of the old and of the new shot a transition shows."""
    if join == "dissolve":
        return 1 - progress, progress
    # The middle fifth is black.
    return max(0.0, 1 - progress / 0.4), max(0.0, 1 - (1 - progress) / 0.4)


def _transition_frames(join: str, before: int, after: int, fps: float) -> int:
    if join == "cut":
        return 0
    return round(
        _uniform(before, f"{join} {after}", *(DISSOLVE if join == "dissolve" else FADE)) * fps
    )


# -- a frame of a shot ---------------------------------------------------------------------------------


def _shown(shot: Shot, time: float, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) of a shot `time` seconds after it began, which may be before."""
    frame = np.zeros((height, width, 3), np.uint8)
    if not shot.black:
        picture = _picture(shot, 0.0 if shot.is_still else time, height, width)
        if shot.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(shot.blur))
        left, top, inner_width, inner_height = picture_box(shot, height, width)
        window = np.s_[top : top + inner_height, left : left + inner_width]
        levels = np.asarray(picture, np.float32)[window] * shot.exposure
        frame[window] = np.clip(levels + 0.5, 0, 255).astype(np.uint8)
    if not (shot.text or shot.overlay):
        return frame
    image = Image.fromarray(frame)
    if shot.text:
        _write(image, shot.text)
    if shot.overlay:
        _stamp(image, logo_box(shot, height, width))
    return np.asarray(image)


def _picture(shot: Shot, time: float, height: int, width: int) -> Image.Image:
    x, y, scale, angle = camera_at(shot, time)
    centre_x, centre_y = x * width % (2 * width), y * height % (2 * height)
    # From the frame to the texture, which lies four times beside itself and has the size of four frames.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    half_x, half_y = width / 2, height / 2
    to_world = (
        cos,
        -sin,
        centre_x + width - cos * half_x + sin * half_y,
        sin,
        cos,
        centre_y + height - sin * half_x - cos * half_y,
    )
    image = _texture(shot.seed, height, width).transform(
        (width, height), Image.Transform.AFFINE, to_world, Image.Resampling.BILINEAR
    )
    frame = np.array(image, np.float32)
    for thing in _things(shot.seed):
        # Things come back after two frames' way, as the texture does.
        away_x = ((thing.x + thing.speed_x * time - x + 1) % 2 - 1) * width * scale
        away_y = ((thing.y + thing.speed_y * time - y + 1) % 2 - 1) * height * scale
        turned = math.cos(angle), math.sin(angle)
        _paint(
            frame,
            thing,
            half_x + turned[0] * away_x + turned[1] * away_y,
            half_y - turned[1] * away_x + turned[0] * away_y,
            thing.radius * min(height, width) * scale,
            thing.turning * time - angle,
        )
    return Image.fromarray((frame + 0.5).astype(np.uint8))


def camera_at(shot: Shot, time: float) -> tuple[float, float, float, float]:
    """Where the camera looks: x, y in shares of the frame, how many times larger it sees, its angle in radians."""
    x = y = angle = 0.0
    scale = 1.0
    speed = _uniform(shot.seed, "camera", 0, 1)
    kind, _, way = shot.camera.partition("_")
    sign = 1 if way in ("right", "down") else -1
    if kind == "pan":
        x = sign * (PAN[0] + speed * (PAN[1] - PAN[0])) * time
    elif kind == "tilt":
        y = sign * (PAN[0] + speed * (PAN[1] - PAN[0])) * time
    elif kind == "zoom":
        rate = math.log1p(ZOOM[0] + speed * (ZOOM[1] - ZOOM[0]))
        # It is never wider than a picture, beyond which the texture would be seen to repeat.
        scale = math.exp(rate * (time + 1.5 if way == "in" else shot.seconds + 1.5 - time))
    elif kind == "roll":
        turning = ROLL[0] + speed * (ROLL[1] - ROLL[0])
        angle = turning * time * (1 if _uniform(shot.seed, "roll", 0, 1) < 0.5 else -1)
        scale = 1.2
    elif kind == "shake":
        sway = [_sway(shot.seed, name, time) for name in ("x", "y", "angle")]
        x, y, angle, scale = SHAKE * sway[0], SHAKE * 16 / 9 * sway[1], 0.006 * sway[2], 1.05
    return x, y, scale, angle


def _sway(seed: int, name: str, time: float) -> float:
    """The hand's tremble: three waves of two to seven a second, of about 1 together."""
    waves = _draws(seed, f"sway {name}").random((3, 2))
    return float(
        sum(math.sin(math.tau * ((2 + 5 * rate) * time + phase)) for rate, phase in waves.tolist())
    )


def _paint(
    frame: np.ndarray, thing: _Thing, x: float, y: float, radius: float, angle: float
) -> None:
    """Lay a thing over float32 (H, W, 3) with smooth edges."""
    height, width, _ = frame.shape
    reach = radius * SHAPES[thing.shape] + 1.5
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 2)
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 2)
    if left >= right or top >= bottom:
        return
    u = ((np.arange(left, right, dtype=np.float32) + 0.5 - x) / radius)[None, :]
    v = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - y) / radius)[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    outline = distance(thing.shape, cos * u + sin * v, cos * v - sin * u)
    alpha = np.clip(0.5 - outline * radius, 0.0, 1.0)[..., None]
    window = frame[top:bottom, left:right]
    window += alpha * (np.asarray(PALETTE[thing.colour], np.float32) - window)


def _write(image: Image.Image, text: str) -> None:
    """A line in the lower third, as wide as fits."""
    size = image.height / 6
    draw = ImageDraw.Draw(image)
    while size > 8 and draw.textlength(text, ImageFont.load_default(size)) > 0.9 * image.width:
        size *= 0.9
    draw.text(
        (image.width / 2, image.height * 0.72),
        text,
        fill=(250, 250, 250),
        font=ImageFont.load_default(size),
        anchor="mm",
        stroke_width=max(1, round(size / 12)),
        stroke_fill=(10, 10, 10),
    )


def _stamp(image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """A white disc with a dark cross in it."""
    left, top, size, _ = box
    draw, line = ImageDraw.Draw(image), max(2, size // 6)
    draw.ellipse((left, top, left + size - 1, top + size - 1), fill=(245, 245, 245))
    middle, inner = size // 2, size // 5
    draw.line((left + inner, top + middle, left + size - inner, top + middle), (20, 20, 60), line)
    draw.line((left + middle, top + inner, left + middle, top + size - inner), (20, 20, 60), line)


# -- what a seed draws ---------------------------------------------------------------------------------


def _draws(seed: int, name: str) -> np.random.Generator:
    """A stream for each use, so that one more draw here changes nothing there."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *name.encode()])))


def _uniform(seed: int, name: str, low: float, high: float) -> float:
    return low + (high - low) * float(_draws(seed, name).random())


@lru_cache(maxsize=8)
def _things(seed: int) -> tuple[_Thing, ...]:
    """Spread over an area of two by two frames."""
    draws = _draws(seed, "things").random((THINGS, 8))
    shapes, colours = tuple(SHAPES), tuple(PALETTE)
    found = []
    for shape, colour, x, y, size, speed, way, turning in draws.tolist():
        # Most go slowly, a few race.
        pace = THING_SPEED[0] + (THING_SPEED[1] - THING_SPEED[0]) * speed**3
        found.append(
            _Thing(
                shapes[int(shape * len(shapes))],
                colours[int(colour * len(colours))],
                2 * x,
                2 * y,
                THING_RADIUS[0] + size * (THING_RADIUS[1] - THING_RADIUS[0]),
                pace * math.cos(math.tau * way),
                pace * math.sin(math.tau * way),
                2 * turning - 1,
            )
        )
    return tuple(found)


@lru_cache(maxsize=3)
def _texture(seed: int, height: int, width: int) -> Image.Image:
    """Smooth noise in colours of its own, of two by two frames, that goes on at its edges; laid out four times."""
    draws = _draws(seed, "texture")
    size = (2 * height, 2 * width)
    colours = 30 + 190 * draws.random((3, 1, 1, 3)).astype(np.float32)
    patches = _noise(draws, size, 5)
    # Steep, so that patches have edges which a camera's motion can be read from.
    mixed = np.clip(0.5 + 4 * patches, 0, 1)[..., None]
    second = np.clip(0.5 + 6 * _noise(draws, size, 9), 0, 1)[..., None]
    fine = sum(_noise(draws, size, cells) / 2**n for n, cells in enumerate((12, 24, 48)))
    base = colours[0] * (1 - mixed) + colours[1] * mixed
    base = base * (1 - 0.5 * second) + 0.5 * second * colours[2]
    levels = np.clip(base + 42 * np.asarray(fine)[..., None], 8, 247).astype(np.uint8)
    return Image.fromarray(np.tile(levels, (2, 2, 1)))


def _noise(draws: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """float32 (H, W) about 0 with a deviation of about 0.3, of `cells` waves across, whose ends meet."""
    grid = draws.random((cells, cells), dtype=np.float32) * 2 - 1
    image = Image.fromarray(np.pad(grid, 2, mode="wrap"))
    height, width = size
    box = (2.0, 2.0, 2.0 + cells, 2.0 + cells)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def random_footage(
    seed: int,
    shots: int = 40,
    joins: Sequence[str] = JOINS,
    *,
    seconds: tuple[float, float] = (1.5, 3.5),
    height: int = 180,
    width: int = 320,
    fps: float = 24.0,
) -> Footage:
    """Shots of all cameras and joins of these kinds; another seed has no texture in common with it."""
    draws = _draws(seed, "footage")
    chosen = [
        Shot(
            seed * 10_000 + number,
            seconds[0] + (seconds[1] - seconds[0]) * float(draws.random()),
            CAMERAS[int(draws.random() * len(CAMERAS))],
            is_still=float(draws.random()) < 0.1,
            exposure=0.35 + 0.65 * float(draws.random()) ** 0.5,
        )
        for number in range(shots)
    ]
    between = [joins[int(draws.random() * len(joins))] for _ in range(shots - 1)]
    return footage(chosen, between, height=height, width=width, fps=fps)

"""The shapes world: procedural captioned clips whose every factor is known.

A `Scene` is a complete description drawn from (seed, split, index) alone, so clips can be made in
any order and on any number of machines; `render` turns it into pixels by signed distance
functions, which gives anti-aliased edges at any size. Combinations no eye could decide (a rotating
circle, a thing that leaves the frame) are never drawn, and a fixed set of factor pairs is kept out
of training so that composition can be scored apart.

Units: positions are fractions of the frame (x right, y down), radii fractions of its short side,
angles radians clockwise as seen on the screen. Arrays are (T, H, W).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from sora_train.data.shapes import captions
from sora_train.data.shapes.scene import Prompt, Scene, Thing
from sora_train.errors import UserError

T = TypeVar("T")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (232, 36, 40),
    "green": (40, 200, 60),
    "blue": (48, 84, 244),
    "yellow": (244, 224, 36),
    "magenta": (228, 48, 220),
    "cyan": (36, 220, 232),
}
# Colours that no scene has unless it is asked for: what a trained model has never seen. Their hues lie between two
# of the others, and far enough from both to be told apart.
NEW_COLOURS: dict[str, tuple[int, int, int]] = {"orange": (248, 132, 20)}
PALETTE = COLOURS | NEW_COLOURS
# Circumradius of each shape when its nominal radius is 1; the areas are then about equal.
SHAPES: dict[str, float] = {
    "circle": 1.0,
    "square": 1.25,
    "triangle": 1.3,
    "cross": 1.3,
    "ring": 1.18,
}
# Fraction of a turn after which the shape looks the same; shapes left out look alike at any angle.
SYMMETRY: dict[str, float] = {
    "square": math.pi / 2,
    "triangle": 2 * math.pi / 3,
    "cross": math.pi / 2,
}
SIZES: dict[str, tuple[float, float]] = {"small": (0.212, 0.222), "large": (0.245, 0.258)}
PAIR_RADIUS = (0.16, 0.172)
MOTIONS = ("left", "right", "up", "down", "still", "rotate", "grow", "bounce")
# Base colour at the top, at the bottom, and strength of the texture in 8-bit levels.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], int]] = {
    "dark": ((26, 26, 30), (26, 26, 30), 0),
    "navy": ((24, 32, 66), (24, 32, 66), 0),
    "white": ((216, 216, 210), (216, 216, 210), 0),
    "gradient": ((112, 108, 112), (28, 28, 34), 0),
    "striped": ((64, 64, 70), (64, 64, 70), 24),
    "checkered": ((70, 66, 66), (70, 66, 66), 24),
}
# How often a scene without a pan has each. Mostly plain and alike: what a caption leaves open is
# noise to a model that learns for minutes, and textures are what a small VAE spends its latents on.
BACKGROUND_SHARES: dict[str, float] = {
    "dark": 0.84,
    "navy": 0.05,
    "white": 0.03,
    "gradient": 0.04,
    "striped": 0.02,
    "checkered": 0.02,
}
TEXTURED = ("striped", "checkered")
CAMERAS = ("static", "pan_left", "pan_right")
LIGHTING: dict[str, float] = {"bright": 1.0, "dim": 0.72}
STYLES = ("flat", "shaded")
# A camera that pans is combined with the motions that stay apart from it and stay in view.
PAN_MOTIONS = ("still", "rotate")

# (height, width) and the share of scenes that have it.
FRAME_SIZES: dict[tuple[int, int], float] = {
    (48, 48): 0.88,
    (32, 64): 0.03,
    (64, 32): 0.03,
    (64, 64): 0.03,
    (96, 96): 0.03,
}
# (frames, frames a second); the first three span exactly one second, the last exactly two, so
# that resampling to a slower rate keeps the whole motion.
DURATIONS: dict[tuple[int, float], float] = {
    (9, 8.0): 0.87,
    (13, 12.0): 0.05,
    (17, 16.0): 0.05,
    (17, 8.0): 0.03,
}
IMAGE_SHARE = 0.04
LASTING_MOTIONS = ("still", "rotate", "bounce")
"""Motions that can go on for any time and never leave the frame."""
EARLY = 1 / 8
"""By this part of its period a motion that goes on may begin before or after its first moment."""
PAIR_SHARE = 0.04
PAN_SHARE = 0.04

HELD_OUT_COLOUR_SHAPE = frozenset({("red", "triangle"), ("blue", "circle"), ("yellow", "cross")})
HELD_OUT_SHAPE_MOTION = frozenset({("square", "up"), ("ring", "left")})
SPLITS = ("train", "val", "held_out")

TRAVEL = (0.32, 0.42)
MIN_TRAVEL = 0.3
MARGIN = 0.01
# How far the middle of a path may lie from the middle of the frame.
PLACE_JITTER = 0.02
TURN = 2 * math.pi / 3
GROW_FROM = 0.5
MAX_TILT = math.radians(4)


def is_decidable(shape: str, motion: str) -> bool:
    """Whether an eye could see `motion` on `shape`: a turning circle looks like a still one."""
    return motion != "rotate" or shape in SYMMETRY


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether this combination is kept out of the training split."""
    return (colour, shape) in HELD_OUT_COLOUR_SHAPE or (shape, motion) in HELD_OUT_SHAPE_MOTION


def combinations(*, held_out: bool) -> list[tuple[str, str, str]]:
    """All decidable (colour, shape, motion), either the held-out ones or the others."""
    return [
        (colour, shape, motion)
        for colour, shape, motion in itertools.product(COLOURS, SHAPES, MOTIONS)
        if is_decidable(shape, motion) and is_held_out(shape, colour, motion) == held_out
    ]


class _Draws:
    """Random choices made of plain uniforms, whose stream numpy keeps stable between versions."""

    def __init__(self, seed: int, *path: int):
        self._rng = np.random.Generator(
            np.random.Philox(np.random.SeedSequence(entropy=seed, spawn_key=path))
        )

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(self._rng.random())

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self.uniform() * len(values))]

    def weighted(self, shares: Mapping[T, float]) -> T:
        values = list(shares)
        edge = self.uniform() * sum(shares.values())
        for value in values:
            edge -= shares[value]
            if edge < 0:
                return value
        return values[-1]


def sample_scene(
    seed: int,
    index: int,
    split: str = "train",
    *,
    image_share: float = IMAGE_SHARE,
    colour: str = "",
    lasting: Lasting | None = None,
) -> Scene:
    """Scene number `index` of a split, the same whatever was drawn before.

    `train` and `val` hold the combinations training may see, `held_out` only those it may not. With a `colour` of
    `PALETTE` every thing is of that one, and none has another beside it. With `lasting` things are alone in a square
    frame under a static camera, and their motions go on.
    Raises UserError on an unknown split or a negative seed or index.
    """
    if split not in SPLITS:
        raise UserError(
            f"split={split!r} is not a split of the shapes world: choose one of {SPLITS}"
        )
    if seed < 0 or index < 0:
        raise UserError(f"seed={seed}, index={index}: both must be 0 or more")
    draws = _Draws(seed, SPLITS.index(split), index)
    sizes = {
        size: share for size, share in FRAME_SIZES.items() if size[0] == size[1] or not lasting
    }
    height, width = draws.weighted(sizes)
    lengths = {(frames, rate): share for frames, rate, share in lasting.lengths} if lasting else {}
    num_frames, fps = draws.weighted(lengths or DURATIONS)
    if draws.chance(image_share):
        num_frames, fps = 1, 1.0
    held_out = split == "held_out"
    is_pair = draws.chance(PAIR_SHARE) and not colour and not lasting
    is_panned = draws.chance(PAN_SHARE) and num_frames > 1 and not is_pair and not lasting
    if is_pair or num_frames == 1:
        motions: tuple[str, ...] = ("still",)
    else:
        usual = lasting.motions if lasting else MOTIONS
        motions = PAN_MOTIONS if is_panned else usual
    motion = draws.pick(motions)
    choices = [c for c in combinations(held_out=held_out) if c[2] == motion]
    drawn, shape, _ = draws.pick(choices)
    scene = _stage(draws, colour or drawn, shape, motion, num_frames, fps, height, width, is_panned)
    if lasting:
        scene = going_on(scene, draws.uniform())
    if is_pair:
        scene = _pair(draws, scene, choices)
    scene = replace(scene, key=f"shapes-{split}-{seed}-{index:06d}", held_out=held_out)
    phrasing = captions.shortened(scene, _draw_phrasing(draws, scene))
    return replace(scene, phrasing=phrasing, caption=captions.describe(scene, phrasing))


def going_on(scene: Scene, u: float = 0.0) -> Scene:
    """The scene with a motion that plays once a second, begun near the first moment of its period, by `u` in [0, 1)
    before or after it: a turn nearly upright, a bounce near its lowest point, so that every whole second shows one."""
    start = 0.0 if scene.motion == "still" else EARLY * (2 * u - 1)
    return replace(scene, periods=(scene.num_frames - 1) / scene.fps, start=start)


def scene_of(
    prompt: Prompt,
    seed: int = 0,
    *,
    num_frames: int = 9,
    fps: float = 8.0,
    height: int = 48,
    width: int = 48,
) -> Scene:
    """A scene with a static camera that shows what `prompt` asks for, captioned by its text."""
    draws = _Draws(seed, len(SPLITS))
    scene = _stage(
        draws, prompt.colour, prompt.shape, prompt.motion, num_frames, fps, height, width, False
    )
    held_out = is_held_out(prompt.shape, prompt.colour, prompt.motion)
    return replace(scene, caption=prompt.text, held_out=held_out, key=f"shapes-prompt-{seed}")


def eval_prompts(
    n: int, *, held_out: bool, seed: int = 0, colour: str = "", motions: Sequence[str] = MOTIONS
) -> list[Prompt]:
    """`n` prompts for single things under a static camera, balanced over colour, shape and motion (of `motions`); with
    a `colour` all of that one.

    Each next combination is one whose factors were used least so far; ties are drawn from `seed`.
    """
    draws = _Draws(seed, len(SPLITS) + 1, int(held_out))
    pool = [choice for choice in combinations(held_out=held_out) if choice[2] in motions]
    if colour:
        pool = list(dict.fromkeys((colour, shape, motion) for _, shape, motion in pool))
    used: dict[tuple[int, str], int] = {}
    times: dict[tuple[str, str, str], int] = {}
    prompts = []
    for _ in range(n):
        combination = min(
            pool,
            key=lambda c: (
                times.get(c, 0),
                sum(used.get(factor, 0) ** 2 for factor in enumerate(c)),
                draws.uniform(),
            ),
        )
        times[combination] = times.get(combination, 0) + 1
        for factor in enumerate(combination):
            used[factor] = used.get(factor, 0) + 1
        colour, shape, motion = combination
        scene = _stage(draws, colour, shape, motion, 9, 8.0, 48, 48, False)
        phrasing = captions.ARTICLE | (captions.SETTING if draws.chance(0.25) else 0)
        phrasing |= captions.SIZE if draws.chance(0.5) else 0
        prompts.append(Prompt(captions.describe(scene, phrasing), colour, shape, motion))
    return prompts


def _draw_phrasing(draws: _Draws, scene: Scene) -> int:
    """The optional parts of a caption; unusual settings are named more often."""
    odds = {
        captions.ARTICLE: 0.75,
        captions.SIZE: 0.5,
        captions.SYNONYM: 0.2,
        captions.SETTING: 0.15 if scene.background == "dark" else 0.9,
        captions.CAMERA: 0.05,
        captions.LIGHTING: 0.04 if scene.lighting == "bright" else 0.8,
        captions.STYLE: 0.04 if scene.style == "flat" else 0.8,
    }
    return sum(bit for bit, probability in odds.items() if draws.chance(probability))


def _stage(
    draws: _Draws,
    colour: str,
    shape: str,
    motion: str,
    num_frames: int,
    fps: float,
    height: int,
    width: int,
    is_panned: bool,
) -> Scene:
    """Draws what is left open (size, place, background, light) so that the thing stays in view."""
    is_big = motion in ("rotate", "grow") or draws.chance(0.6)
    size = "large" if is_big else "small"
    radius = draws.uniform(*SIZES[size])
    short = min(height, width)
    extent_x = radius * SHAPES[shape] * short / width + MARGIN
    extent_y = radius * SHAPES[shape] * short / height + MARGIN
    camera = draws.pick(CAMERAS[1:]) if is_panned else "static"
    wish = draws.uniform(*TRAVEL)
    reach = {"pan_right": 1, "pan_left": -1, "static": 0}
    pan = reach[camera] * min(wish, 1 - 2 * extent_x)
    travel = 0.0
    if motion in ("left", "right"):
        travel = (1 if motion == "right" else -1) * min(wish, 1 - 2 * extent_x)
    elif motion in ("up", "down", "bounce"):
        travel = (1 if motion == "down" else -1) * min(wish, 1 - 2 * extent_y)
    drift_x = (travel if motion in ("left", "right") else 0.0) - pan
    drift_y = travel if motion in ("up", "down", "bounce") else 0.0
    thing = Thing(
        shape=shape,
        colour=colour,
        size=size,
        x=_start(draws, drift_x, extent_x),
        y=_start(draws, drift_y, extent_y),
        angle=draws.uniform(-MAX_TILT, MAX_TILT),
        radius=radius,
    )
    return Scene(
        things=(thing,),
        motion=motion,
        background=draws.pick(TEXTURED) if is_panned else draws.weighted(BACKGROUND_SHARES),
        camera=camera,
        relation=None,
        lighting="bright" if draws.chance(0.95) else "dim",
        style="flat" if draws.chance(0.95) else "shaded",
        caption="",
        phrasing=0,
        num_frames=num_frames,
        fps=fps,
        height=height,
        width=width,
        travel=travel,
        pan=pan,
        phase=draws.uniform(),
        key="",
        held_out=False,
    )


def _start(draws: _Draws, drift: float, extent: float) -> float:
    """Where a path of length `drift` starts so that its middle is near the frame's and it stays in view."""
    start = 0.5 - drift / 2 + draws.uniform(-PLACE_JITTER, PLACE_JITTER)
    return min(max(start, extent - min(drift, 0.0)), 1 - extent - max(drift, 0.0))


def _pair(draws: _Draws, scene: Scene, choices: Sequence[tuple[str, str, str]]) -> Scene:
    """Two still things side by side or one above the other, along the frame's longer side."""
    first = draws.pick(choices)
    second = draws.pick([choice for choice in choices if choice[0] != first[0]])
    relations = list(captions.RELATIONS)
    if scene.width != scene.height:
        relations = ["left_of"] if scene.width > scene.height else ["above"]
    relation = draws.pick(relations)
    things = []
    for place, (colour, shape, _) in enumerate((first, second)):
        radius = draws.uniform(*PAIR_RADIUS)
        along = 0.26 + 0.48 * place + draws.uniform(-0.01, 0.01)
        across = 0.5 + draws.uniform(-0.12, 0.12)
        x, y = (along, across) if relation == "left_of" else (across, along)
        angle = draws.uniform(-MAX_TILT, MAX_TILT)
        things.append(Thing(shape, colour, "small", x, y, angle, radius))
    return replace(scene, things=tuple(things), relation=relation)


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of `shape` of nominal radius 1, upright, centred at (0, 0).

    Negative inside; in the unit of `x` and `y` (right and down). Corners outside are nearer than
    Euclid has them, which keeps them sharp.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 1.0
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.92) - 0.26
    x_abs, y_abs = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(x_abs, y_abs) - 0.88
    if shape == "triangle":
        return np.maximum(y, 0.8660254 * x_abs - 0.5 * y) - 0.65
    if shape == "cross":
        long, short = np.maximum(x_abs, y_abs), np.minimum(x_abs, y_abs)
        return np.maximum(long - 1.26, short - 0.32)
    raise UserError(
        f"shape={shape!r} is not a shape of the shapes world: choose one of {tuple(SHAPES)}"
    )


@dataclass(frozen=True)
class Lasting:
    """What is drawn where motions go on, each once a second: `motions` of LASTING_MOTIONS, and shares of (frames,
    frames a second)."""

    motions: tuple[str, ...]
    lengths: tuple[tuple[int, float, float], ...] = ()

    @classmethod
    def of(cls, motions: Sequence[str], lengths: Mapping[str, float]) -> Lasting | None:
        """From the config's keys, FRAMES@FPS by their shares; None without motions. Raises UserError for what cannot
        be."""
        unknown = [motion for motion in motions if motion not in LASTING_MOTIONS]
        if unknown:
            raise UserError(
                f"data.shapes_motions has {unknown[0]!r}; of motions that go on there are {', '.join(LASTING_MOTIONS)}"
            )
        if not motions:
            return None
        parsed = []
        for text, share in lengths.items():
            frames, _, fps = text.partition("@")
            try:
                parsed.append((int(frames), float(fps), share))
            except ValueError:
                parsed.append((0, 0.0, share))
            if parsed[-1][0] < 2 or not parsed[-1][1] > 0 or not share > 0:
                raise UserError(
                    f"data.shapes_lengths has {text!r}: {share}; write FRAMES@FPS and a share above 0, such as "
                    "'33@8': 0.7"
                )
        return cls(tuple(motions), tuple(parsed))

    @property
    def name(self) -> str:
        """Short and unique, for folders."""
        lengths = "-".join(f"{frames}at{fps:g}x{share:g}" for frames, fps, share in self.lengths)
        return "-".join(filter(None, ("lasting", *self.motions, lengths)))


@dataclass(frozen=True)
class Track:
    """Where a thing is in each frame: `x`, `y`, `radius` in pixels, `angle` in radians; (T,)."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


def track(scene: Scene, thing: Thing) -> Track:
    """The path of `thing` through the clip; the whole motion takes the whole clip, or plays `periods` times."""
    s = np.linspace(0.0, 1.0, scene.num_frames) if scene.num_frames > 1 else np.zeros(1)
    s = scene.start + scene.periods * s
    along_x = scene.travel * s if scene.motion in ("left", "right") else 0.0
    along_y = {"up": s, "down": s, "bounce": np.abs(np.sin(np.pi * s))}.get(scene.motion, 0.0 * s)
    grown = GROW_FROM + (1 - GROW_FROM) * s if scene.motion == "grow" else np.ones_like(s)
    return Track(
        x=(thing.x + along_x - scene.pan * s) * scene.width,
        y=(thing.y + scene.travel * along_y) * scene.height,
        radius=thing.radius * min(scene.height, scene.width) * grown,
        angle=thing.angle + (TURN * s if scene.motion == "rotate" else 0.0 * s),
    )


def render(scene: Scene) -> np.ndarray:
    """The clip of `scene`: uint8 (T, H, W, 3) RGB."""
    height, width = scene.height, scene.width
    x_HW, y_HW = np.meshgrid(
        np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32) + 0.5
    )
    clip = _background(scene, x_HW, y_HW)
    for thing in scene.things:
        path = track(scene, thing)
        # The window that holds the thing in every frame: what is outside needs no distances.
        reach = path.radius * SHAPES[thing.shape] + 1.5
        left, right = int(max((path.x - reach).min(), 0)), int((path.x + reach).max()) + 1
        top, bottom = int(max((path.y - reach).min(), 0)), int((path.y + reach).max()) + 1
        column = tuple(
            value.astype(np.float32)[:, None, None]
            for value in (path.x, path.y, path.radius, np.cos(path.angle), np.sin(path.angle))
        )
        centre_x, centre_y, radius, cos, sin = column
        u = (x_HW[None, top:bottom, left:right] - centre_x) / radius
        v = (y_HW[None, top:bottom, left:right] - centre_y) / radius
        outline = distance(thing.shape, cos * u + sin * v, cos * v - sin * u)
        alpha = np.clip(0.5 - outline * radius, 0.0, 1.0)[..., None]
        paint = np.asarray(PALETTE[thing.colour], np.float32)
        if scene.style == "shaded":
            shade = np.clip(0.86 - 0.14 * (u + v), 0.6, 1.0)
            paint = shade[..., None] * paint
        window = clip[:, top:bottom, left:right]
        window += alpha * (paint - window)
    clip *= LIGHTING[scene.lighting]
    return (clip + 0.5).astype(np.uint8)


def _background(scene: Scene, x_HW: np.ndarray, y_HW: np.ndarray) -> np.ndarray:
    """Float32 (T, H, W, 3) in 8-bit levels; the texture is carried along by the pan."""
    top, bottom, strength = BACKGROUNDS[scene.background]
    ramp = (y_HW / scene.height)[..., None]
    base = np.asarray(top, np.float32) * (1 - ramp) + np.asarray(bottom, np.float32) * ramp
    clip = np.repeat(base[None], scene.num_frames, axis=0)
    if strength == 0:
        return clip
    period = 0.36 * min(scene.height, scene.width)
    steps = np.linspace(0.0, scene.pan * scene.width, scene.num_frames, dtype=np.float32)
    wave_x = np.sin((2 * math.pi / period) * (x_HW[0] + steps[:, None]) + 2 * math.pi * scene.phase)
    wave = np.repeat(wave_x[:, None, :], scene.height, axis=1)
    if scene.background == "checkered":
        wave = wave * np.sin((2 * math.pi / period) * y_HW + 2 * math.pi * scene.phase)
    # A steep wave is a pattern with anti-aliased edges.
    clip += strength * np.clip(2.5 * wave, -1.0, 1.0)[..., None]
    return clip

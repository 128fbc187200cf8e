"""A long video from a model: its passes, and the files they are streamed into.

    anchors    one clip of a few frames a second over the whole length: what holds the video together
    video      windows at the video's own rate, each shown the end of the one before and begun from the anchors
    smooth     the same once more at a higher rate, begun from the frames of the video
    refined    the same once more at a larger size, each window in parts of the picture that overlap

The passes are iterators that pull from each other, and frames go from the VAE straight into the encoder: memory does
not grow with the length.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.base.files import forget_partials
from sora_train.base.progress import Progress
from sora_train.checkpoint.layout import weights_digest
from sora_train.data.decode.video_io import open_h264
from sora_train.errors import UserError
from sora_train.sampling.api import Model, with_settings
from sora_train.sampling.long.passes import Coarse, Frames, Maker, Pass
from sora_train.sampling.long.plan import Window, plan_windows, window_length
from sora_train.sampling.long.store import Store
from sora_train.sampling.operations import UPSCALE_STRENGTH
from sora_train.sampling.pipeline import ClipShape
from sora_train.sampling.prompts.placing import Run
from sora_train.sampling.prompts.script import Script
from sora_train.sampling.upscale import Windows

SPARSE = 8
"""Anchors have this many times fewer frames a second than the video, or fewer still."""


@dataclass(frozen=True)
class LongRequest:
    """What to make of every script."""

    seconds: float
    shape: ClipShape
    """Of a window, and the rate of the video."""
    anchor_fps: float = 0.0
    """Rate of the anchors; 0: none."""
    anchor_strength: float = 0.9
    """Noise level from which the windows are made out of the anchors."""
    smooth_fps: float = 0.0
    """Rate of the second pass; 0: none."""
    smooth_strength: float = 0.6
    """Noise level from which its windows are made out of the video."""
    refined_size: tuple[int, int] | None = None
    """(width, height) of the last pass; None: there is none."""
    refined_strength: float = UPSCALE_STRENGTH
    """Noise level from which its windows are made out of the resized ones."""

    @property
    def frames(self) -> int:
        """Frames of the video at the window's rate."""
        return max(1, round(self.seconds * self.shape.fps))

    @property
    def fps(self) -> float:
        """Rate of the file."""
        return self.smooth_fps or self.shape.fps

    def check(self) -> None:
        """Raises UserError for what cannot be."""
        if not 0 < self.seconds < math.inf:
            raise UserError(
                f"--seconds is {self.seconds:g}; give the length of the video, for example 60"
            )
        if self.smooth_fps and not self.smooth_fps > self.shape.fps:
            raise UserError(
                f"--smooth-fps {self.smooth_fps:g} is no more than the {self.shape.fps:g} frames a second of the "
                "video; give a higher rate, or leave it out"
            )
        own = self.shape.width, self.shape.height
        if self.refined_size and any(
            side < made for side, made in zip(self.refined_size, own, strict=True)
        ):
            width, height = self.refined_size
            raise UserError(
                f"--refine {width}x{height} is smaller than the {own[0]}x{own[1]} that the video is made in; give a "
                "larger size, or leave it out"
            )


def anchor_rate(rates: Sequence[float], shape: ClipShape) -> float:
    """The rate of the anchors: the lowest that was trained, where it is low enough; else 0, none."""
    lowest = min(rates, default=0.0)
    return lowest if 0 < lowest * SPARSE <= shape.fps else 0.0


@dataclass(frozen=True)
class Level:
    """One pass before it is made."""

    name: str
    shape: ClipShape
    frames: int
    windows: list[Window]
    strength: float

    def parts(self, of: ClipShape, maker: Maker) -> Windows | None:
        """Parts of the picture as large as those `of` the model's own, where this is larger."""
        if (self.shape.height, self.shape.width) == (of.height, of.width):
            return None
        whole, part = (
            maker.vae.latent_shape(self.shape.frames, one.height, one.width)[1:]
            for one in (self.shape, of)
        )
        return Windows.over(whole, part, maker.patch)


def levels(request: LongRequest, history: int, step: int, *, anchored: bool) -> list[Level]:
    """The passes, the coarsest first, for windows that are shown `history` frames, of a VAE with this frame step."""
    rates = [("video", request.shape.fps, request.frames, request.anchor_strength)]
    if anchored and request.anchor_fps and request.seconds * request.anchor_fps >= 1:
        count = math.ceil((request.frames - 1) * request.anchor_fps / request.shape.fps) + 1
        rates.insert(0, ("anchors", request.anchor_fps, count, 1.0))
    if request.smooth_fps:
        frames = max(1, round(request.seconds * request.smooth_fps))
        rates.append(("smooth", request.smooth_fps, frames, request.smooth_strength))
    found = []
    for name, fps, frames, strength in rates:
        length = window_length(frames, request.shape.frames, step)
        windows = plan_windows(frames, length, history, step)
        shape = replace(request.shape, frames=length, fps=fps)
        found.append(Level(name, shape, frames, windows, strength))
    if request.refined_size:
        width, height = request.refined_size
        shape = replace(found[-1].shape, width=width, height=height)
        refined = replace(found[-1], name="refined", shape=shape, strength=request.refined_strength)
        found.append(refined)
    return found


def make_long(
    model: Model,
    scripts: Sequence[Script],
    request: LongRequest,
    out: Path,
    *,
    seed: int = 0,
    negative_prompts: Sequence[str] = (),
    batch: int = 16,
    progress: bool = True,
    on_step: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Path]:
    """A video a script as `000.mp4` ... in `out`, windows of all of them made together; returns the files.

    Of several processes each team makes videos of its own, and all of them wait for the last. A job that was killed
    goes on from its last finished window when it is asked for the same again.

    Args:
        negative_prompts: what guidance leads away from, one a script; none: the empty caption.
        on_step: called with the number of steps done here and of all, which some found done.
        settings: as `Model.sample` takes them.

    Raises:
        UserError: what is asked for cannot be.
        Fault: the disk is full; finished windows are kept.
    """
    request.check()
    team, spec = model.team, with_settings(model.spec, settings)
    prompts = {cue.prompt for script in scripts for cue in script.cues if cue.prompt}
    step = model.vae.frame_step
    given = given_of(scripts, request, step)
    anchored = len(prompts) <= len(scripts) and not given
    asked = levels(request, spec.history_frames, step, anchored=anchored)
    paths = [out / f"{number:03d}.mp4" for number in range(len(scripts))]
    numbers = list(team.numbers(len(scripts))) if team else list(range(len(scripts)))
    scripts = [scripts[number] for number in numbers]
    negatives = [(negative_prompts or [""] * len(paths))[number] for number in numbers]
    told = {"spec": spec.to_dict(), "negatives": negatives, "seed": seed, "batch": batch}
    told |= {"numbers": numbers, "given": [[at, _digest(frames)] for at, frames in given]}
    writes = team is None or team.leads
    store = Store(out, identity(model, scripts, request) | told, writes=writes)
    chunks = -(-len(scripts) // batch)
    total = sum(len(level.windows) for level in asked) * chunks * spec.num_steps
    shown = progress and (team is None or team.world.is_main)
    with Progress(total, "sampling", enabled=shown) as bar:
        done = itertools.count(1)
        tell = on_step or (lambda step, _: bar.update(step))
        step_done = lambda: tell(next(done), total)  # noqa: E731
        patch = model.cfg.model.patch_size
        made_with = model.model, model.vae, spec, store, seed, numbers, negatives, batch, step_done
        said = lambda at: [script.prompt_at(at) for script in scripts]  # noqa: E731
        frames = stacked(asked, Maker(*made_with, patch), said, given)
        own = [paths[number] for number in numbers] if writes else []
        write_videos(frames, own, request.fps, store)
    if writes:
        store.remove()
    if team:
        team.wait()
    return paths


def _digest(frames: np.ndarray) -> str:
    return hashlib.sha256(frames.tobytes()).hexdigest()


def identity(model: Model, scripts: Sequence[Script], request: LongRequest) -> dict[str, Any]:
    """What tells the windows of a request from those of others, beside the sampler's settings."""
    base = model.adapted.base
    return {
        "weights": weights_digest(base.checkpoint, base.weights),
        "adapters": [[one.source, one.strength] for one in model.adapted.adapters],
        "dtypes": sorted({str(one.dtype) for one in model.model.parameters()}),
        "request": asdict(request),
        "prompts": [[[cue.at, cue.prompt] for cue in script.cues] for script in scripts],
    }


def given_of(scripts: Sequence[Script], request: LongRequest, step: int) -> list[Run]:
    """The frames that are given to all videos alike, on their whole latent frames."""
    whole = 1 + -(-(request.frames - 1) // step) * step
    given, *others = [script.given(request.shape.fps, whole) for script in scripts]
    if any([at for at, _ in one] != [at for at, _ in given] for one in others):
        raise UserError("videos that are made together have the same given frames; make them apart")
    return given


def stacked(
    asked: list[Level],
    maker: Maker,
    prompts: Callable[[float], list[str]],
    given: Sequence[Run] = (),
) -> Frames:
    """The frames of the finest pass, which pulls those of the coarser ones as it needs them."""
    frames: Frames = iter(())
    coarse: Coarse | None = None
    for level in asked:
        shown = given if level.name == "video" else ()
        parts = level.parts(asked[0].shape, maker)
        made = level.name, maker, level.shape, level.windows, prompts, coarse, shown, parts
        frames = iter(Pass(*made))
        finer = asked[asked.index(level) + 1 :]
        if finer:
            coarse = Coarse(frames, level.shape.fps, finer[0].strength)
    return frames


def write_videos(frames: Frames, paths: Sequence[Path], fps: float, store: Store) -> None:
    """Encode the videos as their frames come; files appear whole. Without paths the frames are made and dropped.

    Raises Fault where the disk is full; finished windows are kept in `store`.
    """
    for path in paths:
        forget_partials(path)
    try:
        with contextlib.ExitStack() as files:
            write = [files.enter_context(open_h264(path, fps)) for path in paths]
            for part in frames:
                for one, clip in zip(write, part, strict=bool(paths)):
                    for frame in clip:
                        one(frame)
    except OSError as error:
        raise store.full(error) from error

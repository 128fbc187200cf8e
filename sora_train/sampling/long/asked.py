"""What a checkpoint makes of a length in seconds or of a storyboard, checked before the model is loaded."""

from dataclasses import replace

from sora_train.errors import UserError
from sora_train.models.vae.autoencoder import read_geometry
from sora_train.sampling.api import CheckpointInfo, fitting_shape
from sora_train.sampling.long.video import LongRequest, anchor_rate
from sora_train.sampling.operations import Prepared
from sora_train.sampling.pipeline import ClipShape
from sora_train.sampling.prompts.placing import with_given
from sora_train.sampling.prompts.script import Script
from sora_train.sampling.prompts.storyboard import Storyboard


def long_request(
    info: CheckpointInfo,
    shape: ClipShape,
    seconds: float,
    *,
    anchor_fps: float | None = None,
    smooth_fps: float = 0.0,
    refined_size: tuple[int, int] | None = None,
) -> LongRequest:
    """A video of so many seconds out of windows of `shape`.

    Args:
        anchor_fps: the rate of the anchors; default: what suits the rates that were trained.

    Raises:
        UserError: the model cannot continue a video, or make this size.
    """
    if info.spec.cond_mode != "replace":
        raise UserError(
            f"--seconds {seconds:g} shows each window the end of the one before in its noisy latents, and this model "
            "takes given frames as channels beside them (cond_mode=concat); take a model of cond_mode=replace"
        )
    anchors = anchor_rate(info.frame_rates, shape) if anchor_fps is None else anchor_fps
    if refined_size:
        geometry = read_geometry(info.cfg.vae)
        fitting_shape(info.cfg, geometry, shape, refined_size, None, None, flag="--refine")
    return LongRequest(seconds, shape, anchors, smooth_fps=smooth_fps, refined_size=refined_size)


def storyboard_window(
    board: Storyboard,
    info: CheckpointInfo,
    size: tuple[int, int] | None,
    fps: float | None,
) -> ClipShape:
    """The shape of a window of the model, of the size and rate asked for; `fps` of the storyboard if None."""
    geometry = read_geometry(info.cfg.vae)
    return fitting_shape(info.cfg, geometry, info.shape, size, None, fps or board.asked.fps)


def takes_windows(board: Storyboard, info: CheckpointInfo, window: ClipShape) -> bool:
    """Whether a storyboard is longer than a window."""
    return board.frames_at(window.fps, read_geometry(info.cfg.vae)) > info.shape.frames


def by_storyboard(
    board: Storyboard, info: CheckpointInfo, window: ClipShape, texts: list[str], *, long: bool
) -> tuple[Prepared, Script | None]:
    """The video of a storyboard, if the model makes it in one piece; else a window of it, and its script.

    `texts`: what the model reads of each prompt.
    """
    cfg, geometry = info.cfg, read_geometry(info.cfg.vae)
    shape = replace(window, frames=board.frames_at(window.fps, geometry))
    by_cue = dict(zip(board.prompts, texts, strict=True))
    script = board.script(shape, geometry, by_cue, cfg.data.alpha_background)
    if long:
        return Prepared(window, "t2v", told=tuple(board.told)), script
    prepared = with_given(script.given(shape.fps, shape.frames), shape, geometry)
    return replace(prepared, told=tuple(board.told)), None

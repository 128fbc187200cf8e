"""One pass over a long video: its windows one after another, for all prompts at once.

A pass may follow a coarser one of fewer frames a second. The anchors are one, from which the windows of the video
take their look; the video itself is one for a second pass at a higher rate. A window then starts, on the latent frames
where the coarse pass has something to say, from the coarse frames and noise at `strength` (SDEdit, Meng et al. 2021,
arXiv:2108.01073), and elsewhere from noise alone.

Dimension key: N videos, F pixel frames, T latent frames.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.diffusion.condition_frames import encode_condition_frames, latent_mask
from sora_train.diffusion.draws import draw_noise
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.pixels import from_uint8
from sora_train.sampling.long.colour import joined
from sora_train.sampling.long.plan import Window
from sora_train.sampling.long.store import Store
from sora_train.sampling.pipeline import (
    ClipShape,
    ConditionLatents,
    decode_clip,
    require_finite_latents,
    sample_latents,
)
from sora_train.sampling.prompts.placing import Run, is_still
from sora_train.sampling.upscale import Windows, in_tiles

Frames = Iterator[np.ndarray]
"""The videos' next frames, uint8 (N, F, H, W, 3), until they end."""


@dataclass(frozen=True)
class Maker:
    """What all windows of all passes are made with."""

    model: nn.Module
    vae: VideoVAE
    spec: DiffusionSpec
    store: Store
    seed: int
    numbers: Sequence[int]
    """Of the videos made here among all that were asked for: their noise is keyed by them."""
    negatives: list[str]
    batch: int
    on_step: Callable[[], None]
    """Called after each step of the sampler, of each batch."""
    patch: tuple[int, int, int] = (1, 1, 1)
    """`model.patch_size`, in whose multiples a picture is divided."""


class Coarse:
    """The frames of a coarser pass as far as a finer one needs them, and no longer."""

    def __init__(self, frames: Frames, fps: float, strength: float):
        self.frames, self.fps, self.strength = frames, fps, strength
        self._held: np.ndarray | None = None
        self._first = 0

    def between(self, first: float, last: float) -> tuple[int, np.ndarray]:
        """(number of the first, frames) that cover the times from `first` to `last` in seconds; earlier ones are
        forgotten."""
        begin, end = int(first * self.fps + 1e-6), int(np.ceil(last * self.fps - 1e-6)) + 1
        while self._held is None or self._first + self._held.shape[1] < end:
            more = next(self.frames, None)
            if more is None:
                break
            self._held = more if self._held is None else np.concatenate([self._held, more], axis=1)
        assert self._held is not None, "a pass has frames"
        begin = min(begin, self._first + self._held.shape[1] - 1)
        # Copied, since a part of an array keeps all of it.
        self._held, self._first = self._held[:, begin - self._first :].copy(), begin
        return begin, self._held[:, : end - begin]


class Pass:
    """Iterating it makes the frames that each window adds, (N, F, H, W, 3)."""

    def __init__(
        self,
        name: str,
        maker: Maker,
        shape: ClipShape,
        windows: Sequence[Window],
        prompts: Callable[[float], list[str]],
        coarse: Coarse | None = None,
        given: Sequence[Run] = (),
        parts: Windows | None = None,
    ):
        """
        Args:
            shape: of a window, and the rate of the pass.
            prompts: those of the N videos that hold at a time in seconds.
            given: frames of all N videos at their places, whole latent frames.
            parts: of the picture, where it is larger than what the model makes at once.
        """
        self.name, self.maker, self.shape, self.windows = name, maker, shape, windows
        self.prompts, self.coarse, self.given, self.parts = prompts, coarse, given, parts

    def __iter__(self) -> Frames:
        history: np.ndarray | None = None
        longest = max((one.history for one in self.windows), default=0)
        for number, window in enumerate(self.windows):
            fresh = self._made(f"{self.name}-{number:04d}", window, history)
            # A short last step may leave less than the next window is shown.
            history = fresh if history is None else np.concatenate([history, fresh], axis=1)
            # Copied, since a part of an array keeps all of it.
            history = history[:, -max(longest, 1) :].copy()
            yield fresh

    def _made(self, name: str, window: Window, shown: np.ndarray | None) -> np.ndarray:
        """The frames (N, F, H, W, 3) that a window adds. All else that was held is let go with the return: a pass waits
        for long while a finer one works."""
        source = self._source(window)
        make = functools.partial(self._latents, name, window, shown, source)
        with in_tiles(self.maker.vae, self.parts):
            latents = self.maker.store.latents(name, make)
            made = [self._frames(one, window, shown, row) for row, one in enumerate(latents)]
        return np.stack([one[: window.end - window.fresh] for one in made])

    def _frames(
        self, latents: Tensor, window: Window, shown: np.ndarray | None, row: int
    ) -> np.ndarray:
        """The frames that a window adds to a video, matched to those it was shown; given videos keep their pixels."""
        vae = self.maker.vae
        clip = decode_clip(vae, latents.to(next(vae.parameters()).device))
        if shown is not None:
            clip = joined(clip, shown[row])
        _, own_F, pixels = self._given_in(window)
        own_F = own_F[-len(clip) :]
        return np.where(own_F[:, None, None, None], pixels[-len(clip) :], clip)

    def _given_in(self, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which frames of a window are given, which of these are a video's (F,), and their pixels (F, H, W, 3)."""
        length = self.shape.frames
        pixels = np.zeros((length, self.shape.height, self.shape.width, 3), np.uint8)
        given_F, own_F = np.zeros(length, bool), np.zeros(length, bool)
        for first, frames in self.given:
            begin, end = max(first, window.start), min(first + len(frames), window.start + length)
            if begin < end:
                place = slice(begin - window.start, end - window.start)
                pixels[place] = frames[begin - first : end - first]
                given_F[place], own_F[place] = True, not is_still(frames)
        return given_F, own_F, pixels

    def _source(self, window: Window) -> tuple[np.ndarray, np.ndarray] | None:
        """The window as the coarse pass has it, (N, F, H, W, 3) blended from frame to frame, and of which frames it
        has one of its own, (F,)."""
        if self.coarse is None:
            return None
        times = (window.start + np.arange(self.shape.frames)) / self.shape.fps
        first, frames = self.coarse.between(times[0], times[-1])
        frames = resized(frames, self.shape)
        place = np.clip(times * self.coarse.fps - first, 0, frames.shape[1] - 1)
        low = np.floor(place + 1e-6).astype(int)
        part = np.clip(place - low, 0, 1)[:, None, None, None].astype(np.float32)
        high = np.minimum(low + 1, frames.shape[1] - 1)
        blended = np.stack([(1 - part) * one[low] + part * one[high] for one in frames])
        at = times * self.coarse.fps
        own = np.abs(at - np.rint(at)) < 0.5 * self.coarse.fps / self.shape.fps - 1e-6
        return np.rint(blended).astype(np.uint8), own

    def _latents(
        self,
        name: str,
        window: Window,
        shown: np.ndarray | None,
        source: tuple[np.ndarray, np.ndarray] | None,
    ) -> Tensor:
        """Latents (N, C, T, H, W) of a window of all videos."""
        maker, prompts = self.maker, self.prompts(window.fresh / self.shape.fps)
        shape = maker.vae.latent_shape(self.shape.frames, self.shape.height, self.shape.width)
        device = next(maker.vae.parameters()).device
        spec = maker.spec
        if shown is not None and spec.history_shift:
            spec = spec.replace(shift=spec.history_shift)
        found = []
        for start in range(0, len(prompts), maker.batch):
            rows = range(start, min(start + maker.batch, len(prompts)))
            keys = [(0, maker.numbers[row]) for row in rows]
            noise = draw_noise(maker.seed, f"sample {name}", keys, shape)
            conditions = self._conditions(rows, window, shown, source)
            made = sample_latents(
                maker.model,
                spec,
                prompts[rows.start : rows.stop],
                noise.to(device),
                self.shape.told_fps,
                negative_prompt=maker.negatives[rows.start : rows.stop],
                conditions=conditions,
                condition_noise=spec.history_noise,
                on_step=lambda _: maker.on_step(),
            )
            require_finite_latents(made, {row: prompts[row] for row in rows}, spec)
            found.append(made)
        return torch.cat(found)

    @torch.no_grad()
    def _conditions(
        self,
        rows: range,
        window: Window,
        shown: np.ndarray | None,
        source: tuple[np.ndarray, np.ndarray] | None,
    ) -> ConditionLatents | None:
        """What some of the videos' next window is shown, and starts from."""
        given_F, _, given = self._given_in(window)
        if shown is None and source is None and not given_F.any():
            return None
        vae, count = self.maker.vae, 0 if shown is None else shown.shape[1]
        device = next(vae.parameters()).device
        factor, shape = vae.temporal_factor, self.shape
        num_frames = vae.latent_shape(shape.frames, shape.height, shape.width)[1]
        mask_F = ((torch.arange(shape.frames) < count) | torch.from_numpy(given_F)).float()
        mask_T = latent_mask(mask_F, factor)
        strength_T = torch.ones(num_frames)
        if source is not None and self.coarse is not None:
            own_F = torch.from_numpy(source[1]).float()
            own_T = torch.cat([own_F[:1], own_F[1:].view(-1, factor).amax(dim=1)])
            if self.coarse.fps * factor >= shape.fps:
                own_T = torch.ones(num_frames)
            strength_T = torch.where(own_T > 0, self.coarse.strength, 1.0)
        latents = []
        for row in rows:
            pixels = np.zeros((shape.frames, shape.height, shape.width, 3), np.uint8)
            if source is not None:
                pixels = source[0][row].copy()
            pixels[given_F] = given[given_F]
            if shown is not None:
                pixels[:count] = shown[row]
            clip = from_uint8(pixels[None], device)
            one = vae.encode(clip) if source is not None else None
            if mask_F.any():
                head = encode_condition_frames(vae.encode, clip, mask_F, factor, vae.frame_step)
                one = (
                    head
                    if one is None
                    else torch.where(mask_T[:, None, None].to(head) > 0, head, one)
                )
            assert one is not None
            latents.append(one.float())
        conditions_T = mask_T.to(device) if mask_F.any() else None
        from_T = strength_T.to(device) if source is not None else None
        return ConditionLatents(torch.cat(latents), conditions_T, from_T, windows=self.parts)


def resized(frames: np.ndarray, shape: ClipShape) -> np.ndarray:
    """Videos uint8 (N, F, H, W, 3) at the size of `shape`, by cubic interpolation."""
    size = shape.height, shape.width
    if frames.shape[2:4] == size:
        return frames
    found = [
        F.interpolate(
            torch.from_numpy(clip).movedim(-1, 1).float(), size, mode="bicubic", antialias=True
        )
        for clip in frames
    ]
    return torch.stack(found).round_().clamp_(0, 255).byte().movedim(2, -1).numpy()

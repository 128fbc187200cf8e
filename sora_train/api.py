"""The public API: `sora_train.load(RUN).sample(prompts)`; `sora sample` is a thin skin over it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sora_train import checkpoint as checkpoints
from sora_train.config import Config
from sora_train.config.compose import load_yaml
from sora_train.config.messages import validated
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.distributed import pick_device
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae import VideoVAE
from sora_train.sample_folder import save_clips
from sora_train.sampling import ClipShape, sample_clips


class Model:
    """A trained text-to-video model with its VAE and the diffusion spec it was trained under."""

    def __init__(
        self,
        cfg: Config,
        spec: DiffusionSpec,
        model: TextToVideo,
        vae: VideoVAE,
        shape: ClipShape,
        step: int,
    ):
        self.cfg, self.spec, self.shape, self.step = cfg, spec, shape, step
        self.model, self.vae = model.eval(), vae

    def sample(
        self,
        prompts: list[str],
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        num: int = 1,
        on_clip: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """`num` clips a prompt, those of one prompt next to each other, uint8 (T, H, W, 3) each.

        Args:
            size: (width, height) in pixels; default: that of most training clips.
            frames: frames of a clip; default: that of most training clips.
            fps: frame rate the model is told and clips are meant to be played at.
            seed: clip i starts from noise keyed by (seed, i).
            steps: sampler steps; default: the spec's.
            guidance_scale: classifier-free guidance, 1 is none; default: the spec's.
            on_clip: called with the number of clips done.

        Raises:
            UserError: no prompt, or a size or length the VAE and the patches cannot make.
        """
        if not prompts or num < 1:
            raise UserError(
                f"nothing to sample: {len(prompts)} prompts, num={num}; give a prompt and num >= 1"
            )
        shape = self.clip_shape(size, frames, fps)
        changes: dict[str, Any] = {"num_steps": steps, "guidance_scale": guidance_scale}
        try:
            spec = self.spec.replace(
                **{key: value for key, value in changes.items() if value is not None}
            )
        except ValueError as error:
            raise UserError(f"{error}; change steps or guidance_scale") from error
        repeated = [prompt for prompt in prompts for _ in range(num)]
        return sample_clips(
            self.model, self.vae, spec, repeated, shape, seed=seed, on_batch=on_clip
        )

    def save(
        self,
        clips: list[np.ndarray],
        labels: list[str],
        out: Path,
        *,
        fps: float | None = None,
        seed: int = 0,
    ) -> list[Path]:
        """Write H.264 mp4 files, contact_sheet.png and prompts.json into `out`.

        `seed` is the one the clips were sampled with; it is noted beside them.
        """
        return save_clips(
            Path(out), clips, labels, fps=fps or self.shape.fps, seeds=[seed] * len(clips)
        )

    def clip_shape(
        self, size: tuple[int, int] | None, frames: int | None, fps: float | None
    ) -> ClipShape:
        """The wanted shape, gaps filled from the bucket that most training clips were in, checked."""
        multiple = self.vae.spatial_factor * max(self.cfg.model.patch_size[1:])
        width, height = size or (self.shape.width, self.shape.height)
        if width % multiple or height % multiple or min(width, height) < multiple:
            raise UserError(
                f"--size {width}x{height} does not fit the model: width and height must be multiples of {multiple}"
            )
        count = frames or self.shape.frames
        self.vae.latent_shape(count, height, width)
        return ClipShape(count, height, width, fps or self.shape.fps)


def shipped_config(run_dir: Path) -> Config:
    """The run's config without the top-level keys that a project's own Config added; strict in all it keeps.

    They were checked when the run began, and a model of one's own is refused by its weights.
    """
    values = load_yaml(run_dir / "config.yaml")
    return validated(
        Config, {key: value for key, value in values.items() if key in Config.model_fields}
    )


def load(
    run: str | Path, *, step: int | None = None, weights: str = "ema", device: str = "auto"
) -> Model:
    """The model of a run folder, or of `RUN@STEP`.

    Args:
        run: a folder that `sora train` wrote, optionally with `@step` behind it.
        step: which checkpoint; default: the newest complete one.
        weights: `ema` (averaged, what samples are meant to be made with) or `live`.

    Raises:
        UserError: no such run or checkpoint, or the checkpoint is not one of a text-to-video model.
    """
    folder, at, suffix = str(run).rpartition("@")
    if at and suffix.isdigit() and not Path(run).exists():
        run, step = folder, int(suffix)
    if weights not in ("ema", "live"):
        raise UserError(f"weights={weights!r} is neither 'ema' nor 'live'")
    found = checkpoints.find(Path(run), step)
    state = found.state()
    if state["task"] != "text_to_video":
        raise UserError(
            f"{run} trained a {state['task']}, which cannot be sampled from; give a text_to_video run"
        )
    cfg = shipped_config(Path(run))
    vae = VideoVAE.from_config(cfg.vae)
    try:
        spec = DiffusionSpec.from_dict(state["spec"])
    except ValueError as error:
        raise UserError(
            f"{found.path} cannot be sampled from: {error}; use the version of sora_train that wrote it"
        ) from error
    if vae.digest() != spec.vae_digest:
        raise UserError(
            f"{run} was trained on the latents of another VAE than vae.path={cfg.vae.path!r} now holds; "
            "restore that folder"
        )
    model = TextToVideo(cfg.model, cfg.text, seed=cfg.seed)
    names = dict(model.named_parameters())
    prefix = {"ema": "ema.", "live": "model."}[weights]
    tensors: dict[str, Tensor] = {
        f"{prefix}{name}": value.detach() for name, value in names.items()
    }
    checkpoints.load_part(found, tensors, prefix)
    target = pick_device(device)
    return Model(
        cfg, spec, model.to(target), vae.to(target), ClipShape(**state["sample_shape"]), found.step
    )

"""Builds the one diffusion spec from the config and the parts it names; stored in every checkpoint."""

from torch import nn

from sora_train.config import Config
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae import VideoVAE


def build_spec(cfg: Config, vae: VideoVAE, model: nn.Module) -> DiffusionSpec | None:
    """None for a task without diffusion."""
    if not isinstance(model, TextToVideo):
        return None
    objective = cfg.objective
    return DiffusionSpec(
        prediction="velocity",
        time_law=objective.time_law,
        time_mean=objective.time_mean,
        time_std=objective.time_std,
        mode_scale=objective.mode_scale,
        shift=objective.shift,
        shift_rule=objective.shift_rule,
        caption_dropout=objective.caption_dropout,
        num_steps=objective.num_steps,
        guidance_scale=objective.guidance_scale,
        solver=objective.solver,
        latent_channels=vae.channels,
        vae_digest=vae.digest(),
        text_digest="trained with the model" if cfg.text.trainable else model.text_digest(),
        text_padding=cfg.text.padding,
        conditioning=(("t2v", 1.0 - objective.i2v_fraction), ("i2v", objective.i2v_fraction)),
    )

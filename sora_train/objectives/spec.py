"""Builds the one diffusion spec from the config and the parts it names; stored in every checkpoint."""

import math

from torch import nn

from sora_train.config import Config
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import ConfigError
from sora_train.models.text_to_video import TextToVideo, VideoDenoiser
from sora_train.models.vae.autoencoder import VideoVAE


def build_spec(cfg: Config, vae: VideoVAE, model: nn.Module) -> DiffusionSpec | None:
    """None for a task without diffusion. Raises ConfigError when model and VAE do not fit."""
    if not isinstance(model, VideoDenoiser):
        return None
    if isinstance(model, TextToVideo):
        check_channels(cfg.objective.cond_mode, vae, model)
    encoder = model.image_encoder() if isinstance(model, TextToVideo) else None
    text_digest = "" if cfg.text.trainable else model.text_digest()
    return spec_of(cfg, vae, text_digest, encoder.digest() if encoder else "")


def spec_of(cfg: Config, vae: VideoVAE, text_digest: str, image_digest: str = "") -> DiffusionSpec:
    """The spec of a config, its VAE, and the digests of its frozen text encoder and of its image encoder."""
    objective = cfg.objective
    return DiffusionSpec(
        prediction="velocity",
        time_law=objective.time_law,
        time_mean=objective.time_mean,
        time_std=objective.time_std,
        mode_scale=objective.mode_scale,
        shift=objective.shift,
        shift_rule=objective.shift_rule,
        high_noise_share=objective.high_noise_share,
        high_noise_from=objective.high_noise_from,
        expert=cfg.model.expert,
        boundary=cfg.model.boundary if cfg.model.expert else 0.0,
        weighting=objective.weighting,
        min_snr_gamma=objective.min_snr_gamma,
        caption_dropout=objective.caption_dropout,
        num_steps=objective.num_steps,
        guidance_scale=objective.guidance_scale,
        guidance_scale_2=objective.guidance_scale_2,
        folded_guidance=cfg.distill.guidance_scale if cfg.distill.teacher else 0.0,
        condition_scale=objective.condition_scale,
        guidance_from=objective.guidance_from,
        guidance_to=objective.guidance_to,
        guidance_rescale=objective.guidance_rescale,
        solver=objective.solver,
        time_grid=objective.time_grid,
        time_rounding=objective.time_rounding,
        latent_channels=vae.channels,
        vae_digest=vae.digest(),
        vae_dtype=str(vae.dtype).removeprefix("torch."),
        vae_normalisation=vae.kind.normalisation,
        text_dtype=cfg.text.dtype,
        text_digest="trained with the model" if cfg.text.trainable else text_digest,
        image_digest=image_digest,
        image_dtype=cfg.image.dtype,
        text_padding=cfg.text.padding,
        conditioning=objective.mix,
        cond_mode=objective.cond_mode,
        condition_noise_share=objective.condition_noise_share,
        condition_noise_max=objective.condition_noise_max,
        condition_dropout=objective.condition_dropout,
        frame_noise_share=objective.frame_noise_share,
        history_frames=objective.history_frames,
        history_noise=objective.history_noise,
        history_shift=objective.history_shift,
    )


def check_channels(cond_mode: str, vae: VideoVAE, model: TextToVideo) -> None:
    """Raises ConfigError when the model's input or output does not fit the VAE's latents."""
    latents, transformer = vae.channels, model.transformer
    if transformer.cfg.images and cond_mode != "concat":
        raise ConfigError(
            f"model.image_dim={transformer.cfg.image_dim} and objective.cond_mode={cond_mode}: a model that is given "
            "embeddings of its first frame has that frame as input channels too; set objective.cond_mode=concat"
        )
    extra = f" (latents, a mask of {vae.temporal_factor} and condition latents)"
    needed, source = (
        (2 * latents + vae.temporal_factor, f"objective.cond_mode=concat{extra}")
        if cond_mode == "concat"
        else (latents, "the VAE's latents")
    )
    if transformer.cfg.in_channels != needed:
        raise ConfigError(
            f"model.in_channels is {transformer.cfg.in_channels}, and {source} takes {needed}; set "
            f"model.in_channels={needed}"
        )
    made = transformer.proj_out.weight.shape[0] // math.prod(transformer.cfg.patch_size)
    if made != latents:
        raise ConfigError(
            f"the model puts out {made} channels and the VAE's latents have {latents}; set "
            f"model.out_channels={latents}"
        )

"""Writes a trained VAE as a folder other runs name in `vae.path`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import to_pixels
from sora_train.parallel.shards import full

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer

FOLDER = "vae"
STATISTICS_CLIPS = 256


def export(trainer: "Trainer") -> None:
    """Gather the weights, measure the latents' mean and deviation, write `vae/` in the run folder.

    Stored in float16: half the size, and far finer than what the weights are known to.
    """
    weights = whole_weights(trainer)
    if not trainer.world.is_main:
        return
    vae = VideoVAE.from_config(trainer.cfg.vae)
    vae.load_state_dict(weights)
    vae.set_latent_stats(*vae.measure_latent_stats(pixel_batches(trainer)))
    vae.save(trainer.folder.path / FOLDER, dtype=torch.float16)


def whole_weights(trainer: "Trainer") -> dict[str, torch.Tensor]:
    """Parameters, gathered one at a time, and buffers by name, on the CPU; a collective."""
    model = trainer.engine.model
    found = {
        name: value.cpu() for name, value in model.named_buffers() if name in model.state_dict()
    }
    for name, value in trainer.engine.model_state().items():
        found[name] = full(value).cpu()
    return found


def pixel_batches(trainer: "Trainer") -> Iterator[torch.Tensor]:
    """Pixels of training clips, a few hundred of them, on the CPU."""
    seen = 0
    for _, clips, _ in trainer.data.loader.chunks(trainer.data.loader.cache_chunks(8)):
        if clips:
            seen += len(clips)
            yield to_pixels(clips, torch.device("cpu"))
        if seen >= STATISTICS_CLIPS:
            return

"""The frozen VAE and text encoder on the host, once all clips and captions are in the cache (`memory.encode_first`)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE


def release_encoders(vae: VideoVAE, model: nn.Module, device: torch.device) -> None:
    """Move both to the host, after the embedding of the empty caption was kept, which steps go on asking for."""
    vae.to("cpu")
    if isinstance(model, TextToVideo) and model.text_encoder is None:
        model.keep_null_embedding(device)
        model.frozen_encoder.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def encoders_at_hand(vae: VideoVAE, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the VAE is on the device, and the text encoder comes there when it is asked; afterwards both are
    where they were."""
    away = next(vae.parameters()).device != device
    vae.to(device)
    try:
        yield
    finally:
        if away:
            release_encoders(vae, model, device)

"""Keys and values of captions, made once a clip: the same velocities as when every step makes them, and made once."""

import pytest
import torch

from sora_train.config.compose import compose
from sora_train.diffusion.draws import draw_noise
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives.spec import build_spec
from sora_train.sampling.pipeline import sample_latents

PROMPTS = ["a red circle", "a blue square moves left"]


@pytest.mark.parametrize(
    ("overrides", "change", "makings"),
    [
        (["text.trainable=false", "text.padding=wan"], {}, 1),
        (["text.padding=masked"], {"guidance_from": 0.5}, 2),
        (["text.padding=masked"], {"guidance_scale": 1.0}, 1),
        (["model.expert=both", "text.trainable=false"], {"boundary": 0.6}, 2),
        (["model.expert=both"], {"boundary": 0.6, "guidance_from": 0.3}, 3),
    ],
)
def test_captions_are_worked_on_once_a_clip(
    overrides: list[str], change: dict[str, float], makings: int
) -> None:
    """`makings`: once for each expert, with and without guidance."""
    cfg = compose(["experiment=parity_tiny", *overrides]).config
    model = TextToVideo(cfg.model, cfg.text).eval()
    spec = build_spec(cfg, VideoVAE.from_config(cfg.vae), model)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    model.double()
    channels = cfg.model.in_channels
    noise = draw_noise(0, "sample", [(0, 0), (0, 1)], (channels, 2, 4, 6)).double()
    spec = spec.replace(**{"num_steps": 4, "guidance_scale": 3.0, "time_grid": "even", **change})
    calls: list[str] = []
    for name, part in model.named_modules():
        if name.endswith("text_embedder"):
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected = sample_latents(model, spec, PROMPTS, noise, 8.0)
    assert len(calls) == 4
    calls.clear()
    model.stays = True
    got = sample_latents(model, spec, PROMPTS, noise, 8.0)
    assert len(calls) == makings
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert (got - noise).abs().max() > 0.01


def test_training_keeps_nothing() -> None:
    """Its weights change, and may be sharded: only `sora_train.load` says that they stay."""
    cfg = compose(["experiment=parity_tiny"]).config
    assert not TextToVideo(cfg.model, cfg.text).stays

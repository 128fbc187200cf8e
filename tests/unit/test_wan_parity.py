"""The transformer is Wan's, number for number: Wan 2.1, Wan 2.2 with a noise level a token, the layout that takes
given latents beside the noisy ones, and those that attend to embeddings of the first frame, or of first and last."""

import math

import pytest
import torch
from torch import Tensor

from sora_train.config.sections.model import ModelConfig
from sora_train.models.transformer.dit import VideoDiT

SIZES = dict(num_layers=2, num_heads=4, head_dim=24, ffn_dim=80, text_dim=12, freq_dim=32)
KINDS = {
    "wan 2.1": dict(in_channels=16),
    "wan 2.2 ti2v": dict(in_channels=48),
    "wan 2.1 i2v, 36 channels": dict(in_channels=36, out_channels=16),
    "wan 2.1 i2v": dict(in_channels=36, out_channels=16, image_dim=20, image_tokens=5),
    "wan 2.1 flf2v": dict(
        in_channels=36, out_channels=16, image_dim=20, image_tokens=5, image_pair=True
    ),
    "wan 2.1, one wide head": dict(in_channels=16, num_heads=1, head_dim=128),
}
SHAPES = [(1, 2, 2, 1, 1), (3, 6, 10, 7, 2), (5, 2, 14, 3, 1)]
"""Latent frames, rows, columns, caption tokens, batch."""


def diffusers_wan(cfg: ModelConfig) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=cfg.num_heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.in_channels,
        out_channels=cfg.velocity_channels,
        text_dim=cfg.text_dim,
        freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        rope_max_seq_len=64,
        image_dim=cfg.image_dim or None,
        added_kv_proj_dim=cfg.dim if cfg.image_dim else None,
        pos_embed_seq_len=2 * cfg.image_tokens if cfg.image_pair else None,
    )


@pytest.fixture
def true_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' hard-coded float32 casts and float32 sinusoid lifted, so that float64 stays float64."""
    import diffusers.models.embeddings as embeddings

    to_float = torch.Tensor.float

    def keep_double(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x if x.dtype == torch.float64 else to_float(x, *args, **kwargs)

    def exact_sinusoid(timesteps: Tensor, embedding_dim: int, **kwargs: object) -> Tensor:
        half = embedding_dim // 2
        angles = timesteps[:, None].double() * torch.exp(
            -math.log(10000) * torch.arange(half).double() / half
        )
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    monkeypatch.setattr(torch.Tensor, "float", keep_double)
    monkeypatch.setattr(embeddings, "get_timestep_embedding", exact_sinusoid)


def pair(kind: str, dtype: torch.dtype) -> tuple[VideoDiT, torch.nn.Module]:
    """Ours and diffusers', with the same random weights, none of them zero."""
    cfg = ModelConfig(**(SIZES | KINDS[kind]))
    wan, ours = diffusers_wan(cfg).to(dtype), VideoDiT(cfg).to(dtype)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wan.named_parameters():
            drawn = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            parameter.copy_(drawn / math.prod(parameter.shape[1:]) ** 0.5 + ("norm" in name))
    ours.load_state_dict(wan.state_dict(), strict=True)
    wan.load_state_dict(ours.state_dict(), strict=True)
    return ours, wan


def batch(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    frames, rows, columns, text, clips = shape
    # Where there are images, diffusers takes the last 512 of all keys for the caption's.
    text = 512 if "image_dim" in KINDS[kind] else text
    draws = torch.Generator().manual_seed(2)
    size = clips, KINDS[kind]["in_channels"], frames, rows, columns
    latents = torch.randn(size, generator=draws, dtype=torch.float64)
    t_BT = torch.rand(clips, frames, generator=draws, dtype=torch.float64)
    captions = torch.randn(clips, text, SIZES["text_dim"], generator=draws, dtype=torch.float64)
    return latents.to(dtype), t_BT.to(dtype), captions.to(dtype)


def images(kind: str, clips: int, dtype: torch.dtype) -> Tensor | None:
    """Embeddings of every clip's images, one image after the other."""
    cfg = ModelConfig(**(SIZES | KINDS[kind]))
    size = clips, cfg.images * cfg.image_tokens, cfg.image_dim
    draws = torch.Generator().manual_seed(3)
    drawn = torch.randn(size, generator=draws, dtype=torch.float64).to(dtype)
    return drawn if cfg.image_dim else None


def as_diffusers(found: Tensor | None, kind: str) -> Tensor | None:
    """The same as the pipeline gives them: a row an image, two rows a clip where there are two."""
    pair = KINDS[kind].get("image_pair")
    return found.reshape(2 * len(found), -1, found.shape[-1]) if pair else found


def levels(kind: str, t_BT: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(ours, diffusers'): a level a frame and the same a token for Wan 2.2, else one a clip."""
    _, rows, columns, _, _ = shape
    if "2.2" in kind:
        t_BT = t_BT.clone()
        t_BT[:, 0] = 0  # a given first frame
        return t_BT, (t_BT * 1000).repeat_interleave(rows // 2 * (columns // 2), dim=1)
    return t_BT[:, :1].expand_as(t_BT), t_BT[:, 0] * 1000


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("attention", ["math", "gemm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_every_gradient_are_those_of_diffusers_in_float64(
    kind: str, shape: tuple[int, ...], attention: str, true_fp64: None
):
    ours, wan = pair(kind, torch.float64)
    for module in ours.modules():
        if hasattr(module, "backend"):
            module.backend = attention
    latents, t_BT, captions = batch(kind, shape, torch.float64)
    mine, theirs = levels(kind, t_BT, shape)
    seen = images(kind, len(latents), torch.float64)
    inputs = [x.requires_grad_() for x in (latents, captions, seen) if x is not None]

    expected = wan(latents, theirs, captions, as_diffusers(seen, kind), return_dict=False)[0]
    found = ours(latents, mine, captions, images_BIE=seen)
    assert expected.dtype == found.dtype == torch.float64
    assert relative(found, expected) <= 1e-12

    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    named = dict(ours.named_parameters())
    wanted = torch.autograd.grad((expected * cotangent).sum(), [*wan.parameters(), *inputs])
    got = torch.autograd.grad(
        (found * cotangent).sum(), [*(named[name] for name, _ in wan.named_parameters()), *inputs]
    )
    assert len(wanted) == len(named) + len(inputs)
    # A lone caption token gets all attention whatever the query: those gradients are zero but for rounding.
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for name, a, b in zip(
        [*dict(wan.named_parameters()), *"xci"[: len(inputs)]], got, wanted, strict=True
    ):
        if float(b.abs().max()) > 1e-12 * scale:
            assert relative(a, b) <= 1e-11, (
                name
            )  # sums that cancel, added in another order on other processors
        else:
            assert float(a.abs().max()) <= 1e-12 * scale, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_agrees_in_float32(kind: str, shape: tuple[int, ...]):
    ours, wan = pair(kind, torch.float32)
    latents, t_BT, captions = batch(kind, shape, torch.float32)
    mine, theirs = levels(kind, t_BT, shape)
    with torch.no_grad():
        seen = images(kind, len(latents), torch.float32)
        expected = wan(latents, theirs, captions, as_diffusers(seen, kind), return_dict=False)[0]
        assert relative(ours(latents, mine, captions, images_BIE=seen), expected) <= 1e-5


def test_wan_padding_is_that_of_the_pipeline():
    """`text.padding=wan` attends to zeros up to the limit, as WanPipeline embeds a prompt; no mask is given."""
    ours, wan = pair("wan 2.1", torch.float64)
    latents, t_BT, captions = batch("wan 2.1", SHAPES[1], torch.float64)
    padded = torch.cat([captions, captions.new_zeros(2, 4, 12)], dim=1)
    mask = torch.arange(11).expand(2, 11) < 7
    mine, theirs = levels("wan 2.1", t_BT, SHAPES[1])
    with torch.no_grad():
        expected = wan(latents, theirs, padded, return_dict=False)[0]
        assert relative(ours(latents, mine, padded), expected) < 1e-4
        assert relative(ours(latents, mine, padded, mask), expected) > 1e-3

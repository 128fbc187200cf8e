"""The transformer is Wan's, number for number, plus extras that start without effect."""

import math

import pytest
import torch
import torch.nn.functional as F

from sora_train.config.model import ModelConfig
from sora_train.errors import ConfigError
from sora_train.models.attention import AttentionCore, gemm_attention
from sora_train.models.dit import VideoDiT

SIZES = dict(
    num_layers=2, num_heads=4, head_dim=24, ffn_dim=80, in_channels=5, text_dim=12, freq_dim=32
)


def build(seed=0, dtype=torch.float64, **changes) -> VideoDiT:
    model = VideoDiT(ModelConfig(**(SIZES | changes)))
    model.init_weights(seed)
    with torch.no_grad():
        # The zero output layer would hide every difference behind it.
        model.proj_out.weight.copy_(
            torch.randn(model.proj_out.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    return model.to(dtype)


def inputs(dtype=torch.float64, grid=(3, 4, 6), text=7, batch=2):
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 5, *grid, generator=g, dtype=dtype)
    t_BT = torch.rand(batch, grid[0], generator=g, dtype=dtype)
    t_BT[:, 0] = 0
    return latents, t_BT, torch.randn(batch, text, 12, generator=g, dtype=dtype)


@pytest.fixture
def wan_in_fp64(monkeypatch):
    """diffusers' model with its hard-coded float32 casts and float32 sinusoid lifted, so that
    float64 stays float64."""
    import diffusers.models.embeddings as embeddings
    from diffusers import WanTransformer3DModel

    to_float = torch.Tensor.float

    def keep_double(x, *args, **kwargs):
        return x if x.dtype == torch.float64 else to_float(x, *args, **kwargs)

    def exact_sinusoid(timesteps, embedding_dim, **kwargs):
        half = embedding_dim // 2
        angles = timesteps[:, None].double() * torch.exp(
            -math.log(10000) * torch.arange(half).double() / half
        )
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    monkeypatch.setattr(torch.Tensor, "float", keep_double)
    monkeypatch.setattr(embeddings, "get_timestep_embedding", exact_sinusoid)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=5,
        out_channels=5,
        text_dim=12,
        freq_dim=32,
        ffn_dim=80,
        num_layers=2,
        rope_max_seq_len=64,
    ).double()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_equals_diffusers_wan_forward_and_every_gradient(wan_in_fp64):
    wan, ours = wan_in_fp64, build()
    ours.load_state_dict(wan.state_dict(), strict=True)
    wan.load_state_dict(ours.state_dict(), strict=True)
    latents, t_BT, captions = inputs()
    per_token = (t_BT * 1000).repeat_interleave(2 * 3, dim=1)

    expected = wan(latents, per_token, captions, return_dict=False)[0]
    got = ours(latents, t_BT, captions)
    assert relative(got, expected) < 1e-10

    cotangent = torch.randn_like(expected)
    (expected * cotangent).sum().backward()
    (got * cotangent).sum().backward()
    theirs = dict(wan.named_parameters())
    for name, param in ours.named_parameters():
        assert relative(param.grad, theirs[name].grad) < 1e-10, name


def test_stock_wan_agrees_in_float32():
    from diffusers import WanTransformer3DModel

    ours = build(dtype=torch.float32)
    wan = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=5,
        out_channels=5,
        text_dim=12,
        freq_dim=32,
        ffn_dim=80,
        num_layers=2,
        rope_max_seq_len=64,
    )
    wan.load_state_dict(ours.state_dict(), strict=True)
    latents, _, captions = inputs(torch.float32)
    t_B = torch.tensor([0.25, 0.75])
    expected = wan(latents, t_B * 1000, captions, return_dict=False)[0]
    assert relative(ours(latents, t_B[:, None].expand(2, 3), captions), expected) < 1e-5


def test_extras_have_no_effect_until_trained_and_take_part_in_backward():
    plain, extended = build(), build(mask_channel=True, fps_embed=True)
    latents, t_BT, captions = inputs()
    mask_BT, fps_B = torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.tensor([8.0, 24.0])
    expected = plain(latents, t_BT, captions)
    got = extended(latents, t_BT, captions, mask_BT=mask_BT, fps_B=fps_B)
    assert torch.equal(got, expected)
    got.square().sum().backward()
    assert extended.mask_proj.weight.grad.abs().max() > 0
    assert extended.fps_proj.weight.grad.abs().max() > 0
    extra = set(extended.state_dict()) - set(plain.state_dict())
    assert extra == {"mask_proj.weight", "fps_proj.weight"}


def test_every_parameter_has_a_gradient_even_without_conditioning():
    model = build(mask_channel=True, fps_embed=True)
    latents, t_BT, captions = inputs()
    model(latents, t_BT, captions, fps_B=torch.tensor([8.0, 8.0])).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("backend", ["sdpa", "gemm"])
def test_masked_caption_tokens_have_no_influence(backend):
    model = build(attention=backend)
    latents, t_BT, captions = inputs()
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    changed = captions.clone()
    changed[1, 3:] = 100.0
    expected = model(latents, t_BT, captions, mask)
    torch.testing.assert_close(model(latents, t_BT, changed, mask), expected, rtol=0, atol=1e-12)
    alone = model(latents[1:], t_BT[1:], captions[1:, :3])
    torch.testing.assert_close(alone, expected[1:], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(model(latents, t_BT, changed), expected)


def test_noise_level_acts_on_its_own_frame():
    """Without attention between tokens, frame f of the output depends on t_f alone."""
    model = build()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    latents, t_BT, captions = inputs()
    changed = t_BT.clone()
    changed[:, 1] = 0.9
    difference = (
        (model(latents, changed, captions) - model(latents, t_BT, captions))
        .abs()
        .amax(dim=(0, 1, 3, 4))
    )
    assert difference[1] > 1e-6
    assert difference[0] == difference[2] == 0


@pytest.mark.parametrize("grid", [(1, 2, 2), (2, 6, 4), (5, 2, 8)])
def test_any_grid_works(grid):
    latents, t_BT, captions = inputs(grid=grid)
    assert build()(latents, t_BT, captions).shape == latents.shape


def test_first_prediction_is_zero_and_weights_are_keyed_by_name():
    model = VideoDiT(ModelConfig(**SIZES))
    model.init_weights(3)
    latents, t_BT, captions = inputs(torch.float32)
    assert torch.equal(model(latents, t_BT, captions), torch.zeros_like(latents))

    deeper = VideoDiT(ModelConfig(**(SIZES | {"num_layers": 4, "mask_channel": True})))
    values = dict(deeper.initial_values(3))
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert not torch.equal(
        dict(model.initial_values(4))["blocks.0.ffn.net.2.weight"],
        model.blocks[0].ffn.net[2].weight,
    )
    assert not torch.equal(
        values["blocks.0.attn1.to_q.weight"], values["blocks.0.attn1.to_k.weight"]
    )


def test_gemm_attention_equals_sdpa_even_in_chunks(monkeypatch):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (10, 7, 7))
    bias = torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    bias[1, ..., 4:] = float("-inf")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    monkeypatch.setattr("sora_train.models.attention.MAX_SCORES", 2 * 3 * 7 * 4)
    torch.testing.assert_close(gemm_attention(q, k, v, bias), expected, rtol=1e-12, atol=1e-12)


def test_auto_takes_gemm_only_for_bfloat16_on_cpu():
    core = AttentionCore("auto")
    assert core._use_gemm(torch.zeros(1, dtype=torch.bfloat16))
    assert not core._use_gemm(torch.zeros(1))


def test_unknown_attention_backend_is_refused():
    with pytest.raises(ConfigError, match="flash9"):
        AttentionCore("flash9")


def test_bfloat16_weights_keep_norms_and_residual_in_float32():
    exact, rounded = build(dtype=torch.float32), build(dtype=torch.bfloat16)
    latents, t_BT, captions = inputs(torch.float32)
    t_BT = torch.full_like(t_BT, 0.9973)
    seen = {}
    rounded.blocks[1].register_forward_hook(
        lambda m, args, out: seen.update(x=args[0].dtype, modulation=args[2].dtype)
    )
    got = rounded(latents, t_BT, captions)
    assert got.dtype == torch.float32
    assert seen == {"x": torch.float32, "modulation": torch.float32}
    assert relative(got, exact(latents, t_BT, captions)) < 0.05
    # 997.3 would be 996 in bfloat16; the embedding must tell 0.9973 from 0.996.
    near = rounded(latents, torch.full_like(t_BT, 0.996), captions)
    assert not torch.equal(near, got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 5, 3, 5, 6)}, "do not divide"),
        ({"latents": torch.zeros(2, 4, 3, 4, 6)}, "channels"),
        ({"t": torch.zeros(2)}, "a level a latent frame"),
        ({"mask": torch.zeros(2, 3)}, "mask_channel"),
        ({"fps": torch.ones(2)}, "fps_embed"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    latents, t_BT, captions = inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        build(dtype=torch.float32)(
            change.get("latents", latents),
            change.get("t", t_BT),
            captions,
            mask_BT=change.get("mask"),
            fps_B=change.get("fps"),
        )


def test_flops_match_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = build(dtype=torch.float32, attention="gemm")
    latents, t_BT, captions = inputs(torch.float32, batch=1)
    with FlopCounterMode(display=False) as counter:
        model(latents, t_BT, captions)
    assert model.flops(3 * 2 * 3, 7, num_frames=3) == counter.get_total_flops()


@pytest.mark.parametrize(
    "bad", [{"head_dim": 23}, {"patch_size": (2, 2, 2)}, {"freq_dim": 33}, {"depth": 3}]
)
def test_impossible_sizes_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ModelConfig(**(SIZES | bad))

"""The transformer: extras without effect until trained, what each input may act on, what it refuses."""

import pytest
import torch
from sentences import refuses

from sora_train.config.sections.model import ModelConfig
from sora_train.errors import UserError
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.transformer.rope import rope_table

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


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


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


@pytest.mark.parametrize(
    ("grid", "facts"),
    [
        ((3, 5, 6), ("5x6", "2x2", "model.patch_size")),
        ((9, 4, 6), ("9 latent frames", "model.rope_max_length=8")),
        ((3, 18, 6), ("9 rows",)),
        ((3, 4, 18), ("9 columns",)),
    ],
)
def test_clips_that_the_patches_or_positions_do_not_take_are_refused(grid, facts):
    model = build(dtype=torch.float32, rope_max_length=8)
    with refuses(UserError, *facts):
        model(*inputs(torch.float32, grid))


def test_wan_has_1024_positions():
    assert ModelConfig().rope_max_length == 1024


def test_a_bucket_past_the_positions_is_refused_before_any_clip_is_read(parity_config):
    from sora_train.models.vae.autoencoder import read_geometry
    from sora_train.training.pipeline.plan import bucket_table

    cfg = parity_config("model.rope_max_length=1")
    with refuses(UserError, "longer", "model.rope_max_length=1"):
        bucket_table(cfg, read_geometry(cfg.vae), cfg.model.patch_size)


def test_unequal_patches_divide_every_bucket(parity_config):
    from sora_train.models.vae.autoencoder import read_geometry
    from sora_train.training.pipeline.plan import bucket_table

    cfg = parity_config("model.patch_size=[1,2,3]", "buckets=tiny")
    for spec in bucket_table(cfg, read_geometry(cfg.vae), cfg.model.patch_size):
        assert spec.bucket.height // 8 % 6 == spec.bucket.width // 8 % 6 == 0


def test_a_batch_of_two_is_two_batches_of_one():
    model = build(mask_channel=True, fps_embed=True)
    latents, t_BT, captions = inputs()
    mask_BT, fps_B = torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.tensor([8.0, 24.0])
    both = model(latents, t_BT, captions, mask_BT=mask_BT, fps_B=fps_B)
    for row in (slice(0, 1), slice(1, 2)):
        alone = model(
            latents[row], t_BT[row], captions[row], mask_BT=mask_BT[row], fps_B=fps_B[row]
        )
        torch.testing.assert_close(alone, both[row], rtol=1e-12, atol=1e-12)


def test_a_new_block_whose_modulation_is_zero_is_the_identity_but_for_captions():
    """Gates of zero close both branches; what attends to the caption has no gate in Wan and is closed by
    its output layer."""
    model = build()
    block = model.blocks[0]
    torch.nn.init.zeros_(block.scale_shift_table)
    for parameter in block.attn2.to_out.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 6, 96, dtype=torch.float64)
    table = rope_table((3, 2, 3), 24, x.device, x.dtype)
    captions = torch.randn(2, 7, 96, dtype=torch.float64)
    closed = torch.zeros(2, 3, 6, 96, dtype=torch.float64)
    assert torch.equal(block(x, captions, closed, table, None), x)
    assert not torch.equal(block(x, captions, closed + 0.1, table, None), x)


def test_given_latents_beside_the_noisy_ones_come_in_and_only_a_velocity_goes_out():
    model = build(in_channels=5 + 4 + 5, out_channels=5)
    latents, t_BT, captions = inputs()
    mask, given = torch.ones(2, 4, 3, 4, 6), torch.randn(2, 5, 3, 4, 6)
    beside = torch.cat([latents, mask.double(), given.double()], dim=1)
    assert model(beside, t_BT, captions).shape == latents.shape
    assert ModelConfig(in_channels=7).velocity_channels == 7


def test_flops_match_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    for sizes in ({}, {"out_channels": 3}):
        model = build(dtype=torch.float32, attention="gemm", **sizes)
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

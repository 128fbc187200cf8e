"""The VAE: shapes and factors of every kind of architecture, standardised latents, strict and
atomic files."""

import json

import pytest
import torch
from sentences import refuses

from sora_train.config.sections.model import VaeConfig
from sora_train.errors import ConfigError, UserError
from sora_train.models.vae.autoencoder import VideoVAE

# name: (arch, temporal factor, spatial factor)
ONE_BLOCK = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
TINY = ONE_BLOCK | {"dim_mult": [1, 1, 1], "temperal_downsample": [True, True]}
PATCHES = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True}
ARCHS = {
    "time4": (TINY, 4, 4),
    "time2": (TINY | {"z_dim": 3, "temperal_downsample": [False, True]}, 2, 4),
    "space": (ONE_BLOCK | {"dim_mult": [1, 1], "temperal_downsample": [False]}, 1, 2),
    "patched": (TINY | PATCHES, 4, 8),
}


@pytest.mark.parametrize("name", ARCHS)
def test_shapes_and_factors(name):
    arch, temporal, spatial = ARCHS[name]
    vae = VideoVAE(arch)
    assert (vae.temporal_factor, vae.spatial_factor, vae.channels) == (
        temporal,
        spatial,
        arch["z_dim"],
    )
    for frames in (1, 9):
        pixels = torch.rand(1, 3, frames, 16, 24) * 2 - 1
        latents = vae.encode(pixels)
        assert latents.shape[1:] == vae.latent_shape(frames, 16, 24)
        assert latents.dtype == torch.float32
        assert not latents.requires_grad
        decoded = vae.decode(latents)
        assert decoded.shape == pixels.shape
        assert decoded.abs().max() <= 1


def test_every_frame_reaches_the_latents():
    """A class that dropped trailing frames silently would fail here."""
    for arch, _, _ in ARCHS.values():
        vae = VideoVAE(arch)
        pixels = torch.zeros(1, 3, 9, 16, 16)
        base = vae.encode(pixels)
        for frame in range(9):
            changed = pixels.clone()
            changed[:, :, frame] = 1.0
            assert not torch.equal(vae.encode(changed), base), frame


def test_forward_is_decode_without_the_clamp():
    for arch, _, _ in ARCHS.values():
        vae = VideoVAE(arch, trainable=True)
        pixels = torch.rand(2, 3, 5, 16, 16) * 2 - 1
        got, mean, log_variance = vae(pixels)
        torch.testing.assert_close(got.clamp(-1, 1), vae.decode(vae.encode(pixels)))
        noisy, _, _ = vae(pixels, lambda shape: torch.ones(2, *shape))
        assert not torch.equal(noisy, got)
        (noisy.square().mean() + log_variance.square().mean()).backward()
        assert [n for n, p in vae.named_parameters() if p.grad is None] == []


def test_latents_are_standardised_with_the_stored_statistics():
    vae = VideoVAE(TINY)
    clips = [torch.rand(2, 3, 5, 16, 16) * 2 - 1 for _ in range(3)]
    raw_decode = vae.decode(vae.encode(clips[0]))
    before = vae.digest()
    vae.set_latent_stats(*vae.measure_latent_stats(clips))
    latents = torch.cat([vae.encode(clip) for clip in clips])
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        latents.std(dim=(0, 2, 3, 4), correction=0), torch.ones(4), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(vae.decode(vae.encode(clips[0])), raw_decode, rtol=1e-4, atol=1e-5)
    assert vae.digest() != before
    with pytest.raises(UserError, match="empty"):
        vae.measure_latent_stats([])


def test_moments_are_those_of_the_class_and_standardise_to_the_latents():
    vae = VideoVAE(TINY, seed=2)
    vae.set_latent_stats([0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 3.0])
    pixels = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    mean, log_variance = vae.encode_moments(pixels)
    posterior = vae.autoencoder.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(log_variance, posterior.logvar)
    assert mean.dtype == log_variance.dtype == torch.float32
    assert torch.equal(vae.standardise(mean), vae.encode(pixels))
    raw = torch.tensor([0.5, -1.0, 0.0, 5.0]).view(1, 4, 1, 1, 1)
    assert vae.standardise(raw).flatten().tolist() == [0.0, 0.0, 0.0, 1.0]


def test_save_and_load_are_exact_and_diffusers_reads_them(tmp_path):
    from diffusers import AutoencoderKLWan

    vae = VideoVAE(TINY, seed=5)
    vae.set_latent_stats([0.5] * 4, [2.0] * 4)
    vae.save(tmp_path / "vae")
    again = VideoVAE.from_config(VaeConfig(path=str(tmp_path / "vae")))
    assert again.digest() == vae.digest()
    assert sorted(p.name for p in (tmp_path / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    theirs = AutoencoderKLWan.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    assert all(
        torch.equal(v, vae.autoencoder.state_dict()[k]) for k, v in theirs.state_dict().items()
    )
    assert theirs.config.latents_std == [2.0] * 4

    vae.save(tmp_path / "vae", dtype=torch.float16)
    half = VideoVAE.load(tmp_path / "vae")
    assert half.dtype == torch.float32
    assert half.digest() == VideoVAE.load(tmp_path / "vae").digest() != vae.digest()


def test_random_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = VideoVAE(TINY, seed=3)
    assert torch.equal(torch.rand(1), expected), (
        "building a VAE must not move the process's generator"
    )
    assert VideoVAE(TINY, seed=3).digest() == first.digest() != VideoVAE(TINY, seed=4).digest()


def test_frozen_unless_asked_and_dtype_from_the_config():
    frozen = VideoVAE.from_config(VaeConfig(arch=TINY, dtype="bfloat16"))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert frozen.dtype == torch.bfloat16
    assert frozen.encode(torch.zeros(1, 3, 1, 8, 8)).dtype == torch.float32
    assert all(
        p.requires_grad
        for p in VideoVAE.from_config(VaeConfig(arch=TINY), trainable=True).parameters()
    )


def test_clips_that_do_not_fit_are_refused_in_a_sentence():
    vae = VideoVAE(ARCHS["time2"][0])
    with pytest.raises(UserError, match=r"7 frames.*1 \+ k \* 4"):
        vae.encode(torch.zeros(1, 3, 7, 16, 16))
    with pytest.raises(UserError, match="multiples of 4"):
        vae.latent_shape(5, 16, 18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperal_downsample": [True]}, "temperal_downsample"),
        ({"patch_size": 2}, "in_channels"),
        ({"scale_factor_spatial": 8}, "contradict"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"width": 8}, "AutoencoderKLWan"),
        ({"dim_mult": [1] * 4, "temperal_downsample": [True] * 3}, "temporal factor of 8"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        VideoVAE(TINY | change)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        VideoVAE.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="ships"):
        VideoVAE.from_config(VaeConfig(path="shipped:nothing"))
    VideoVAE(TINY).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"base_dim": 16}))
    with refuses(UserError, "not those", "config"):
        VideoVAE.load(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be read"):
        VideoVAE.load(tmp_path)
    with pytest.raises(ValueError, match="both given"):
        VaeConfig(path="a", arch=TINY)

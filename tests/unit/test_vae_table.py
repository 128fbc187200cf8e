"""Published VAEs: small random models of the real classes, stored and loaded through the real path."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from sentences import refuses

from sora_train.config.compose import compose
from sora_train.config.sections.model import VaeConfig
from sora_train.data.sample import Clip
from sora_train.diffusion.condition_masks import frame_mask
from sora_train.errors import ConfigError, UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE, read_geometry
from sora_train.models.vae.pixels import from_uint8
from sora_train.models.vae.published import KINDS
from sora_train.objectives import TextToVideoObjective
from sora_train.objectives.spec import build_spec, spec_of
from sora_train.sampling.pipeline import ConditionFrames, encode_conditions
from sora_train.training.pipeline.plan import require_cacheable

CPU = torch.device("cpu")

HUNYUAN = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
COGVIDEOX = HUNYUAN | {"sample_height": 32, "sample_width": 32}
WAN = {
    "base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "dim_mult": [1, 1, 1, 1],
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.5, 0.0, -0.5, 1.0],
    "latents_std": [2.0, 1.0, 0.5, 3.0],
}
MODELS = {
    "AutoencoderKLWan": WAN,
    "AutoencoderKLHunyuanVideo": HUNYUAN,
    "AutoencoderKLCogVideoX": COGVIDEOX,
}


def stored(name: str, folder: Path) -> torch.nn.Module:
    """A small random model of the class, written by diffusers itself."""
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**MODELS[name]).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_published_vae_says_what_its_own_class_says(name, tmp_path):
    theirs = stored(name, tmp_path / "vae")
    # A pipeline's folder is as good as the VAE's own.
    cfg = VaeConfig(path=str(tmp_path))
    vae = VideoVAE.from_config(cfg)
    assert type(vae.autoencoder) is type(theirs)
    assert read_geometry(cfg) == vae.geometry
    frames = 1 + 3 * vae.frame_step
    pixels = torch.rand(1, 3, frames, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        mean, log_variance = vae.encode_moments(pixels)
        assert torch.equal(mean, posterior.mean)
        assert torch.equal(log_variance, posterior.logvar)
        latents = vae.encode(pixels)
        assert latents.shape[1:] == vae.latent_shape(frames, 16, 24)
        if name == "AutoencoderKLWan":
            shape = (1, -1, 1, 1, 1)
            expected = (mean - torch.tensor(WAN["latents_mean"]).view(shape)) / torch.tensor(
                WAN["latents_std"]
            ).view(shape)
        else:
            expected = mean * theirs.config.scaling_factor
        torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)
        decoded = vae.decode(latents)
        assert decoded.shape == pixels.shape
        # As the class's own pipeline undoes it.
        factor = theirs.config.get("scaling_factor")
        raw = vae._restore(latents) if factor is None else latents / factor
        torch.testing.assert_close(raw, mean, rtol=1e-5, atol=1e-5)
        assert torch.equal(decoded, theirs.decode(raw).sample.clamp(-1, 1))


def frames_of(vae: VideoVAE, seed: int) -> np.ndarray:
    """A clip of four latent frames or more, uint8 (F, 16, 16, 3)."""
    count = 1 + 2 * max(vae.frame_step, 8)
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_table_says_which_vae_sees_later_frames(name: str, tmp_path: Path):
    """The first latent frames are the same whatever comes later, or they are not."""
    stored(name, tmp_path)
    vae = VideoVAE.load(tmp_path)
    pixels = from_uint8(frames_of(vae, 0)[None], CPU)
    other = from_uint8(frames_of(vae, 1)[None], CPU)
    moved = []
    for known in (1, 2, 3):
        frames = 1 + vae.temporal_factor * (known - 1)
        future = torch.cat([pixels[:, :, :frames], other[:, :, frames:]], dim=2)
        moved.append(float((vae.encode(future) - vae.encode(pixels))[:, :, :known].abs().max()))
    assert vae.causal == (max(moved) == 0) == (moved[0] == 0), moved


@pytest.mark.parametrize("latents", ["mode", "sample"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_given_frames_are_the_same_in_training_and_in_sampling(
    name: str, latents: str, tmp_path: Path
):
    """Whatever the VAE sees of later frames, which sampling does not have, and whether the clip is a draw or a mean."""
    stored(name, tmp_path)
    vae = VideoVAE.load(tmp_path)
    cfg = compose(["experiment=parity_tiny"]).config
    spec = spec_of(cfg, vae, "")
    objective = TextToVideoObjective(cfg, spec, vae, CPU)
    clip = Clip(3, 0, frames_of(vae, 0), None, 8.0, "noise", "")
    mean = vae.encode(from_uint8(clip.pixels[None], CPU))
    # Stored latents are the mean of the whole clip; where they do, a clip may come without its pixels.
    shelf = dataclasses.replace(clip, latents=mean[0].numpy(), logvar=np.zeros_like(mean[0]))
    kinds = [("i2v", 0.0), ("extend", 0.5), ("i2v_both", 0.0), ("extend_back", 0.4)]
    for (kind, u), one in itertools.product(kinds, (clip, shelf)):
        mask_T = frame_mask(kind, mean.shape[2], u)
        shown = objective.encode_batch(
            [one], [kind], mask_T[None], sample_posterior=latents == "sample"
        )
        given = shown.x if shown.condition_latents is None else shown.condition_latents
        # In sampling the frames that are not given hold anything.
        request = ConditionFrames(clip.pixels.copy(), kind, mask_T)
        request.pixels[request.known_frames(vae).numpy() == 0] = 7
        expected = encode_conditions(request, vae, spec).latents
        of_condition = mask_T > 0
        torch.testing.assert_close(
            given[:, :, of_condition], expected[:, :, of_condition], rtol=0, atol=1e-5
        )
    bare = dataclasses.replace(shelf, pixels=None)
    mask_BT = frame_mask("i2v", mean.shape[2], 0.0)[None]
    if vae.causal:
        objective.encode_batch([bare], ["i2v"], mask_BT, sample_posterior=latents == "sample")
    else:
        with refuses(UserError, "stored latents", name, "t2v alone"):
            objective.encode_batch([bare], ["i2v"], mask_BT, sample_posterior=latents == "sample")


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_of_latents_is_refused_where_given_frames_need_pixels(name: str, tmp_path: Path):
    stored(name, tmp_path)
    vae = VideoVAE.load(tmp_path)
    tiny = ["experiment=parity_tiny", "data.cache=latents"]
    require_cacheable(compose([*tiny, "objective.conditioning.i2v=0"]).config, vae)
    given = compose([*tiny, "objective.conditioning.i2v=0.1"]).config
    if vae.causal:
        return require_cacheable(given, vae)
    with refuses(ConfigError, "data.cache=latents", "data.cache=none", name, "t2v alone"):
        require_cacheable(given, vae)


@pytest.mark.parametrize("name", MODELS)
def test_frames_outside_the_rule_are_refused(name, tmp_path):
    stored(name, tmp_path)
    vae = VideoVAE.load(tmp_path)
    step = KINDS[name].frame_step
    assert vae.frame_step == step
    with pytest.raises(UserError, match=rf"1 \+ k \* {step} frames"):
        vae.encode(torch.zeros(1, 3, 1 + step // 2, 16, 16))


@pytest.mark.parametrize("name", MODELS)
def test_storing_again_keeps_class_and_digest(name, tmp_path):
    stored(name, tmp_path / "a")
    vae = VideoVAE.load(tmp_path / "a")
    vae.save(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["_class_name"] == name
    assert VideoVAE.load(tmp_path / "b").digest() == vae.digest()


def test_the_digest_knows_the_normalisation(tmp_path):
    stored("AutoencoderKLHunyuanVideo", tmp_path)
    before = VideoVAE.load(tmp_path).digest()
    rewrite(tmp_path, scaling_factor=0.5)
    assert VideoVAE.load(tmp_path).digest() != before


def test_shift_and_factor(tmp_path):
    stored("AutoencoderKLCogVideoX", tmp_path)
    rewrite(tmp_path, scaling_factor=0.7, shift_factor=0.25)
    vae = VideoVAE.load(tmp_path)
    raw = torch.tensor([0.25, 1.25]).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(vae.standardise(raw).flatten(), torch.tensor([0.0, 0.7]))
    torch.testing.assert_close(vae._restore(vae.standardise(raw)), raw)


@pytest.mark.parametrize("name", ["AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX"])
def test_other_classes_take_tiles_their_own_way(name, tmp_path):
    stored(name, tmp_path)
    vae = VideoVAE.from_config(VaeConfig(path=str(tmp_path), tile=32))
    latents = torch.randn(1, 4, 1, 8, 8)
    with torch.no_grad():
        assert vae.decode(latents).shape == (1, 3, 1, 64, 64)
        assert vae.autoencoder.use_tiling
        assert vae.encode(torch.zeros(1, 3, 1, 64, 64)).shape == latents.shape


def test_rows_say_what_the_classes_build():
    """Channels and factors of the table are those of the classes' defaults, which are as published."""
    for name, kind in KINDS.items():
        cls = getattr(diffusers, name)
        with torch.device("meta"):
            config = dict(cls().config)
        channels = config.get("latent_channels", config.get("z_dim"))
        time = config.get("temporal_compression_ratio", config.get("scale_factor_temporal"))
        assert (channels, time) == (kind.channels, kind.temporal_factor)


@pytest.mark.parametrize(
    ("name", "latents", "parameters"),
    [("wan_2_1", (16, 4, 8), 126_892_531), ("wan_2_2", (48, 4, 16), 704_688_668)],
)
def test_wans_sizes_are_configs(name, latents, parameters):
    cfg = compose([f"vae={name}"]).config.vae
    geometry = read_geometry(cfg)
    assert (geometry.channels, geometry.temporal_factor, geometry.spatial_factor) == latents
    with torch.device("meta"):
        wan = diffusers.AutoencoderKLWan(**cfg.arch)
    assert sum(p.numel() for p in wan.parameters()) == parameters


def test_the_spec_records_precision_and_convention(tmp_path):
    stored("AutoencoderKLHunyuanVideo", tmp_path)
    cfg = compose(["experiment=parity_tiny", "model.in_channels=4"]).config
    model = TextToVideo(cfg.model, cfg.text)
    vae = VideoVAE.from_config(VaeConfig(path=str(tmp_path), dtype="bfloat16"))
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    assert (spec.vae_dtype, spec.vae_normalisation) == ("bfloat16", "scale")
    assert (spec.vae_digest, spec.text_dtype) == (vae.digest(), "float32")
    own = build_spec(cfg, VideoVAE(WAN), model)
    assert own is not None
    assert (own.vae_dtype, own.vae_normalisation) == ("float32", "per_channel")


def rewrite(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_what_cannot_be_used_is_told_in_a_sentence(tmp_path, monkeypatch):
    stored("AutoencoderKLWan", tmp_path)
    rewrite(tmp_path, latents_std=None)
    with refuses(ConfigError, "latents_std"):
        VideoVAE.load(tmp_path)
    rewrite(tmp_path, _class_name="AutoencoderKLMochi")
    for read in (VideoVAE.load, lambda path: read_geometry(VaeConfig(path=str(path)))):
        with refuses(ConfigError, "AutoencoderKLMochi", "not known"):
            read(tmp_path)

    stored("AutoencoderKLHunyuanVideo", tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with refuses(UserError, "diffusion_pytorch_model.safetensors"):
        VideoVAE.load(tmp_path)
    stored("AutoencoderKLHunyuanVideo", tmp_path)
    with refuses(ConfigError, "task=vae", "AutoencoderKLWan"):
        VideoVAE.load(tmp_path, trainable=True)
    rewrite(tmp_path, scaling_factor=None)
    with pytest.raises(ConfigError, match="no scaling_factor"):
        VideoVAE.load(tmp_path)
    rewrite(tmp_path, scaling_factor=0.5)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(__version__="0.30"))
    with refuses(ConfigError, "diffusers", "0.30", "AutoencoderKLHunyuanVideo"):
        VideoVAE.load(tmp_path)


def test_a_hub_id_without_a_network_is_refused(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with refuses(UserError, "vae.path=someone/some-vae"):
        VideoVAE.from_config(VaeConfig(path="someone/some-vae"))

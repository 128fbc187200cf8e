"""Decoding and encoding in pieces: what comes out is what comes out at once, and memory follows the
piece, not the clip."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses
from torch.utils._python_dispatch import TorchDispatchMode

from sora_train.config.sections.model import VaeConfig
from sora_train.errors import ConfigError
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.pixels import to_uint8
from sora_train.models.vae.stream import decoder_margin, encoder_margin, tiles
from sora_train.sampling.pipeline import decode_clip

ARCH = {
    "base_dim": 4,
    "z_dim": 3,
    "num_res_blocks": 1,
    "dim_mult": [1, 1, 2],
    "temperal_downsample": [False, True],
}
ARCHS = {
    "wan 2.1": ARCH,
    "wan 2.2": ARCH
    | {
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "is_residual": True,
        "temperal_downsample": [True, True],
        "dim_mult": [1, 2, 2],
    },
}


def build(name: str = "wan 2.1") -> VideoVAE:
    """Weights of ordinary size everywhere, so that whatever a layer does is seen in the result."""
    vae = VideoVAE(ARCHS[name])
    g = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        if parameter.ndim > 3:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=g) * 1.4 / fan_in**0.5
    vae.set_latent_stats([0.1, -0.2, 0.3], [1.5, 0.5, 2.0])
    return vae


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(frames)
    return torch.rand(1, 3, frames, height, width, generator=g) * 2 - 1


@pytest.mark.parametrize("name", ARCHS)
def test_streamed_in_time_is_the_classs_own_result_bit_by_bit(name):
    vae = build(name)
    pixels = clip(9, 16, 24)
    latents = vae.encode(pixels)
    theirs = vae.autoencoder.encode(pixels).latent_dist.mean
    assert torch.equal(latents, vae.standardise(theirs))
    decoded = vae.autoencoder.decode(theirs).sample
    mean, std = vae._stats(theirs)
    assert torch.equal(vae.decode(latents), vae.autoencoder.decode(latents * std + mean).sample)
    torch.testing.assert_close(
        vae.decode(latents), decoded, rtol=0, atol=1e-4
    )  # statistics taken off and put on again
    frames = [where[1].stop - where[1].start for where, _ in vae.decode_pieces(latents)]
    assert sum(frames) == 9
    assert max(frames) == vae.temporal_factor


@pytest.mark.parametrize("name", ARCHS)
def test_tiles_are_exact(name):
    vae = build(name)
    size = 4 * vae.spatial_factor
    pixels = clip(5, size + size // 2, 5 * size)
    latents = vae.encode(pixels)
    at_once = vae.decode(latents)
    vae.use_tiles(size)
    torch.testing.assert_close(vae.encode(pixels), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), at_once, rtol=0, atol=1e-5)
    assert len({str(where[2:]) for where, _ in vae.decode_pieces(latents)}) == 2 * 5
    assert np.array_equal(decode_clip(vae, latents[0]), to_uint8(vae.decode(latents)[0]))


@pytest.mark.parametrize("kind", ["decoder_margin", "encoder_margin"])
def test_a_narrower_margin_would_show(kind, monkeypatch):
    """The margins are needed: half of one already changes the result."""
    vae = build()
    pixels = clip(5, 16, 96)
    latents = vae.encode(pixels)
    at_once = vae.decode(latents)
    exact = {"decoder_margin": decoder_margin, "encoder_margin": encoder_margin}[kind]
    monkeypatch.setattr(
        f"sora_train.models.vae.stream.{kind}", lambda config: exact(config) // 2 - 1
    )
    vae.use_tiles(32)
    got, expected = (
        (vae.decode(latents), at_once) if "decoder" in kind else (vae.encode(pixels), latents)
    )
    assert (got - expected).abs().max() > 1e-4


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.integers(0, 9))
def test_tiles_cover_a_frame_once_and_see_their_margin(height, width, size, margin):
    seen = torch.zeros(height, width)
    frame = torch.arange(height * width).view(height, width)
    for tile in tiles(height, width, size, margin):
        tile.write(seen, tile.cut(tile.read(seen)) + 1)
        assert torch.equal(tile.cut(tile.read(frame)), frame[tile.inner])
        for inner, outer, length in zip(tile.inner, tile.outer, (height, width), strict=True):
            assert outer.start == max(inner.start - margin, 0)
            assert outer.stop == min(inner.stop + margin, length)
            assert size == 0 or inner.stop - inner.start <= size
    assert (seen == 1).all()


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.note(value.untyped_storage())
        return out

    def note(self, storage):
        import weakref

        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.alive.pop(key, 0)


def peak_bytes(vae: VideoVAE, latents: torch.Tensor) -> int:
    """The most bytes alive while a clip is decoded and each piece is dropped."""
    with torch.no_grad(), LiveBytes() as live:
        for _ in vae.decode_pieces(latents):
            pass
    return live.peak


def test_the_count_of_live_bytes_sees_what_is_made_and_dropped():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        for _ in range(5):
            a = a + 1
    assert live.peak == 2 * 4000
    assert live.now == 4000


def test_memory_of_decoding_does_not_grow_with_the_clip():
    vae = build()
    short, long = (torch.randn(1, 3, frames, 8, 8) for frames in (6, 31))
    latents_grow = (long.nbytes - short.nbytes) * 4
    assert peak_bytes(vae, long) <= peak_bytes(vae, short) + latents_grow
    with torch.no_grad(), LiveBytes() as at_once:
        raw = vae._restore(long)
        vae.autoencoder.decode(raw)
    assert at_once.peak > 2 * peak_bytes(vae, long)


def test_memory_of_decoding_follows_the_tile():
    vae = build()
    latents = torch.randn(1, 3, 3, 8, 64)
    whole = peak_bytes(vae, latents)
    vae.use_tiles(32)
    assert peak_bytes(vae, latents) < 0.6 * whole


def test_a_tile_of_no_latents_is_refused():
    with refuses(ConfigError, "vae.tile=30", "spatial factor", "4"):
        VideoVAE.from_config(VaeConfig(arch=ARCH, tile=30))
    assert VideoVAE.from_config(VaeConfig(arch=ARCH, tile=32)).tile == 32

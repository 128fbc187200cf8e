"""The cache's entries and what its folder says of itself; the draw from stored moments against float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.data.latents.cache import LatentCache, TextCache
from sora_train.data.latents.provenance import (
    FILE_NAME,
    decoder_name,
    differences,
    read_made_with,
    require_same,
    write_made_with,
)
from sora_train.diffusion.draws import draw_noise
from sora_train.errors import UserError
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives.posterior import draw_latents, encode_posterior

KEY = "ab12" * 10
LATENTS = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)


def test_what_was_stored_to_be_drawn_from_serves_the_mode_too(tmp_path: Path):
    cache = LatentCache(tmp_path)
    cache.put(KEY, LATENTS)
    assert cache.has(KEY) and not cache.has(KEY, logvar=True) and cache.size(KEY, True) is None
    cache.put(KEY, LATENTS, LATENTS - 1)
    assert cache.has(KEY, logvar=True) and cache.size(KEY, True) == 2 * cache.size(KEY)
    assert np.array_equal(cache.get(KEY), LATENTS)
    assert np.array_equal(cache.get(KEY, True), LATENTS - 1)


def test_embeddings_are_found_by_caption_and_encoder(tmp_path: Path):
    embedding = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    cache = TextCache(tmp_path, "a" * 64)
    assert cache.put("a red circle", embedding)
    assert np.array_equal(cache.get("a red circle"), embedding)
    assert cache.get("a red square") is None
    assert TextCache(tmp_path, "b" * 64).get("a red circle") is None
    path = cache.path("a red circle")
    path.write_bytes(path.read_bytes()[:-2])
    assert cache.get("a red circle") is None and not path.exists()


def test_the_bound_holds_over_processes(tmp_path: Path):
    """Every writer counts what is there before it; a folder never holds more than its share."""
    bound = 256 * 1500
    stored = 0
    for _ in range(3):
        cache = TextCache(tmp_path, "a" * 64, bound)
        stored += sum(
            cache.put(f"caption {n}", np.zeros((8, 16), np.float32))
            for n in range(900)
            if not cache.has(f"caption {n}")
        )
    files = list(tmp_path.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert stored == len(files) and 0.4 * bound < size <= bound
    assert not TextCache(tmp_path / "none", "a" * 64, 0).put("a", np.zeros((1, 1), np.float32))


words = st.text("abc ", min_size=1, max_size=4)
sections = st.dictionaries(words, st.dictionaries(words, words, max_size=3), max_size=3)


@settings(max_examples=60, deadline=None)
@given(sections, sections)
def test_a_table_tells_what_differs_and_nothing_else(there: dict, now: dict):
    table = differences(there, now)
    both = [name for name in now if name in there]
    assert bool(table) == any(there[name] != now[name] for name in both)
    wrong = sum(
        there[name].get(part) != now[name].get(part)
        for name in both
        for part in {*there[name], *now[name]}
    )
    assert len(table.splitlines()) == (wrong + 1 if wrong else 0)


def test_a_folder_of_other_settings_is_refused_with_both_values(tmp_path: Path):
    made = {"latents": {"VAE": "a" * 64, "decoder": decoder_name("pyav")}}
    assert "libavcodec" in made["latents"]["decoder"]
    require_same(tmp_path / "new", made, "data.cache_dir")
    write_made_with(tmp_path, made)
    write_made_with(tmp_path, {"text": {"text encoder": "c"}})
    require_same(tmp_path, made, "data.cache_dir")
    assert read_made_with(tmp_path) == {**made, "text": {"text encoder": "c"}}
    now = {"latents": {**made["latents"], "VAE": "b" * 64}, "text": {"text encoder": "c"}}
    with pytest.raises(UserError, match=f"data.cache_dir=.*\n.*\n +VAE +{'a' * 64} +{'b' * 64}$"):
        require_same(tmp_path, now, "data.cache_dir")
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        require_same(tmp_path, made, "data.cache_dir")


def test_a_draw_of_standardised_moments_is_that_of_raw_ones():
    """In float64 by the textbook: sample the raw posterior, then standardise."""
    arch = {
        "base_dim": 4, "z_dim": 3, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True],
        "latents_mean": [0.5, -3.0, 40.0], "latents_std": [2.0, 0.1, 7.0],
    }  # fmt: skip
    vae = VideoVAE(arch)
    pixels = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw_mean, raw_logvar = (part.double() for part in vae.encode_moments(pixels))
        mean, logvar = encode_posterior(vae, pixels)
        assert torch.equal(mean, vae.encode(pixels))
    keys = [(0, 5), (3, 1)]
    noise = draw_noise(7, "posterior", keys, mean.shape[1:]).double()
    m, s = (
        torch.tensor(arch[name]).double().view(1, 3, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    wanted = (raw_mean + (0.5 * raw_logvar).exp() * noise - m) / s
    torch.testing.assert_close(
        draw_latents(mean, logvar, 7, keys).double(), wanted, rtol=1e-4, atol=1e-4
    )
    other = draw_latents(mean, logvar, 7, [(1, 5), (3, 1)])
    assert not torch.equal(other[0], draw_latents(mean, logvar, 7, keys)[0])

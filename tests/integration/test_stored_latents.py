"""Shards of latents: training from them is training from the clips, and what does not belong is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentences import refuses

from sora_train.config.compose import compose
from sora_train.data.latents import members as stored
from sora_train.data.manifest import Manifest
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.tools.data.command import encode_source
from sora_train.training.trainer import Trainer

FROZEN = ("text.trainable=false",)
UNSEEN = "validation.every=0"


def overrides(folder: Path, *more: str) -> list[str]:
    return ["experiment=parity_tiny", f"run.dir={folder}", *more]


def sources(output: Path) -> tuple[str, str]:
    return f"data.source={output / 'train'}", f"data.val_source={output / 'val'}"


def test_the_output_is_whole_and_holds_no_clip(encoded: Path):
    assert sorted(path.name for path in encoded.iterdir()) == ["train", "val"]
    manifest = Manifest.load(encoded / "train" / "manifest.parquet")
    assert set(manifest.kind) == set(manifest.codec) == {"latents"}
    for row in range(len(manifest)):
        latents, text = stored.stored_of(manifest.members[row])
        assert (
            latents
            and text
            and (latents.offset, latents.length)
            == (
                manifest.offset[row],
                manifest.length[row],
            )
        )
        assert latents.pixels.frames == manifest.frames[row] and latents.fps == manifest.fps[row]


TOLD = (*FROZEN, "model.fps_embed=true", "data.stored_text=ignore")
SAMPLED = "data.latents=sample"


@pytest.mark.parametrize("latents", ["data.latents=mode", SAMPLED])
def test_training_from_latents_is_training_from_the_cache(
    latents: str, encoded: Path, clips: tuple[str, str], trained: Callable
):
    # With a cache on both sides captions are encoded alone on both.
    cached = trained(*TOLD, latents, *clips, "data.cache=latents")
    shards = trained(*TOLD, latents, *sources(encoded), "data.cache=auto")
    assert len(shards) == 3 and "val/loss" in shards[-1]
    assert shards == cached


def test_a_draw_is_another_number_each_epoch_and_never_in_validation(
    encoded: Path, trained: Callable
):
    mode = trained(*TOLD, "data.latents=mode", *sources(encoded), "data.cache=auto")
    drawn = trained(*TOLD, SAMPLED, *sources(encoded), "data.cache=auto")
    losses = [[row["train/loss"] for row in rows] for rows in (mode, drawn)]
    assert all(a != b for a, b in zip(*losses, strict=True))


def test_stored_embeddings_are_those_of_the_run(encoded: Path, trained: Callable):
    plain = trained(*TOLD, "data.latents=mode", *sources(encoded), "data.cache=auto")
    text = trained(*FROZEN, "model.fps_embed=true", "data.latents=mode", *sources(encoded))
    for a, b in zip(plain, text, strict=True):
        # A caption encoded alone and one padded beside others differ by rounding.
        assert all(math.isclose(a[key], b[key], rel_tol=1e-4) for key in a if "loss" in key)


@pytest.mark.parametrize("padding", ["masked", "wan"])
def test_known_embeddings_and_new_ones_mix(padding: str):
    cfg = compose(["experiment=parity_tiny", *FROZEN, f"text.padding={padding}"]).config
    model = TextToVideo(cfg.model, cfg.text, seed=0)
    prompts = ["red", "", "a green square moves to the left"]
    wanted, mask = model.tokenize(prompts)
    known = [model.frozen_encoder.embedding(prompts[0]), None, model.frozen_encoder.embedding(prompts[2])]  # fmt: skip
    found, found_mask = model.embed(prompts, known)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (mask is None and found_mask is None) or torch.equal(mask, found_mask)
    # It is the embedding that is given which is used.
    other, _ = model.embed(prompts, [2 * known[0], None, None])
    torch.testing.assert_close(other[0], 2 * wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other[1:], wanted[1:], rtol=1e-4, atol=1e-5)


def test_a_dropped_caption_is_the_empty_one(encoded: Path, tmp_path: Path):
    cfg = compose(
        overrides(
            tmp_path / "run", *FROZEN, *sources(encoded), UNSEEN, "objective.caption_dropout=0.5"
        )
    ).config
    trainer = Trainer(cfg)
    batches = [batch for step in range(4) for batch in trainer.data.step(step)]
    flows = [trainer.objective.flow_batch(batch) for batch in batches]
    trainer.close()
    pairs = [pair for flow in flows for pair in zip(flow.prompts, flow.text, strict=True)]
    assert {prompt == "" for prompt, _ in pairs} == {True, False}
    assert all((prompt == "") == (known is None) for prompt, known in pairs)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((*FROZEN, "vae.arch.base_dim=16"), ["VAE", "vae.path", "sora data encode"]),
        ((), ["text.trainable=true", "data.stored_text=ignore"]),
        ((*FROZEN, "seed=7"), ["text encoder", "data.stored_text=ignore"]),
        (("task=vae",), ["no clip", "latents_only"]),
    ],
)  # fmt: skip
def test_what_is_not_the_runs_is_refused_before_the_first_step(
    encoded: Path, tmp_path: Path, more: tuple[str, ...], told: list[str]
):
    with refuses(UserError, *told):
        Trainer(compose(overrides(tmp_path / "run", *sources(encoded), *more)).config)


def test_the_refusal_names_both_digests(encoded: Path, tmp_path: Path):
    other = "vae.arch.base_dim=16"
    with pytest.raises(UserError) as error:
        Trainer(compose(overrides(tmp_path / "run", *FROZEN, *sources(encoded), other)).config)
    members = Manifest.load(encoded / "train" / "manifest.parquet").members
    words = str(error.value).replace(",", " ").replace(":", " ").split()
    digests = {word for word in words if len(word) == 64}
    assert len(digests) == 2 and json.loads(members[0])["latents"]["vae_digest"] in digests


def test_clips_and_latents_mix_in_a_micro_batch(clips: tuple[str, str], tmp_path: Path):
    output = tmp_path / "out"
    arguments = overrides(tmp_path / "run", *clips)
    encode_source([*arguments, f"output={output}", "keep_clips=true"], None)
    file = output / "train" / "manifest.parquet"
    manifest = Manifest.load(file)
    assert set(manifest.kind) == {"video", "image"}
    half = manifest.members.copy()
    half[::2] = ""
    manifest.with_columns(members=half).save(file)
    cfg = compose(overrides(tmp_path / "mixed", *sources(output), UNSEEN)).config
    trainer = Trainer(cfg)
    batches = [batch for step in range(2) for batch in trainer.data.step(step)]
    kinds = [{clip.latents is None for clip in batch.clips} for batch in batches]
    assert {True, False} in kinds
    assert all((clip.latents is None) == (clip.row % 2 == 0) for b in batches for clip in b.clips)
    for batch in batches:
        trainer.objective.terms(trainer.engine.model, batch)
    trainer.close()
    ignoring = Trainer(
        compose(overrides(tmp_path / "pixels", *sources(output), UNSEEN, "data.stored_latents=ignore")).config
    )  # fmt: skip
    assert all(clip.pixels is not None for b in ignoring.data.step(0) for clip in b.clips)
    ignoring.close()


def test_a_shape_without_a_bucket_is_dropped_by_name(encoded: Path, tmp_path: Path):
    output = tmp_path / "out"
    shutil.copytree(encoded, output)
    file = output / "train" / "manifest.parquet"
    manifest = Manifest.load(file)
    frames = manifest.frames.copy()
    frames[0] += 4
    manifest.with_columns(frames=frames).save(file)
    allowed = (*FROZEN, *sources(output), UNSEEN, "data.max_drop_fraction=0.1")
    trainer = Trainer(compose(overrides(tmp_path / "run", *allowed)).config)
    assert trainer.data.assignment.dropped() == {"latents_shape": 1}
    assert trainer.data.account() == {"used": 23, "dropped": 1, "failed": 0, "total": 24}
    trainer.close()


@pytest.mark.parametrize(
    "wrong",
    [
        "keep_clips=2",
        "dtype=int8",
        "max_shard_mb=0",
        "output=",
        "part=3/2",
        "part=2",
        "merge=1",
    ],
)
def test_a_wrong_argument_is_named(wrong: str, tmp_path: Path):
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        encode_source(["experiment=parity_tiny", f"output={tmp_path / 'out'}", wrong], None)
    assert np.array_equal(list(tmp_path.iterdir()), [])

"""The cache that fills while training: the numbers of a run without it, each network asked once, folders apart."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from sentences import refuses

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.latents.provenance import FILE_NAME
from sora_train.data.sample import Clip
from sora_train.errors import EXIT_REQUEUE, Preempted, UserError
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import TextToVideoObjective
from sora_train.runtime import preemption
from sora_train.tools.data.command import verify_source
from sora_train.training.trainer import Trainer

TINY = "experiment=parity_tiny"
FROZEN = "text.trainable=false"


def training_latents(objective: TextToVideoObjective, clips: list[Clip]) -> torch.Tensor:
    """The latents of clips as a step meets them."""
    drawn = objective.cfg.data.latents == "sample"
    return objective.latents(clips, ["t2v"] * len(clips), drawn)


def train(cfg: Config) -> None:
    trainer = Trainer(cfg)
    for _ in range(6):
        trainer.train_step()
    trainer.close()


@pytest.mark.parametrize("latents", ["data.latents=mode", "data.latents=sample"])
def test_a_cache_filled_in_the_first_epoch_gives_its_numbers_exactly(
    latents: str, clips: tuple[str, str], tmp_path: Path
):
    def seen(cache: str) -> list[tuple[float, int, torch.Tensor]]:
        """Epoch, row and latents of what six steps are trained on."""
        told = [TINY, latents, *clips, f"data.cache={cache}", "validation.every=0"]
        trainer = Trainer(compose([*told, f"run.dir={tmp_path / cache}"]).config)
        batches = [batch for step in range(6) for batch in trainer.data.step(step)]
        trainer.close()
        latents_of = partial(training_latents, trainer.objective)
        return [(clip.epoch, clip.row, latents_of([clip])) for b in batches for clip in b.clips]

    plain, auto = seen("none"), seen("auto")
    for number, (epoch, row, found) in enumerate(auto):
        assert plain[number][:2] == (epoch, row)
        # A clip that is met for the first time is encoded by itself, as without a cache.
        assert epoch or torch.equal(found, plain[number][2])
    assert not all(torch.equal(a[2], b[2]) for a, b in zip(auto, plain, strict=True))
    if latents.endswith("sample"):
        # Before step 1 clips are encoded together, which rounds differently.
        for a, b in zip(auto, seen("latents"), strict=True):
            assert a[:2] == b[:2]
            torch.testing.assert_close(a[2], b[2], rtol=1e-4, atol=1e-5)


def test_each_clip_and_caption_is_encoded_once(
    clips: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, list] = {"clips": [], "captions": []}
    encode, embedding = VideoVAE.encode_moments, TextEncoder.embedding

    def counted_encode(self, pixels):
        seen["clips"].append(len(pixels))
        return encode(self, pixels)

    def counted_embedding(self, prompt):
        seen["captions"].append(prompt)
        return embedding(self, prompt)

    monkeypatch.setattr(VideoVAE, "encode_moments", counted_encode)
    monkeypatch.setattr(TextEncoder, "embedding", counted_embedding)
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("a batch was embedded anew"))
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    common = [
        TINY, FROZEN, *clips, "data.cache=auto", cache, "validation.every=0", "checkpoint.every=0",
        "objective.caption_dropout=0.1",
    ]  # fmt: skip
    train(compose([*common, f"run.dir={tmp_path / 'run'}"]).config)
    assert sum(seen["clips"]) == 24
    assert len(seen["captions"]) == len(set(seen["captions"])) > 10 and "" in seen["captions"]
    for found in seen.values():
        found.clear()
    train(compose([*common, f"run.dir={tmp_path / 'again'}"]).config)
    assert seen == {"clips": [], "captions": [""]}, "the null caption is asked for once a process"

    stored = ["data.max_drop_fraction=1", cache]
    verification = verify_source([TINY, FROZEN, *clips, *stored, f"run.dir={tmp_path / 'v'}"], None)
    text = str(verification)
    assert not verification.wrong and "1 of 24" in text and "embedding" in text
    for change, told in (
        ("vae.arch.base_dim=16", "VAE"),
        ("text.padding=wan", r"text\.padding +masked +wan"),
        ("seed=1", "text encoder"),
    ):
        run = compose([*common, change, f"run.dir={tmp_path / 'other'}"]).config
        with pytest.raises(UserError, match=rf"data\.cache_dir=[\s\S]*{told}"):
            Trainer(run)


def test_a_runs_own_folder_follows_its_config(clips: tuple[str, str], tmp_path: Path):
    """A changed setting leaves nothing to be found there, and nobody named it."""
    common = [TINY, *clips, "data.cache=auto", f"run.dir={tmp_path}", "validation.every=0"]
    for digit in (8, 16):
        trainer = Trainer(compose([*common, f"vae.arch.base_dim={digit}"]).config)
        trainer.close()
        said = json.loads((tmp_path / "cache" / FILE_NAME).read_text())
        assert said["latents"]["VAE"] == trainer.vae.digest() and "text" not in said


def test_a_draw_belongs_to_its_sample_alone(clips: tuple[str, str], tmp_path: Path):
    common = [TINY, *clips, "data.latents=sample", f"run.dir={tmp_path}", "validation.every=0"]
    trainer = Trainer(compose(common).config)
    objective, batch = trainer.objective, trainer.data.step(0)[0]
    trainer.close()
    together = training_latents(objective, batch.clips)
    apart = torch.cat([training_latents(objective, [clip]) for clip in reversed(batch.clips)])
    assert torch.equal(together, apart.flip(0))
    assert not torch.equal(together, objective.latents(batch.clips, ["t2v"] * len(batch.clips)))
    twin = type(batch.clips[0])(**{**vars(batch.clips[0]), "epoch": 1})
    assert not torch.equal(training_latents(objective, [twin]), together[:1])


def test_told_to_leave_while_clips_are_encoded_a_run_leaves_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Exit code 75 before the first step; the same command goes on with the clips that are left."""
    small = [
        "data.cache=latents",
        "data.shapes_clips=40",
        "train.steps=1",
        "objective.conditioning.i2v=0",
    ]
    cfg = compose([TINY, *small, f"run.dir={tmp_path / 'run'}"]).config
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "_received", ["SIGTERM"])
        with refuses(Preempted, "encoded") as told:
            Trainer(cfg)
    assert told.value.exit_code == EXIT_REQUEUE
    assert any((tmp_path / "run" / "cache").rglob("*.npy"))
    Trainer(cfg).train()

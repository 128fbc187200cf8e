"""A model is told the same frame rate in training and in sampling: 0 for an image, a slow clip's own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import write_clip
from PIL import Image
from sentences import refuses, says

import sora_train
from sora_train.cli import run as cli_run
from sora_train.config.compose import compose
from sora_train.errors import UserError
from sora_train.sampling.api import Model
from sora_train.sampling.operations import SampleRequest
from sora_train.training.trainer import Trainer

SLOW, BUCKETS = 4.0, 8.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[tuple[bool, float]]]:
    """A run on images and clips of 4 frames a second under `buckets.fps=8`, and what its model was told of each kind
    (whether an image) in training, validation and its own samples."""
    source = tmp_path_factory.mktemp("clips")
    for number in range(6):
        write_clip(source / f"{number}.mp4", 9, SLOW, 32, 32)
    for number in range(3):
        Image.fromarray(np.full((32, 32, 3), 40 * number, np.uint8)).save(source / f"i{number}.png")
    for path in list(source.iterdir()):
        path.with_suffix(".txt").write_text("grey")
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = [
        "experiment=parity_tiny", "data=clips", f"data.source={source}", "data.val_clips=2",
        "model.fps_embed=true", "train.steps=2", "sample.every=2", f"run.dir={folder}",
    ]  # fmt: skip
    trainer = Trainer(compose(overrides).config)
    assert trainer.cfg.buckets.fps == BUCKETS
    with told(trainer.parts.model) as rates:
        trainer.train()
    return folder, rates


@contextmanager
def told(model: torch.nn.Module) -> Iterator[set[tuple[bool, float]]]:
    """(whether an image, frame rate) of every clip that passes through a model."""
    rates: set[tuple[bool, float]] = set()

    def note(_, args, kwargs):
        rates.update((args[0].shape[2] == 1, rate) for rate in kwargs["fps_B"].tolist())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield rates
    hook.remove()


def sampled(model: Model, **how) -> set[tuple[bool, float]]:
    with told(model.model) as rates:
        model.sample(["grey"], steps=1, **how)
    return rates


def test_what_is_sampled_is_told_what_was_trained(trained: tuple[Path, set[tuple[bool, float]]]):
    run, rates = trained
    assert rates == {(False, SLOW), (True, 0.0)}
    model = sora_train.load(run)
    assert model.shape.fps == SLOW
    assert sampled(model) == {(False, SLOW)}
    assert sampled(model, fps=6) == {(False, 6.0)}
    image = {(True, 0.0)}
    assert sampled(model, frames=1) == sampled(model, frames=1, fps=0) == image
    assert sampled(model, frames=1, fps=8) == image
    assert sampled(model, prepared=model.prepare(SampleRequest("t2i"))) == image
    with refuses(UserError, "--fps is 0", "above 0", "--frames 1"):
        model.sample(["grey"], fps=0)


def test_rates_are_recorded_and_others_are_told_of(
    trained: tuple[Path, set[tuple[bool, float]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    run = trained[0]
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["frame_rates"] == [SLOW, SLOW] and state["sample_shape"]["fps"] == SLOW
    asked = ["sample", "--ckpt", str(run), "--prompt", "grey", "--steps", "1"]
    for number, more in enumerate(([], ["--fps", "3.99"], ["--op", "t2i", "--fps", "8"])):
        assert cli_run([*asked, *more, "--out", str(tmp_path / str(number))]) == 0
        assert "not trained" not in capsys.readouterr().err
    assert cli_run([*asked, "--fps", "8", "--out", str(tmp_path / "fast")]) == 0
    says(capsys.readouterr().err, "not trained", "8 frames a second", "on 4", "--fps 4")

"""Promises 1 and 3 for the autoencoder with its adversary: the same at two ranks, and bit for bit when resumed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sentences import refuses

from sora_train import checkpoint as checkpoints
from sora_train.errors import UserError
from sora_train.models.vae.lpips import Lpips
from sora_train.monitoring.metrics import is_clocked, read_metrics
from sora_train.training.trainer import Trainer

WORKER = Path(__file__).with_name("layout_worker.py")
ADVERSARY = (
    "task=vae",
    "vae_objective.adversarial=0.5",
    "vae_objective.adversarial_from=2",
    "vae_objective.adversarial_warmup=1",
    "vae_objective.disc_layers=2",
    "vae_objective.disc_channels=8",
)
# AdamW and clipping both hide a wrong gradient scale.
PLAIN_SGD = ("optim=sgd", "optim.lr=0.05", "optim.grad_clip=0", "optim.warmup_steps=0")
ADAMW = ("optim=adamw", "optim.warmup_steps=0", "vae_objective.disc_lr=1e-3")


class Killed(Exception):
    """Stands for the end of a process."""


class DyingTrainer(Trainer):
    def callbacks(self):
        def die(trainer: Trainer, row: dict[str, float]) -> None:
            if trainer.step == 4:
                raise Killed

        return [die]


def rows(run_dir: Path) -> list[dict[str, float]]:
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not is_clocked(key)} for row in found]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_follow_one_process(parity_config: Callable, tmp_path: Path) -> None:
    """Three micro-batches on two ranks, so that one slot is idle, with the adaptive weight."""
    cell = [*ADVERSARY, *PLAIN_SGD, "vae_objective.disc_lr=0.02", "train.micro_batches=3"]
    cell += ["train.steps=4", "validation.every=0", "checkpoint.every=0"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    run = subprocess.run(
        [sys.executable, *launch, str(tmp_path), json.dumps(cell)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one = parity_config(*cell, name="one")
    Trainer(one).train()
    found, expected = rows(tmp_path / "cell-0"), rows(Path(one.run.dir))
    assert "train/disc/weight" in expected[-1] and len(expected) == 4
    # Two players amplify rounding, about tenfold a step; a wrong scale of a gradient is off by per cents.
    for row, reference in zip(found, expected, strict=True):
        # The idle slot is padding, which one process has none of.
        assert row.pop("train/padding") > reference.pop("train/padding") == 0
        assert row == pytest.approx(reference, rel=1e-3)


@pytest.mark.slow
def test_resumed_run_is_the_straight_run(parity_config: Callable) -> None:
    """Killed at step 4 and gone on from 3, where the discriminator has moments and acts."""
    straight, broken = (
        parity_config(*ADVERSARY, *ADAMW, name=name) for name in ("straight", "broken")
    )
    Trainer(straight).train()
    with pytest.raises(Killed):
        DyingTrainer(broken).train()
    Trainer(broken).train()
    assert rows(Path(broken.run.dir)) == rows(Path(straight.run.dir))
    copies = []
    for cfg in (straight, broken):
        trainer = Trainer(cfg)
        copies.append({name: tensor.clone() for name, tensor in trainer.parts.tensors().items()})
        trainer.close()
    assert copies[0].keys() == copies[1].keys()
    assert {name.split(".")[0] for name in copies[0]} == {"model", "optim", "ema", "disc", "disc_optim"}  # fmt: skip
    assert int(copies[0]["disc_optim.steps"]) == 6
    for name, tensor in copies[0].items():
        assert torch.equal(copies[1][name], tensor), name


def test_other_weights_of_lpips_are_refused(parity_config: Callable, tmp_path: Path) -> None:
    """The path is the same and the file is not: its digest is in the checkpoint."""
    file, lpips = tmp_path / "lpips.safetensors", Lpips()
    for name, value in lpips.named_parameters():
        value.data = value.abs() if name.startswith("lin") else value.data
    save_file(lpips.state_dict(), file)
    steps = ("validation.every=0", "checkpoint.every=1", "vae_objective.lpips=0.1")
    names = ("task=vae", *steps, f"vae_objective.lpips_path={file}")
    cfg = parity_config(*names, "train.steps=1", "train.micro_batches=1")
    Trainer(cfg).train()
    row = rows(Path(cfg.run.dir))[0]
    assert row["train/loss/lpips"] > 0
    digest = checkpoints.find(Path(cfg.run.dir)).state()["objective"]["lpips_digest"]
    assert digest == lpips.digest()
    lpips.get_parameter("features.0.bias").data += 1
    save_file(lpips.state_dict(), file)
    with refuses(UserError, f"lpips_digest={digest}"):
        Trainer(parity_config(*names, "train.steps=2", "train.micro_batches=1"))

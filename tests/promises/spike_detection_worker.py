"""Run under torchrun by test_spike_detection: one cell of the table after another in one process group.

Arguments: a folder, then one JSON object a cell: `overrides`, and what goes wrong (`SickTrainer`). Each cell runs in
FOLDER/cell-N, and each rank writes a digest of its weights, averages and moments after each step.
"""

import hashlib
import json
import resource
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sora_train import checkpoint as checkpoints
from sora_train.config.compose import compose
from sora_train.objectives import LossTerm, TextToVideoObjective
from sora_train.parallel.shards import local
from sora_train.training.resilience import rollback
from sora_train.training.resilience.out_of_memory import kilobytes
from sora_train.training.trainer import Trainer


class Killed(Exception):
    """Stands for the end of a process."""


class Explode(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class SickObjective(TextToVideoObjective):
    """A loss that goes wrong for some clips, however they are dealt out: `sick` is what happens by (epoch, row)."""

    sick: dict[tuple[int, int], str]
    whole: bool
    """Clips are not told apart, so that the kinds of a step are its buckets, and all are met in the first steps."""

    def terms(self, model, batch):
        terms = super().terms(model, batch)
        if self.whole:
            found = terms["velocity"]
            terms = {"velocity": LossTerm(found.sum, found.weight)}
        kinds = {self.sick.get((clip.epoch, clip.row), "") for clip in batch.clips} - {""}
        for kind in kinds:
            found = terms["velocity"]
            terms = {"velocity": LossTerm(spoiled(kind, found.sum), found.weight)}
        return terms


def spoiled(kind: str, loss: torch.Tensor) -> torch.Tensor:
    match kind:
        case "nan":
            return loss * float("nan")
        case "gradient":
            return Explode.apply(loss)
        case "spike":
            return loss * 100.0
    exhaust_memory()
    return loss


def exhaust_memory() -> None:
    """Really: the process may take a little more than it has, and takes more and more of it."""
    used = kilobytes(Path("/proc/self/status"), "VmSize:")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
    held = []
    while True:
        held.append(torch.ones(2**24))


class SickTrainer(Trainer):
    """`cell` says what goes wrong.

    sick: what happens to the clips of a micro-batch of the tape, by its index
    whole: whether clips are not told apart
    jump: [step, step of the tape that it reads], where data is passed over as told
    deaths: how the lives of the process end but the last
    """

    cell: dict
    death: str

    def build_objective(self):
        objective = SickObjective(self.cfg, self.spec, self.vae, self.world.device)
        entries = {
            self.data.tape[int(index)]: kind for index, kind in self.cell.get("sick", {}).items()
        }
        objective.sick = {
            key: kind
            for entry, kind in entries.items()
            for key in zip(entry.epochs, entry.rows, strict=True)
        }
        objective.whole = self.cell.get("whole", False)
        self.digests = []
        return objective

    def train_step(self):
        at, to = self.cell.get("jump", (-1, 0))
        if self.step == at:
            self.state.data_step = to
        if self.death == "before the spike" and self.step == 6:
            raise Killed
        if self.death == "after it went back" and self.spikes.counters.rollbacks:
            raise Killed
        row = super().train_step()
        self.digests.append(digest(self))
        return row


def digest(trainer: Trainer) -> str:
    """Of this rank's part of all that trains."""
    found = hashlib.sha256()
    for name, tensor in sorted(trainer.parts.tensors().items()):
        found.update(name.encode() + local(tensor).detach().cpu().numpy().tobytes())
    return found.hexdigest()


def die(*given: object) -> None:
    raise Killed


def run(cell: dict, folder: Path) -> Trainer:
    """One cell, in as many lives as it takes; every rank writes digests of its weights, step by step."""
    overrides = [f"run.dir={folder}", *cell.get("overrides", [])]
    for death in [*cell.get("deaths", []), ""]:
        trainer_class = type("CellTrainer", (SickTrainer,), {"cell": cell, "death": death})
        trainer = trainer_class(compose(["experiment=parity_tiny", *overrides]).config)
        with pytest.MonkeyPatch.context() as patch:
            if death == "while it goes back":
                patch.setattr(rollback, "discard_abandoned", lambda run_dir: None)
                patch.setattr(checkpoints, "load", die)
            try:
                trainer.train()
                assert not death
            except Killed:
                found = checkpoints.list_checkpoints(trainer.folder.checkpoints)
                if trainer.world.is_main and death == "while it goes back":
                    steps = [checkpoint.step for checkpoint in found]
                    (folder / "checkpoints-at-death.json").write_text(json.dumps(steps))
    (folder / f"digests-{trainer.world.rank}.json").write_text(json.dumps(trainer.digests))
    return trainer


def main() -> None:
    folder, *cells = sys.argv[1:]
    dist.init_process_group("gloo")
    for number, cell in enumerate(cells):
        run(json.loads(cell), Path(folder) / f"cell-{number}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Run as a process of its own by test_agreement: both ranks of every cell are forks of it, so that torch is imported
once. In each cell rank 1 goes astray in a way of its own at step 2; in `batch` it fails on a clip there, which
both then leave out, and goes astray at step 3.

Arguments: a folder, the rendered clips of another run, then one JSON object a cell: its name and overrides. How each
ended is appended to FOLDER/found.jsonl.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import chaos
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.sample import Clip, ClipBatch, Failure
from sora_train.errors import run_command
from sora_train.objectives import FlowBatch, Objective, TextToVideoObjective
from sora_train.parallel.checks import agreement
from sora_train.tools.doctor.parity.worker import import_everything
from sora_train.training import trainer
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.trainer import Trainer

STRAYS_AT = 1
"""The step, counted from 0, at which rank 1 does so."""
SMALL = [
    "experiment=parity_tiny", "train.steps=3", "validation.every=0", "checkpoint.every=0", "resume.probe=false",
]  # fmt: skip


class Astray(Trainer):
    """Does on rank 1 what its cell is named after."""

    cell = ""
    config: Config
    """Composed once for both ranks."""

    @property
    def strays(self) -> bool:
        return self.world.rank == 1 and self.step == STRAYS_AT

    def build_model(self) -> nn.Module:
        model = super().build_model()
        kinds = {"order": Backwards, "short": Short, "late": Late}
        if self.world.rank == 1 and self.cell in kinds:
            model.transformer.blocks.__class__ = kinds[self.cell]
        return model

    def build_data(self, model: nn.Module) -> TrainingData:
        data = super().build_data(model)
        if self.cell == "batch":
            assert data.filler is not None and data.filler.texts is not None
            store, put, wait = data.filler.store, data.filler.texts.put, data.loader._wait

            def stored(clips: Sequence[Clip]) -> list[Clip]:
                say(f"encodes {clips[0].row}")
                return store(clips)

            def kept(caption: str, *embedding: Any) -> bool:
                say(f"embeds {caption!r}")
                return put(caption, *embedding)

            def waited(row: int, future: Any) -> Clip | Failure:
                found = wait(row, future)
                lost = self.strays and row == data.rows_at(STRAYS_AT)[0]
                return Failure(row, "timeout", "its disk is slow") if lost else found

            data.filler.store, data.filler.texts.put, data.loader._wait = stored, kept, waited
        return data

    def build_objective(self) -> Objective:
        if self.world.rank == 1 and self.cell == "vae":
            with torch.no_grad():
                list(self.vae.parameters())[3].flatten()[0].add_(1e-3)
        if self.cell == "noise":
            assert self.spec is not None
            return OtherNoise(self.cfg, self.spec, self.vae, self.world.device)
        return super().build_objective()

    def read(self) -> tuple[list[ClipBatch], list[dict[str, float]], Exception | None]:
        batches, weights, error = super().read()
        if self.cell == "batch" and self.world.rank == 1 and self.step == STRAYS_AT + 1:
            say("strays")
            batches[1] = replace(batches[1], clips=batches[1].clips[::-1])
        return batches, weights, error

    def train_step(self) -> dict[str, float]:
        if self.strays:
            Astray.now = True
            if self.cell == "replica":
                say("strays")
                self.engine.shards["transformer.proj_out.weight"].data[0, 0] += 1e-7
        try:
            return super().train_step()
        finally:
            Astray.now = False

    now = False
    """Whether rank 1 is in the step in which it goes astray."""


class Backwards(nn.ModuleList):
    """Blocks in another order."""

    def __iter__(self) -> Iterator[nn.Module]:
        blocks = list(super().__iter__())
        if Astray.now:
            say("strays")
        return iter(blocks[::-1] if Astray.now else blocks)


class Short(nn.ModuleList):
    """One block less."""

    def __iter__(self) -> Iterator[nn.Module]:
        blocks = list(super().__iter__())
        if Astray.now:
            say("strays")
        return iter(blocks[:-1] if Astray.now else blocks)


class Late(nn.ModuleList):
    """Long after the other rank."""

    def __iter__(self) -> Iterator[nn.Module]:
        for block in super().__iter__():
            yield block
            if Astray.now:
                Astray.now = False
                time.sleep(2.5)


class OtherNoise(TextToVideoObjective):
    """Noise that is not a sample's own."""

    def flow_batch(self, batch: ClipBatch) -> FlowBatch:
        flow = super().flow_batch(batch)
        if not Astray.now:
            return flow
        say("strays")
        return replace(flow, noise=flow.noise.roll(1, dims=1))


def say(word: str) -> None:
    print(f"{word} at {time.time()}", flush=True)


def train_once(overrides: Sequence[str], plan: Any) -> int:
    def work() -> None:
        try:
            Astray(Astray.config).train()
        finally:
            say("ends")

    return run_command(work)


def main() -> None:
    agreement.PATIENCE_SECONDS = 1.0
    # Scores, pictures and tables are of no interest here, and take as long as the three steps.
    trainer.finish = trainer.print_card = lambda *parts, **options: None
    import_everything()
    chaos.train_once = train_once
    folder, data, *cells = sys.argv[1:]
    for text in cells:
        cell = json.loads(text)
        run_dir = Path(folder) / cell["name"]
        shutil.copytree(data, run_dir / "data")
        Astray.cell = cell["name"]
        overrides = [*SMALL, *cell["overrides"], f"run.dir={run_dir}"]
        Astray.config = compose(overrides).config
        log = Path(folder) / f"{cell['name']}.log"
        found = chaos.attempt(2, overrides, log, hung_seconds=40.0)
        with (Path(folder) / "found.jsonl").open("a") as file:
            file.write(json.dumps({"cell": cell["name"], **asdict(found)}) + "\n")


if __name__ == "__main__":
    main()

"""What a run keeps books of besides its loss: the work of a step, where its time goes, how the machines are."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sora_train.monitoring.device_peaks import peak_flops
from sora_train.monitoring.gauges import Gauges, open_gauges
from sora_train.monitoring.goodput import Goodput, elapsed, note_start, starts
from sora_train.monitoring.metrics import MetricsFile
from sora_train.training.step_metrics import StepNumbers

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer


class Accounts:
    """The books of one run on one rank; goodput is kept by the rank that writes metrics.jsonl."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer
        cfg, world = trainer.cfg, trainer.world
        self.numbers = StepNumbers(cfg, trainer.data, world.size, peak_of(trainer))
        self.gauges: Gauges = open_gauges(world.device, warns=world.is_main)
        self.goodput: Goodput | None = None
        self._saved = 0.0

    def start(self) -> None:
        """Training begins here; the gauges' columns travel with the report of who is slow."""
        self.gauges.start()
        self.trainer.health.gauges = self.gauges

    def start_goodput(self, folder: Path, metrics: MetricsFile) -> None:
        """Count from the run's first start, and from what the rows that are kept tell."""
        trainer = self.trainer
        # A fork begins with the rows of another run, whose time is not this one's.
        again = bool(starts(folder))
        began = note_start(folder, trainer.step, trainer.world.size, elapsed(trainer.started))
        self.goodput = Goodput(began)
        if again:
            self.goodput.go_on(metrics.last_kept, metrics.last_dropped)

    def step(
        self, row: dict[str, float], seconds: float, waited: float, *, counts: bool
    ) -> dict[str, float]:
        """A step took so long; returns its rates."""
        if self.goodput is not None:
            self.goodput.step(seconds, waited, counts=counts)
        return self.numbers.rates(row, seconds)

    def rolled_back(self, metrics: MetricsFile) -> None:
        if self.goodput is not None:
            self.goodput.phases(self.trainer.health.spent)
            self.goodput.go_back(metrics.last_kept)

    def row(self) -> dict[str, float]:
        """What the row of a step gets when it is written: the goodput, the time of saves since the row before."""
        if self.goodput is None:
            return {}
        trainer, spent = self.trainer, self.trainer.health.spent
        self.goodput.phases(spent)
        saved = spent.get("save", 0.0)
        stall, self._saved = saved - self._saved, saved
        written = trainer.saver.take_seconds()
        return {
            "train/quarantined": float(len(trainer.data.loader.quarantine)),
            **({"checkpoint/stall_seconds": stall} if stall > 0 else {}),
            **({"checkpoint/write_seconds": written} if written else {}),
            **self.goodput.row(time.time()),
        }

    def close(self) -> None:
        self.gauges.stop()


def peak_of(trainer: "Trainer") -> float | None:
    """What a rank's device could do at best, FLOP/s: `run.peak_tflops`, else by the GPU's name; None on a CPU."""
    told = trainer.cfg.run.peak_tflops
    if told:
        return told * 1e12
    if trainer.world.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(trainer.world.device))

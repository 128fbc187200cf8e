"""Where the time of a run goes: its goodput, the time of saves, and how its machines are."""

import time

import torch

from sora_train.checkpoint.saver import Saver
from sora_train.data.quarantine import Quarantine
from sora_train.monitoring.device_peaks import peak_flops
from sora_train.monitoring.gauges import Gauges, open_gauges
from sora_train.monitoring.goodput import Goodput, elapsed, note_start, starts
from sora_train.monitoring.metrics import MetricsFile
from sora_train.training.run import RunContext


class RunTotals:
    """The totals of one run on one rank; goodput is kept by the rank that writes metrics.jsonl."""

    def __init__(self, run: RunContext, quarantine: Quarantine, saver: Saver):
        self.run, self.quarantine, self.saver = run, quarantine, saver
        self.gauges: Gauges = open_gauges(run.world.device, warns=run.is_main)
        self.goodput: Goodput | None = None
        self._saved_seconds = 0.0

    def start(self) -> None:
        """Training begins here; the gauges' columns travel with the report of who is slow."""
        self.gauges.start()
        self.run.health.gauges = self.gauges

    def start_goodput(self, step: int, started: float, metrics: MetricsFile) -> None:
        """Count from the run's first start on, and from what the rows say that are kept."""
        folder = self.run.folder.path
        # A fork begins with the rows of another run, whose time is not this one's.
        goes_on = bool(starts(folder))
        began = note_start(folder, step, self.run.world.size, elapsed(started))
        self.goodput = Goodput(began)
        if goes_on:
            self.goodput.go_on(metrics.last_kept, metrics.last_dropped)

    def step(self, seconds: float, waited: float, *, productive: bool) -> None:
        """A step took so long, and waited so long for data; a skipped one is not productive."""
        if self.goodput is not None:
            self.goodput.step(seconds, waited, counts=productive)

    def rolled_back(self, metrics: MetricsFile) -> None:
        if self.goodput is not None:
            self.goodput.phases(self.run.health.spent)
            self.goodput.go_back(metrics.last_kept)

    def row(self) -> dict[str, float]:
        """What the row of a step gets when it is written: the goodput, and the time of saves since the row before."""
        if self.goodput is None:
            return {}
        spent = self.run.health.spent
        self.goodput.phases(spent)
        saved = spent.get("save", 0.0)
        stall, self._saved_seconds = saved - self._saved_seconds, saved
        written = self.saver.take_seconds()
        return {
            "train/quarantined": float(len(self.quarantine)),
            **({"checkpoint/stall_seconds": stall} if stall > 0 else {}),
            **({"checkpoint/write_seconds": written} if written else {}),
            **self.goodput.row(time.time()),
        }

    def close(self) -> None:
        self.gauges.stop()


def peak_of(run: RunContext) -> float | None:
    """What a rank's device could do at best, FLOP/s: `run.peak_tflops`, else by the GPU's name; None on a CPU."""
    configured = run.cfg.run.peak_tflops
    if configured:
        return configured * 1e12
    if run.world.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(run.world.device))

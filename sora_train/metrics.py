"""The names, units and meaning of every metric, and the file they are written to first.

`metrics.jsonl` in the run folder is the truth: one JSON object a row, always with `step`. Trackers
are fed from it. Numbers are written in full precision.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Metric:
    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "step": Metric("steps", "optimizer steps taken; in every row"),
    "time": Metric("s", "wall clock, seconds since 1970; in every row"),
    "train/loss": Metric("1", "loss of this step over all ranks: the sum of the terms below"),
    "train/loss/*": Metric(
        "1",
        "one term of the objective: its sum over its weight (clips, or tokens with `loss.reduce=per_token`)",
    ),
    "train/disc/loss": Metric("1", "VAE task: hinge loss of the discriminator, while it learns"),
    "train/disc/accuracy": Metric(
        "share",
        "VAE task: patches it tells rightly, real and decoded ones counting alike; 0.5 is chance",
    ),
    "train/disc/grad_norm": Metric("1", "VAE task: gradient norm of the discriminator"),
    "train/disc/weight": Metric(
        "1",
        "VAE task: factor on what the discriminator says, mean over the clips, adaptive part included",
    ),
    "train/grad_norm": Metric("1", "global gradient norm before clipping"),
    "train/lr": Metric("1", "learning rate of this step"),
    "train/step_seconds": Metric("s", "wall clock of this step, waiting for data included"),
    "train/data_wait": Metric("share", "share of the step spent waiting for data"),
    "train/tokens_per_second": Metric("tokens/s", "video tokens trained a second, all ranks"),
    "train/clips": Metric("clips", "clips in this step with a weight above zero, all ranks"),
    "train/samples_seen": Metric("clips", "clips trained since step 0"),
    "train/data_step": Metric(
        "steps",
        "step of the tape that this step trained, counted from 1; equal to `step` until clips are skipped after a "
        "roll-back",
    ),
    "train/epoch": Metric("epochs", "passes over the source, with its fraction"),
    "train/skipped": Metric(
        "steps",
        "steps skipped since step 0 because loss or gradient norm were not finite or a spike "
        "(docs/loss_health.md); a row of such a step lacks what is not finite",
    ),
    "train/rollbacks": Metric("1", "how often the run went back to a checkpoint behind such steps"),
    "train/lost_clips": Metric(
        "clips", "clips read but not trained because of them, all ranks, since step 0"
    ),
    "train/dropped": Metric("clips", "clips that failed to decode since step 0, all ranks"),
    "train/captions_cut": Metric(
        "captions",
        "captions longer than `text.max_length`, cut as they were read since step 0, all ranks",
    ),
    "train/recompiles": Metric(
        "graphs",
        "blocks compiled again for inputs of a kind met before, since the process began, all ranks: 0 is expected; "
        "only where `model.compile` is on",
    ),
    "health/slowest_rank": Metric(
        "rank", "the rank that took longest for its own work, of those steps since the last report"
    ),
    "health/slowest_over_mean": Metric("1", "its time over the mean of all ranks"),
    "val/loss": Metric(
        "1",
        "mean over the noise levels of the loss on held-out clips, EMA weights, fixed noise; every clip counts the "
        "same, whatever `loss.reduce` is",
    ),
    "val/loss/t*": Metric("1", "the same at one noise level t"),
    "val/loss/*x*x*": Metric(
        "1",
        "the same over the clips of one bucket (frames x height x width), where there are several",
    ),
    "val/loss/*": Metric(
        "1",
        "the same for one kind of conditioning, on its free frames, where several are trained; val/loss itself is of "
        "t2v, or of the first kind of the mix where t2v is not trained",
    ),
    "val/live/loss": Metric("1", "val/loss of the weights as they are, not averaged"),
    "val/psnr": Metric("dB", "VAE task: reconstruction of held-out clips"),
    "val/ssim": Metric(
        "1", "VAE task: structural similarity of the same, frame by frame; 1 is equal"
    ),
}


class MetricsFile:
    """Appends rows to metrics.jsonl; a resumed run first drops the rows after its checkpoint."""

    def __init__(self, path: Path, *, resume_step: int):
        self.path = path
        self._file = self._opened(resume_step)

    def _opened(self, resume_step: int) -> IO[str]:
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            temporary.replace(self.path)
        return self.path.open("a", buffering=1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a row; what is not finite, as of a step that was skipped for it, JSON has no number for."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")

    def go_back(self, step: int) -> None:
        """Drop the rows after `step`, as a resumed run does."""
        self._file.close()
        self._file = self._opened(step)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Every whole row; a last line cut short by a kill is left out, as its step will be run again."""
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return rows

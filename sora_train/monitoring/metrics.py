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


CLOCKED = ("time", "train/step_seconds", "train/data_wait")
CLOCKED_ENDINGS = ("_per_second", "_seconds", "/tflops", "/mfu")
CLOCKED_FAMILIES = ("goodput/", "memory/", "gpu/", "health/", "checkpoint/")


def is_clocked(name: str) -> bool:
    """Whether a metric depends on the machine's time and state, so that it differs in a run repeated bit for bit."""
    return name in CLOCKED or name.endswith(CLOCKED_ENDINGS) or name.startswith(CLOCKED_FAMILIES)


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
        "VAE task: patches it classifies correctly, real and decoded ones counting alike; 0.5 is chance",
    ),
    "train/disc/grad_norm": Metric("1", "VAE task: gradient norm of the discriminator"),
    "train/disc/weight": Metric(
        "1",
        "VAE task: factor on the discriminator's part of the loss, mean over the clips, adaptive part included",
    ),
    "train/grad_norm": Metric("1", "global gradient norm before clipping"),
    "train/lr": Metric("1", "learning rate of this step"),
    "train/step_seconds": Metric("s", "wall clock of this step, waiting for data included"),
    "train/data_wait": Metric("share", "share of the step spent waiting for data"),
    "train/encode_seconds": Metric(
        "s",
        "time of this step in frozen networks, the VAE and the text encoder, mean over the ranks; `data.cache` stores "
        "what they make",
    ),
    "train/tokens_per_second": Metric("tokens/s", "video tokens trained a second, all ranks"),
    "train/clips_per_second": Metric("clips/s", "clips trained a second, all ranks"),
    "train/tflops": Metric(
        "TFLOP/s",
        "floating-point operations of the model a second, all ranks: forward and twice that for backward, attention "
        "counted in full, a caption as `text.max_length` tokens, what is computed again in backward and frozen "
        "networks not (sora_train/models/flops.py)",
    ),
    "train/mfu": Metric(
        "share",
        "train/tflops over what all devices could do at best (`run.peak_tflops`, else by the GPU's name); absent "
        "where that is not known, as on a CPU",
    ),
    "train/padding": Metric(
        "share",
        "tokens computed for slots that hold no clip, of all tokens; clips are never padded",
    ),
    "train/by_t/*": Metric(
        "1",
        "loss of this step's clips whose noise level t lies in a band (its lower edge belongs to it), each clip by "
        "its weight; absent in a step without such clips",
    ),
    "train/by_bucket/*": Metric("1", "the same by bucket (frames x height x width)"),
    "train/by_task/*": Metric("1", "the same by kind of conditioning (t2v, i2v, extend, ...)"),
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
        "(docs/spike_detection.md); a row of such a step lacks what is not finite",
    ),
    "train/rollbacks": Metric("1", "how often the run went back to a checkpoint behind such steps"),
    "train/lost_clips": Metric(
        "clips", "clips read but not trained because of them, all ranks, since step 0"
    ),
    "train/dropped": Metric("clips", "clips that failed to decode since step 0, all ranks"),
    "train/quarantined": Metric("clips", "clips in quarantine.jsonl, which are not decoded again"),
    "train/captions_cut": Metric(
        "captions",
        "captions longer than `text.max_length`, cut as they were read since step 0, all ranks",
    ),
    "train/recompiles": Metric(
        "graphs",
        "blocks compiled again for inputs of a kind met before, since the process began, all ranks: 0 is expected; "
        "only where `model.compile` is on",
    ),
    "goodput/productive": Metric(
        "share",
        "goodput: time in steps that count, without their waiting for data, of goodput/seconds; the seven of them "
        "add up to 1 (docs/watch.md)",
    ),
    "goodput/data_wait": Metric("share", "time in which these steps waited for data"),
    "goodput/checkpoint": Metric("share", "time that saves held up the run"),
    "goodput/evaluation": Metric("share", "validation and samples"),
    "goodput/wasted": Metric(
        "share",
        "what a restart or a roll-back threw away to be done again, as far as metrics.jsonl knows of it, and skipped "
        "steps",
    ),
    "goodput/other": Metric(
        "share", "the rest: starts, the time between an end and the next start, the loop's own work"
    ),
    "goodput/seconds": Metric("s", "wall clock since the run first began, across restarts"),
    "checkpoint/stall_seconds": Metric("s", "time that saves held up the run since the row before"),
    "checkpoint/write_seconds": Metric(
        "s",
        "from the first byte of a save to its commit, behind the run or not; once for each save",
    ),
    "health/slowest_rank": Metric(
        "rank", "the rank that took longest for its own work, of those steps since the last report"
    ),
    "health/slowest_over_mean": Metric("1", "its time over the mean of all ranks"),
    "memory/host": Metric(
        "GiB",
        "resident memory of a rank's process. This name and those below come every `health.report_every` steps: the "
        "mean of all ranks, and as NAME/min, NAME/max and NAME/worst_rank the ends and the rank where it is worst; "
        "a column that no rank has is absent; health/ranks.jsonl has each rank's own",
    ),
    "memory/allocated": Metric(
        "GiB", "most that torch's tensors took of a GPU since the process began"
    ),
    "memory/reserved": Metric(
        "GiB", "most that torch's allocator held of a GPU since the process began"
    ),
    "gpu/memory": Metric("GiB", "memory of a GPU in use by anyone, the most since the last report"),
    "gpu/power": Metric("W", "power that a GPU draws, mean since the last report"),
    "gpu/clock": Metric("MHz", "clock of its multiprocessors, mean; the lowest rank is the worst"),
    "gpu/memory_clock": Metric("MHz", "clock of its memory, mean; the lowest rank is the worst"),
    "gpu/temperature": Metric("degrees C", "temperature of a GPU, the most since the last report"),
    "gpu/utilisation": Metric("share", "time in which a kernel ran, mean; the lowest is the worst"),
    "gpu/throttled": Metric(
        "share", "readings in which power, heat or the power supply held its clocks down"
    ),
    "gpu/ecc_errors": Metric(
        "1", "errors of its memory that could not be corrected, since its driver was loaded"
    ),
    "gpu/xid_errors": Metric(
        "1", "critical errors (XID) that its driver reported, since the run began here"
    ),
    "memory/*/*": Metric("", "min, max and worst_rank of the names above"),
    "gpu/*/*": Metric("", "the same"),
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
    "val/clips/oracle_*": Metric(
        "share",
        "`validation.clips` clips sampled of fixed prompts with fixed noise: those of the right colour, shape and "
        "motion, on the shapes world",
    ),
    "val/clips/*": Metric(
        "",
        "their flicker, motion_energy (levels/s), smoothness, and drift_* (levels/s), the mean of the slopes' sizes; "
        "docs/evaluation.md defines each",
    ),
    "val/psnr": Metric("dB", "VAE task: reconstruction of held-out clips"),
    "val/ssim": Metric(
        "1", "VAE task: structural similarity of the same, frame by frame; 1 is equal"
    ),
}


class MetricsFile:
    """Appends rows to metrics.jsonl; a resumed run first drops the rows after its checkpoint."""

    def __init__(self, path: Path, *, resume_step: int):
        self.path = path
        self.last_kept: dict[str, float] | None = None
        self.last_dropped: dict[str, float] | None = None
        """The last row that was kept, and the last of those that were dropped, when the file was opened."""
        self._file = self._opened(resume_step)

    def _opened(self, resume_step: int) -> IO[str]:
        if self.path.exists():
            rows = read_metrics(self.path)
            kept = [row for row in rows if row["step"] <= resume_step]
            self.last_kept = kept[-1] if kept else None
            self.last_dropped = rows[-1] if rows and rows[-1]["step"] > resume_step else None
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            temporary.replace(self.path)
        return self.path.open("a", buffering=1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a row, without values that are not finite (of a skipped step, say): JSON has no number for them."""
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

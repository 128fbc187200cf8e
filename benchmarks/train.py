"""`sora bench train`: the real Trainer for a few steps, its numbers read from its own metrics.jsonl.

Nothing is re-implemented, so what is measured is what a run does, waiting for data included.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.device.measuring import Measured, Result, Stats
from sora_train.errors import Fault, UserError
from sora_train.models.flops import FORMULA
from sora_train.monitoring.metrics import read_metrics

DEFAULT_EXPERIMENT = "experiment=parity_tiny"
DEFAULT_OUT = Path("benchmarks/results")
# Only the steps are measured: no checkpoint, validation or sample falls between them, and none is rehearsed. `sync`
# needs no memory for saves.
BARE = ("checkpoint.every=0", "checkpoint.rehearse=false", "checkpoint.mode=sync", "validation.every=0",
        "sample.every=0", "sample.oracle_prompts=0")  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run `[overrides] [--steps N] [--warmup N] [--out DIR]`, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sora bench train", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20, help="steps measured")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, not counted")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder of train.json, train.md"
    )
    options, overrides = parser.parse_known_args(list(arguments))
    path = run(overrides, steps=options.steps, warmup=options.warmup, out=options.out)
    print(f"\n{path.with_suffix('.md').read_text()}\nwrote {path} and {path.with_suffix('.md')}")
    return 0


def run(overrides: list[str], *, steps: int, warmup: int, out: Path) -> Path:
    """Measure `steps` training steps after `warmup` and write `out`/train.json and train.md.

    Without `experiment=` in the Hydra `overrides`, it is parity_tiny. Returns the path of the JSON.

    Raises:
        UserError: steps or warmup make no measurement, or there is more than one rank.
        ConfigError: an override is wrong.
    """
    if steps < 1 or warmup < 0:
        raise UserError(
            f"--steps {steps} --warmup {warmup}: measure at least one step, after none or more"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sora bench train measures one process; start it without torchrun")
    named = any(override.startswith("experiment=") for override in overrides)
    chosen = [*([] if named else [DEFAULT_EXPERIMENT]), *overrides]
    with tempfile.TemporaryDirectory(prefix="sora_bench_") as folder:
        fixed = [f"run.dir={folder}/run", f"train.steps={warmup + steps}", "train.log_every=1"]
        cfg: Config = compose([*chosen, *BARE, *fixed, "tracker=none"]).config
        params, memory = _train(cfg)
        rows = read_metrics(Path(cfg.run.dir) / "metrics.jsonl")
    measured = [row for row in rows if "train/loss" in row and row["step"] > warmup]
    if len(measured) != steps:
        raise Fault(f"metrics.jsonl holds {len(measured)} of the {steps} steps to be measured")
    result = Result("train", _measured(measured), _facts(cfg, chosen, warmup, params, memory))
    return result.write(Path(out))


def _train(cfg: Config) -> tuple[int, int | None]:
    """Train as `cfg` says; returns trained parameters and the GPU's peak memory in bytes."""
    from sora_train.training.trainer import Trainer

    class Steps(Trainer):
        """A run that leaves no checkpoint, which for a model of a billion weights takes longer than its steps."""

        def save(self) -> None:
            pass

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = Steps(cfg)
    trainer.train()
    on_gpu = trainer.world.device.type == "cuda"
    return trainer.parts.num_params, torch.cuda.max_memory_allocated() if on_gpu else None


def _measured(rows: list[dict[str, float]]) -> dict[str, Measured]:
    def stats(name: str, scale: float = 1.0) -> Stats:
        return Stats.of([row[name] * scale for row in rows])

    found = {
        "step time": Measured(stats("train/step_seconds"), "s"),
        "throughput": Measured(stats("train/tokens_per_second"), "tokens/s", "{:,.0f}"),
        "data wait": Measured(stats("train/data_wait", 100), "% of the step", "{:.2f}"),
    }
    if "train/recompiles" in rows[0]:
        found["recompiles"] = Measured(stats("train/recompiles"), "graphs", "{:.0f}")
    if "train/mfu" in rows[0]:
        found["MFU"] = Measured(stats("train/mfu", 100), "% of the peak", "{:.2f}")
    return found


def _facts(
    cfg: Config, overrides: list[str], warmup: int, params: int, memory: int | None
) -> dict[str, str | int | float | None]:
    return {
        "overrides": " ".join(overrides),
        "experiment": cfg.name,
        "device": "cuda" if memory is not None else "cpu",
        "threads": torch.get_num_threads(),
        "trained parameters": params,
        "steps before measuring": warmup,
        "micro-batches a step": cfg.train.micro_batches,
        "FLOPs of a clip": FORMULA,
        "peak GPU memory, GiB": None if memory is None else memory / 2**30,
    }

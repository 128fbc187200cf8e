"""The tape in numbers: seconds and memory to plan and seek, and how long ranks wait for each other.

    python benchmarks/plan.py [--rows 1000000,10000000] [--ranks 8,1024] [--out benchmarks/results/plan.json]

Buckets are those of configs/buckets/256px.yaml, costs those of the 1.3 B model, and the mix is that of a mixed
corpus: a fifth images, clips of 1 to 20 seconds, most of them 16:9. No clip is read. Every size runs in a process
of its own, so that memory is its own.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from sora_train.config.compose import compose
from sora_train.data.sample import Bucket
from sora_train.data.tape.buckets import build_buckets
from sora_train.data.tape.micro_batches import micro_batch_sizes
from sora_train.data.tape.tape import Tape, imbalance, row_costs
from sora_train.models.flops import trained_forward_flops

BUCKETS = "256px"
MODEL = "wan_1_3b"
CLIPS_OF_THE_LARGEST = 8
"""A micro-batch holds as many clips of the largest bucket: about 35,000 tokens."""
DURATIONS = {1: 0.20, 17: 0.15, 33: 0.25, 65: 0.40}
RATIOS = {"1:1": 0.08, "4:3": 0.15, "3:4": 0.05, "16:9": 0.55, "9:16": 0.17}
ROWS_A_SHARD = 1000
FAR_STEP = 1_234_567


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1000000,10000000")
    parser.add_argument("--ranks", default="8,1024")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan.json"))
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    results = []
    for rows in map(int, options.rows.split(",")):
        for ranks in map(int, options.ranks.split(",")):
            command = [sys.executable, __file__, "--one", str(rows), str(ranks)]
            results.append(json.loads(subprocess.check_output(command, text=True)))
            print(describe(results[-1]), flush=True)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}"
    print(f"machine: {machine}")
    print(billion(results[-1]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def measure(rows: int, ranks: int) -> dict[str, float]:
    """Time and memory of a tape over `rows` clips, and the waiting of `ranks` over one whole epoch."""
    cfg = compose([f"buckets={BUCKETS}", f"model={MODEL}", "text.d_model=4096"]).config
    table = build_buckets(cfg.buckets, temporal_factor=4, spatial_multiple=16)
    buckets = [spec.bucket for spec in table]

    def tokens_of(bucket: Bucket) -> int:
        return (1 + (bucket.frames - 1) // 4) * bucket.height * bucket.width // 256

    def cost(tokens: int) -> float:
        return float(trained_forward_flops(cfg.model, cfg.text, tokens, 100))

    share = np.array([DURATIONS[s.bucket.frames] * RATIOS[s.aspect_ratio] for s in table])
    rng = np.random.default_rng(0)
    bucket_of_row = rng.choice(len(table), rows, p=share / share.sum()).astype(np.int64)
    shards = np.arange(rows) // ROWS_A_SHARD
    counts = np.bincount(bucket_of_row, minlength=len(table)).tolist()
    largest = max(map(tokens_of, buckets))
    sizes = micro_batch_sizes(
        buckets, counts, tokens_of, cost, "auto", CLIPS_OF_THE_LARGEST * largest
    )

    def clip_cost(bucket: Bucket) -> float:
        return cost(tokens_of(bucket))

    before = peak_memory()
    began = time.perf_counter()
    tape = Tape(bucket_of_row, shards, buckets, sizes, seed=0, group=ranks, cost=clip_cost)
    built = time.perf_counter()
    tape[0]
    planned = time.perf_counter()
    tape[FAR_STEP * ranks]
    sought = time.perf_counter()
    tape[FAR_STEP * ranks + 1]
    following = time.perf_counter()
    # As many whole rows as an epoch has, across the border to the next one.
    waits = row_costs(tape, ranks, ranks, steps=-(-tape.per_epoch // ranks))
    unequal = imbalance(waits)
    working = rng.permutation(waits[waits > 0])
    drawn = imbalance(working[: len(working) // ranks * ranks].reshape(-1, ranks))
    by_clip = imbalance(drawn_costs(tape, rng, ranks))
    return {
        "rows": rows,
        "ranks": ranks,
        "build_seconds": built - began,
        "plan_seconds": planned - built,
        "seek_far_seconds": sought - planned,
        "next_seconds": following - sought,
        "memory_gb": peak_memory(),
        "memory_before_gb": before,
        "micro_batches": tape.per_epoch,
        "rows_of_micro_batches": len(unequal),
        "imbalance_largest": float(unequal.max()),
        "imbalance_mean": float(unequal.mean()),
        "rows_over_2_percent": int((unequal > 0.02).sum()),
        "efficiency": float(waits.sum() / (waits.max(axis=1).sum() * ranks)),
        "imbalance_shuffled_micro_batches": float(drawn.mean()),
        "imbalance_one_clip_a_rank": float(by_clip.mean()),
    }


def drawn_costs(tape: Tape, rng: np.random.Generator, ranks: int) -> np.ndarray:
    """What random drawing gives: every rank a full micro-batch of clips drawn without regard to length."""
    cost = np.array([tape.clip_cost(bucket) for bucket in tape.buckets])[tape.bucket_of_row]
    drawn = rng.choice(cost, (64, ranks, 2 * CLIPS_OF_THE_LARGEST))
    return drawn.sum(axis=2)


def peak_memory() -> float:
    """Largest resident size of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def describe(result: dict[str, float]) -> str:
    return (
        f"{result['rows']:,.0f} rows, {result['ranks']} ranks: build {result['build_seconds']:.2f} s, "
        f"plan an epoch {result['plan_seconds']:.2f} s, seek to a far step {result['seek_far_seconds']:.2f} s "
        f"(the next one {result['next_seconds'] * 1e6:.0f} us), peak {result['memory_gb']:.2f} GB; "
        f"{result['rows_of_micro_batches']:,} rows of micro-batches, imbalance at most "
        f"{result['imbalance_largest']:.2%}, mean {result['imbalance_mean']:.2%} "
        f"({result['rows_over_2_percent']} over 2 %), efficiency {result['efficiency']:.2%}; random: "
        f"{result['imbalance_one_clip_a_rank']:.1%} (clips drawn), "
        f"{result['imbalance_shuffled_micro_batches']:.1%} (these micro-batches shuffled)"
    )


def billion(largest: dict[str, float]) -> str:
    """What 1 billion rows would cost, scaled from the largest run."""
    factor = 1e9 / largest["rows"]
    seconds = factor * (largest["build_seconds"] + largest["plan_seconds"])
    memory = factor * (largest["memory_gb"] - largest["memory_before_gb"])
    return (
        f"1 billion rows, by proportion: {seconds / 60:.0f} min and {memory:.0f} GB for an epoch planned whole, so "
        "such a source is to be split into parts of 10 million that follow each other"
    )


if __name__ == "__main__":
    main()

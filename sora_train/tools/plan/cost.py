"""`sora bench cost`: seconds of forward and backward over clips of several lengths, and the a and b of
the cost model that explain them.

The plan balances micro-batches by a * S + b * S^2 for a clip of S tokens. FLOPs give a and b without
a machine; a machine's own differ, as small products run slower than large ones and attention slower
than either. What every micro-batch takes whatever its length (c) is measured and left out of the
cost: all micro-batches pay it alike.
"""

import argparse
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.device.measuring import Measured, Result, Stats, grid_of, measure
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.objectives import FlowBatch
from sora_train.objectives.flow_batch import blank_inputs
from sora_train.parallel.engine import build_engine, resolve_layout
from sora_train.runtime import world as distributed
from sora_train.tools.plan.time.encoders import geometry_of
from sora_train.training.optim.optim import build_optimizer
from sora_train.training.pipeline.plan import bucket_table, token_counter

DEFAULT_EXPERIMENT = "experiment=quickstart"
DEFAULT_OUT = Path("benchmarks/results")
LENGTHS = 6
"""Token counts measured where none are asked for, spread evenly in ratio."""
SPREAD = 16
"""The longest of them over the shortest."""
EVEN = 256
"""Long clips have a multiple of so many tokens."""
FEWEST = 3
"""Lengths that determine a, b and c."""


@dataclass(frozen=True)
class Fit:
    """Seconds of a micro-batch of one clip of S tokens: c + a * S + b * S^2, none of them negative."""

    a: float
    b: float
    c: float

    def __call__(self, tokens: float) -> float:
        return self.c + self.a * tokens + self.b * tokens * tokens

    @property
    def overrides(self) -> str:
        return f"data.cost_a={self.a:.4g} data.cost_b={self.b:.4g}"


def main(arguments: Sequence[str]) -> int:
    """Run `[overrides] [tokens=A,B,C] [--repeats N] [--out DIR]`, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sora bench cost", allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each length")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder of cost.json, cost.md"
    )
    options, rest = parser.parse_known_args(list(arguments))
    tokens = [text for text in rest if text.startswith("tokens=")]
    overrides = [text for text in rest if text not in tokens]
    path, table = run(
        overrides,
        tokens=parse_tokens(tokens[-1]) if tokens else None,
        repeats=options.repeats,
        out=options.out,
    )
    print(f"\n{table}\nwrote {path} and {path.with_suffix('.md')}")
    return 0


def parse_tokens(text: str) -> list[int]:
    """`tokens=A,B,C`, in brackets or not. Raises UserError for anything else."""
    words = text.partition("=")[2].strip("[]").split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise UserError(f"{text} is not a list of token counts, such as tokens=256,1024,4096")
    return [int(word) for word in words]


def run(
    overrides: list[str], *, tokens: list[int] | None, repeats: int, out: Path
) -> tuple[Path, str]:
    """Measure clips of `tokens` tokens `repeats` times, fit, and write `out`/cost.json and cost.md.

    Without `experiment=` in the Hydra `overrides` the model is the quickstart's. Returns the path
    of the JSON, and the table with the two overrides to paste.

    Raises:
        UserError: fewer than three lengths, no repeats, several ranks, a task without tokens, or
            times that do not grow with the tokens.
        ConfigError: an override is wrong.
    """
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: measure each length at least once")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sora bench cost measures one process; start it without torchrun")
    named = any(override.startswith("experiment=") for override in overrides)
    chosen = [*([] if named else [DEFAULT_EXPERIMENT]), *overrides]
    cfg: Config = compose([*chosen, "tracker=none"]).config
    if cfg.task != "text_to_video":
        raise UserError(
            f"task={cfg.task}: sora bench cost measures a text-to-video model; name an experiment of one"
        )
    lengths = sorted(set(tokens if tokens else default_lengths(cfg)))
    if len(lengths) < FEWEST:
        raise UserError(
            f"tokens={','.join(map(str, lengths))}: a, b and c need at least {FEWEST} different lengths"
        )
    check_lengths(cfg, lengths)
    seconds = measure_lengths(cfg, lengths, repeats)
    fitted = fit(lengths, [seconds[length].median for length in lengths])
    measured = {f"{length} tokens": Measured(seconds[length], "s") for length in lengths}
    facts: dict[str, str | int | float | None] = {
        "overrides": " ".join(chosen),
        "experiment": cfg.name,
        "threads": torch.get_num_threads(),
        "a, s a token": fitted.a,
        "b, s a token squared": fitted.b,
        "c, s a micro-batch": fitted.c,
        "to paste": fitted.overrides,
    }
    return Result("cost", measured, facts).write(Path(out)), table(fitted, seconds)


def default_lengths(cfg: Config) -> list[int]:
    """Token counts up to the largest bucket's, or `data.micro_batch_tokens` where that is more: short
    clips alone would show the overhead of a step and not its work."""
    (geometry, _), patch = geometry_of(cfg), cfg.model.patch_size
    tokens_of = token_counter(geometry, patch)
    largest = max(tokens_of(spec.bucket) for spec in bucket_table(cfg, geometry, patch))
    longest = max(largest, cfg.data.micro_batch_tokens)
    first = max(1, longest // SPREAD)
    counts = {round(count) for count in np.geomspace(first, longest, LENGTHS)}
    # A length with a large prime factor is one long row, which no bucket is.
    return sorted({count if count < 1024 else count // EVEN * EVEN for count in counts})


def check_lengths(cfg: Config, lengths: Sequence[int]) -> None:
    """Raises UserError for a length whose clip has a side beyond `model.rope_max_length`."""
    most = cfg.model.rope_max_length
    for length in lengths:
        if max(grid_of(length)) > most:
            near = max(EVEN, round(length / EVEN) * EVEN)
            raise UserError(
                f"tokens={length}: its most even clip has {' x '.join(map(str, grid_of(length)))} tokens, and a side "
                f"has at most model.rope_max_length={most}; take tokens={near}"
            )


def measure_lengths(cfg: Config, lengths: Sequence[int], repeats: int) -> dict[int, Stats]:
    """Seconds of forward and backward of one clip of each length, in the engine that trains."""
    world = distributed.start(cfg.run.device, cfg.run.threads)
    try:
        world, layout = resolve_layout(cfg, world)
        model = TextToVideo(cfg.model, cfg.text, seed=cfg.seed)
        engine = build_engine(model, cfg, world, layout, partial(build_optimizer, cfg.optim))
        seconds = {}
        for length in lengths:
            batch = clip_of(cfg, length, world.device)

            def once(batch: FlowBatch = batch) -> None:
                engine.backward(batch.loss_sum(engine.model), last=True)
                engine.model.zero_grad(set_to_none=True)

            seconds[length] = measure(once, warmup=2, repeats=repeats)
        return seconds
    finally:
        distributed.stop(world)


def clip_of(cfg: Config, tokens: int, device: torch.device) -> FlowBatch:
    """A random clip of so many tokens, as square as they allow, with a caption of half the limit."""
    frames, rows, columns = grid_of(tokens)
    patch, p, q = cfg.model.patch_size
    size = (frames * patch, rows * p, columns * q)
    shape = (1, cfg.model.velocity_channels, *size)
    generator = torch.Generator().manual_seed(cfg.seed)
    return FlowBatch(
        x=torch.randn(shape, generator=generator).to(device),
        noise=torch.randn(shape, generator=generator).to(device),
        t_B=torch.full((1,), 0.5, device=device),
        mask_BT=torch.zeros(1, frames * patch, device=device),
        prompts=["x" * (cfg.text.max_length // 2 - 1)],
        fps_B=torch.full((1,), cfg.buckets.fps, device=device),
        **blank_inputs(cfg.model, 1, size, device),
    )


def fit(tokens: Sequence[int], seconds: Sequence[float]) -> Fit:
    """The c, a, b >= 0 of c + a * S + b * S^2 with the least squared relative errors.

    Exact: of every subset of the three, solved freely, the best whose solution has no negative
    value.

    Raises:
        UserError: the best has a = b = 0, so the cost would be the same for every clip.
    """
    s, t = np.asarray(tokens, float), np.asarray(seconds, float)
    # Divided by the largest, or S^2 would be many orders of magnitude from 1; by t for relative errors.
    columns = np.stack([np.ones_like(s), s / s.max(), (s / s.max()) ** 2], axis=1) / t[:, None]
    best, least = np.zeros(3), np.inf
    for number in (1, 2, 3):
        for chosen in itertools.combinations(range(3), number):
            values = np.linalg.lstsq(columns[:, chosen], np.ones_like(t), rcond=None)[0]
            error = float(np.square(columns[:, chosen] @ values - 1).sum())
            # 1e-12: a value that explains nothing but rounding is left at zero.
            if (values >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(3), error
                best[list(chosen)] = values
    c, a, b = best / [1, s.max(), s.max() ** 2]
    if a == b == 0:
        raise UserError(
            f"the times do not grow with the tokens from {min(tokens)} to {max(tokens)}; measure longer clips "
            f"(tokens={max(tokens)},{4 * max(tokens)},{16 * max(tokens)}) or repeat more often"
        )
    return Fit(float(a), float(b), float(c))


def table(fitted: Fit, seconds: dict[int, Stats]) -> str:
    """Measured beside predicted seconds, and the overrides to paste."""
    lines = [
        "| tokens | measured, s | predicted, s | off by |",
        "|--:|--:|--:|--:|",
    ]
    for tokens, stats in seconds.items():
        off = fitted(tokens) / stats.median - 1
        lines.append(
            f"| {tokens:,} | {stats.median:.4g} | {fitted(tokens):.4g} | {100 * off:+.1f} % |"
        )
    lines += [
        "",
        f"seconds = {fitted.c:.4g} + {fitted.a:.4g} * S + {fitted.b:.4g} * S^2; a run plans by it with",
        "",
        f"    {fitted.overrides}",
        "",
    ]
    return "\n".join(lines)

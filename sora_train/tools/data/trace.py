"""`sora data trace`: which clips each rank would train on in which step, as JSON rows.

The tape is a pure function of manifest, buckets and seed, so neither a network nor a clip is needed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sora_train.base.files import write_atomically
from sora_train.checkpoint.layout import list_checkpoints
from sora_train.checkpoint.meta import read_meta
from sora_train.config import Config
from sora_train.config.sections.settings import TraceSettings
from sora_train.data.index.sources import SourceSnapshot, open_sources
from sora_train.data.tape.mixture import TapeSequence
from sora_train.data.tape.tape import imbalance, row_costs, rows_for_rank, slot_efficiency
from sora_train.errors import UserError
from sora_train.models.vae.autoencoder import read_geometry
from sora_train.training.pipeline.data import next_micro_batch
from sora_train.training.pipeline.plan import (
    bucket_table,
    cost_model,
    memory_cap,
    plan,
    token_counter,
)


@dataclass(frozen=True)
class Trace:
    """The tape of a run, and tokens of a clip of each of its buckets."""

    tape: TapeSequence
    tokens: dict[str, int]
    micro_batches: int
    cp: int = 1
    """Neighbouring ranks that share their micro-batches."""

    @classmethod
    def open(cls, cfg: Config) -> "Trace":
        """As a run plans it; its sources are indexed, or rendered, below `cfg.run.dir`. Where that holds a run, it is
        the tape of that run, which goes on from its newest checkpoint.

        Raises:
            UserError: no such source, no caption, no such VAE, no clip that fits a bucket.
            ConfigError: the buckets do not fit the VAE.
        """
        geometry = read_geometry(cfg.vae)
        patch = cfg.model.patch_size if cfg.task == "text_to_video" else (1, 1, 1)
        table = bucket_table(cfg, geometry, patch)
        saved = list_checkpoints(Path(cfg.run.dir) / "checkpoints")
        newest = read_meta(saved[-1]) if saved else None
        snapshots = SourceSnapshot.listed(newest.snapshots) if newest else []
        sources = open_sources(cfg, Path(cfg.run.dir), snapshots)
        tokens_of = token_counter(geometry, patch)
        memory = memory_cap(cfg, geometry, tokens_of)
        now = next_micro_batch(newest) if newest else 0
        _, tape, _ = plan(cfg, sources, table, tokens_of, cost_model(cfg), memory=memory, now=now)
        tokens = {spec.bucket.name: tokens_of(spec.bucket) for spec in table}
        cp = cfg.parallel.ulysses * cfg.parallel.ring
        return cls(tape, tokens, cfg.train.micro_batches, cp)

    def parts(self, settings: TraceSettings) -> int:
        """Parts into which the ranks divide a step. Raises UserError where they do not fit the degrees."""
        if settings.world % self.cp:
            raise UserError(
                f"world={settings.world} is not a multiple of the {self.cp} ranks that share their clips "
                "(parallel.ulysses x parallel.ring); give one"
            )
        return settings.world // self.cp

    def rows(self, settings: TraceSettings) -> Iterator[dict[str, object]]:
        """One row a micro-batch, by step, then by row of the step, then by rank.

        `rank` is the first of those that share it, `micro` counts their micro-batches of the step, `samples` are
        rows of the manifest, `tokens` and `cost` those of the whole micro-batch. A slot left over has no samples.
        """
        world = self.parts(settings)
        for step in range(settings.first, settings.last):
            shares = [
                rows_for_rank(self.tape, step, self.micro_batches, r, world) for r in range(world)
            ]
            idle = self.tape[step * self.micro_batches].bucket.name
            for micro in range(len(shares[0])):
                for rank in range(world):
                    entry = shares[rank][micro]
                    name = entry.bucket.name if entry else idle
                    yield {
                        "step": step,
                        "rank": rank * self.cp,
                        "micro": micro,
                        "bucket": name,
                        "samples": list(entry.rows) if entry else [],
                        "tokens": self.tokens[name] * len(entry.rows) if entry else 0,
                        "cost": self.tape.cost(entry) if entry else 0.0,
                    }

    def summary(self, settings: TraceSettings) -> str:
        """Imbalance and idle slots of the steps asked for, in a sentence."""
        costs = row_costs(
            self.tape,
            self.micro_batches,
            self.parts(settings),
            first_step=settings.first,
            steps=settings.last - settings.first,
        )
        waits = imbalance(costs)
        return (
            f"steps {settings.steps} on {settings.world} rank(s), {len(costs)} rows of micro-batches: "
            f"(max - mean) / max of predicted cost is {waits.max():.2%} at most and {waits.mean():.2%} on average, "
            f"{slot_efficiency(self.micro_batches, self.parts(settings)):.0%} of the slots hold a micro-batch"
        )


def trace(cfg: Config, settings: TraceSettings) -> str:
    """Rows as JSON lines, into `settings.out` where that is given; returns what is to be printed."""
    tape = Trace.open(cfg)
    lines = [json.dumps(row) for row in tape.rows(settings)]
    if not settings.out:
        return "\n".join(lines)
    out = Path(settings.out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "\n".join(lines) + "\n")
    return f"{tape.summary(settings)}\nwrote {len(lines)} rows to {out}"

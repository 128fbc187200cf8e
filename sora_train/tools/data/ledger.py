"""`sora data ledger RUN`: what a run's loss says of each of its clips, as a table, a sheet and a file for data.exclude.

Every draw is keyed, so the loss of a clip at a fixed noise level can be compared over checkpoints and captions. The
run is looked at as `sora replay` looks at it; nothing of it but its folder `ledger` is written.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from sora_train import checkpoint as checkpoints
from sora_train.base.contact_sheet import contact_sheet
from sora_train.base.files import renamed_when_whole, write_atomically
from sora_train.base.progress import Progress
from sora_train.checkpoint import Checkpoint
from sora_train.checkpoint.layout import weights_digest
from sora_train.config import Config
from sora_train.data.sample import Clip, Failure
from sora_train.errors import Fault, UserError
from sora_train.objectives import TextToVideoObjective
from sora_train.objectives.validation import BATCH, same_shape_batches, validated_kinds
from sora_train.runtime import world as distributed
from sora_train.sampling.api import shipped_config
from sora_train.tools.data.ledger_lists import Scores, scores_of
from sora_train.tools.data.ledger_losses import EXCHANGED, Losses, Measuring, batches, captions_for
from sora_train.tools.doctor.replay.replay import (
    Plan,
    ReplayRequest,
    computing,
    context_alone,
    on_one_machine,
    rebuilt,
)
from sora_train.tools.terminal import table_of
from sora_train.training.components import Builder, Components
from sora_train.training.outputs.step_picture import frames_of
from sora_train.training.pipeline.validation_clips import read_validation
from sora_train.training.run import RunContext
from sora_train.training.trainer import Trainer

SHOWN, DRAWN = 10, 8
"""Clips of each list in the terminal and on the sheet."""
PREFIX = "ema."


@dataclass(frozen=True)
class LedgerRequest:
    """Which clips of a run are looked at (0: all), and under which of its checkpoints (default: the newest)."""

    run: Path
    step: int | None = None
    clips: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class Looked:
    """A rebuilt run, its model on its device, and what is measured of it."""

    run: RunContext
    parts: Components
    model: nn.Module
    measuring: Measuring
    rows: list[int]
    held: list[Clip]

    def under(self, checkpoint: Checkpoint, *, captions: bool) -> tuple[Losses, Losses]:
        """Losses of the training clips and of the held-out ones under the averaged weights of a checkpoint, with
        `captions` those of exchanged captions too."""
        named = self.model.named_parameters()
        trained = {f"{PREFIX}{name}": p.detach() for name, p in named if p.requires_grad}
        checkpoints.load_part(checkpoint, trained, PREFIX)
        measure, loader = self.measuring.batch, self.parts.data.loader
        others = captions_for(loader, self.rows, self.run.cfg.seed) if captions else {}
        done = []
        with Progress(len(self.rows), f"clips under step {checkpoint.step}") as progress:
            for clips, count in batches(loader, self.rows, BATCH):
                told = [self._told(clips, others, number) for number in range(EXCHANGED + captions)]
                done.append(measure(self.model, clips, told if captions else []))
                progress.update(count)
        if not done:
            raise UserError(f"no training clip of {self.run.folder.path} can be read any more")
        held = [measure(self.model, clips, []) for clips in same_shape_batches(self.held)]
        return Losses.joined(done), Losses.joined(held) if held else done[0].at(np.zeros(0, int))

    def _told(self, clips: list[Clip], others: dict[int, list[str]], number: int) -> list[Clip]:
        """The clips with their `number`-th other caption; the one after the last is the empty caption."""
        told = []
        for clip in clips:
            caption = [*others.get(clip.row, [""] * EXCHANGED), ""][number]
            other = self.parts.data.loader.with_text(replace(clip, caption=caption, text=None))
            told.append(replace(clip, caption=caption) if isinstance(other, Failure) else other)
        return told


def ledger(
    request: LedgerRequest,
    beside: Callable[[RunContext], Builder] = Trainer.beside,
    config_cls: type[Config] = Config,
) -> str:
    """Measure, write RUN/ledger/step-N.parquet, .csv and .png, and return what is to be printed.

    Raises:
        UserError: no such run or checkpoint, it trained no text-to-video model, or its sources are not what they were.
        Fault: the clips cannot be read, or nothing can be written.
    """
    judged = checkpoints.find(request.run, request.step)
    saved = checkpoints.list_checkpoints(request.run / "checkpoints")
    cfg = on_one_machine(shipped_config(request.run, config_cls=config_cls), request.run)
    if cfg.task != "text_to_video":
        raise UserError(
            f"{request.run} trained a {cfg.task}, whose clips have no captions to judge"
        )
    # Clips that are excluded by now are looked at like all others.
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"exclude": ""})})
    world = distributed.start(request.device, cfg.run.threads)
    try:
        run = context_alone(cfg, world)
        plan = Plan(cfg, {}, 0, 1, 1, judged, saved[-1])
        parts = rebuilt(ReplayRequest(request.run, judged.step), plan, beside(run))
        try:
            return _ledger(request, _looked(request, run, parts), judged, saved[0])
        finally:
            parts.data.close()
    finally:
        distributed.stop(world)


def _looked(request: LedgerRequest, run: RunContext, parts: Components) -> Looked:
    cfg, data = run.cfg, parts.data
    assert parts.model is not None and isinstance(parts.objective, TextToVideoObjective)
    model = computing(parts.model, cfg, run.world)
    model.eval()
    rows = data.tape.rows
    if 0 < request.clips < len(rows):
        rows = np.sort(np.random.default_rng(cfg.seed).permutation(rows)[: request.clips])
    # A dry run, as which the parts were built, reads none.
    awake = cfg.model_copy(update={"dry_run": False})
    held = read_validation(awake, data.sources.val, data.table, parts.vae, True, run.control)
    measuring = Measuring(parts.objective, validated_kinds(cfg)[0], cfg.validation.times)
    return Looked(run, parts, model, measuring, rows.tolist(), held)


def _ledger(request: LedgerRequest, looked: Looked, judged: Checkpoint, oldest: Checkpoint) -> str:
    first = looked.under(oldest, captions=False) if oldest.step < judged.step else (None, None)
    last, held = looked.under(judged, captions=True)
    # A model that was trained without dropped captions does not know the empty one.
    by_empty = looked.run.cfg.objective.caption_dropout > 0
    scores = scores_of(last, held, *first, by_empty=by_empty)
    out = request.run / "ledger" / f"step-{judged.step:06d}"
    about = {
        "run": str(request.run),
        "step": judged.step,
        "compared with step": oldest.step if first[0] is not None else None,
        "weights": weights_digest(judged, "ema"),
        "times": list(looked.measuring.times),
        "held-out clips": held.own.mean(axis=0).tolist() if len(held.rows) else None,
    }
    facts = _facts(looked, last, scores)
    listed = [(name, int(n)) for name, places in scores.listed().items() for n in places]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write_table(out.with_suffix(".parquet"), facts, last, about)
        write_atomically(out.with_suffix(".csv"), _csv_of(facts, listed))
        sheet = _draw(out.with_suffix(".png"), looked, facts, scores, about)
    except OSError as error:
        raise Fault(f"the ledger cannot be written to {out.parent}: {error.strerror}") from error
    paths = [out.with_suffix(".parquet"), out.with_suffix(".csv"), *([sheet] if sheet else [])]
    return "\n".join([_text(facts, scores, about), *(f"wrote {path}" for path in paths)])


def _facts(looked: Looked, last: Losses, scores: Scores) -> list[dict[str, Any]]:
    """What is known of each clip, in the order of `last`."""
    manifest, loader = looked.parts.data.manifest, looked.parts.data.loader
    means = {name: getattr(last, name).mean(axis=1) for name in ("own", "empty")}
    means["others"] = np.nanmean(last.exchanged, axis=(1, 2))
    return [
        {
            "key": str(manifest.key[row]),
            "source": str(manifest.source[row]),
            "row": int(row),
            "shape": str(last.shapes[n]),
            "caption": loader.caption(int(row), 0),
            **{name: float(values[n]) for name, values in means.items()},
            **{name: float(values[n]) for name, values in vars(scores).items()},
        }
        for n, row in enumerate(last.rows)
    ]


def _write_table(
    path: Path, facts: Sequence[dict[str, Any]], last: Losses, about: dict[str, Any]
) -> None:
    """One row a clip: its facts, and its losses at each noise level of the metadata's `times`."""
    table = pa.Table.from_pylist(list(facts))
    levels = {"own": last.own, "empty": last.empty, "others": np.nanmean(last.exchanged, axis=2)}
    for name, values in levels.items():
        table = table.append_column(f"{name} by level", pa.array(values.tolist()))
    table = table.replace_schema_metadata({"sora_train.ledger": json.dumps(about)})
    with renamed_when_whole(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def _csv_of(facts: Sequence[dict[str, Any]], listed: Sequence[tuple[str, int]]) -> str:
    """The listed clips, as data.exclude takes them; a clip of several lists has a line in each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["list", "score", "source", "key", "caption"])
    for name, n in listed:
        one = facts[n]
        score = one[name.replace(" ", "_")]
        writer.writerow([name, f"{score:.3f}", one["source"], one["key"], one["caption"]])
    return text.getvalue()


def _note(one: dict[str, Any], name: str) -> str:
    losses = f"loss {one['own']:.3f}, with others' captions {one['others']:.3f}, with none {one['empty']:.3f}"
    return f"{name} {one[name.replace(' ', '_')]:.2f}\n{one['key']}\n{losses}"


def _draw(
    path: Path,
    looked: Looked,
    facts: Sequence[dict[str, Any]],
    scores: Scores,
    about: dict[str, Any],
) -> Path | None:
    """The first clips of each list with their captions; None where nothing is listed."""
    shown = [(name, int(n)) for name, places in scores.listed().items() for n in places[:DRAWN]]
    clips, _ = looked.parts.data.loader.read_rows([facts[n]["row"] for _, n in shown])
    of_row = {clip.row: clip for clip in clips}
    shown = [(name, n) for name, n in shown if facts[n]["row"] in of_row]
    if not shown:
        return None
    counts = ", ".join(f"{len(places)} {name}" for name, places in scores.listed().items())
    return contact_sheet(
        [frames_of(of_row[facts[n]["row"]], looked.parts.vae) for _, n in shown],
        [facts[n]["caption"] or "(no caption)" for _, n in shown],
        path,
        notes=[_note(facts[n], name) for name, n in shown],
        title=f"{about['run']} at step {about['step']}: {counts} of {len(facts)} clips",
    )


def _text(facts: Sequence[dict[str, Any]], scores: Scores, about: dict[str, Any]) -> str:
    """How many clips each list has, and its first ones."""
    blocks = []
    for name, places in scores.listed().items():
        values = getattr(scores, name.replace(" ", "_"))
        if not np.isfinite(values).any():
            blocks.append(f"{name}: not known, {_lacking(name)}")
            continue
        blocks.append(f"{name}: {len(places)} of {len(facts)} clips")
        columns = ("score", "clip", "loss", "others' captions", "no caption", "caption")
        rows = [
            (f"{values[n]:.2f}", one["key"], f"{one['own']:.3f}", f"{one['others']:.3f}",
             f"{one['empty']:.3f}", one["caption"])
            for n in places[:SHOWN]
            for one in [facts[n]]
        ]  # fmt: skip
        blocks += [table_of(columns, rows)] if rows else []
    return "\n".join([*blocks, f"step {about['step']} of {about['run']}, {len(facts)} clips"])


def _lacking(name: str) -> str:
    return {
        "mislabelled": "since the clips' captions make no difference to their losses",
        "memorised": "since the run holds no clips out",
        "never learned": "since there is no earlier checkpoint to compare with (checkpoint.keep_every keeps some)",
    }[name]

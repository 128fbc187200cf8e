"""Resuming a run: which checkpoint is taken, which keys may have changed since, and whether the loss is the same.

The newest complete checkpoint whose digests are right is taken; others are reported and passed
over. Keys of the configuration that changed are refused or recorded by their class
(`config/resumption.py`). With `resume.run` a new run folder begins from another run's checkpoint.
"""

import fnmatch
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch.distributed.checkpoint import FileSystemReader

from sora_train import checkpoint as checkpoints
from sora_train.base.console import plain_console
from sora_train.base.files import write_atomically
from sora_train.checkpoint import Checkpoint
from sora_train.checkpoint.layout import split_step
from sora_train.checkpoint.meta import CheckpointMeta, read_meta
from sora_train.config import Config
from sora_train.config.resumption import changes, resume_class
from sora_train.config.schema import overlaid
from sora_train.diffusion.draws import DRAWS, OLDEST_DRAWS
from sora_train.errors import ConfigError, Fault, UserError
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.run_folder import CHANGES, RunFolder
from sora_train.runtime.control_plane import ControlPlane
from sora_train.training.components import Components
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.resilience.probe import measure_probe, require_same_probe
from sora_train.training.resilience.rollback import discard_abandoned
from sora_train.training.run import RunContext

ASIDE = "damaged-"
PASSED_OVER = "passed_over.txt"
"""Beside the checkpoints: those that were not taken, and why."""

Change = tuple[str, Any, Any]
"""Dotted key, value of the checkpoint, value now."""


@dataclass(frozen=True)
class Start:
    """Where a run resumes: a checkpoint, its facts, and the run it was forked from, or an empty string."""

    checkpoint: Checkpoint
    meta: CheckpointMeta
    forked_from: str = ""


def starting_point(cfg: Config, folder: RunFolder, control: ControlPlane) -> Start | None:
    """The run folder's own newest checkpoint, else the one of `resume.run`, else None; the same on all ranks.

    Raises:
        UserError: `resume.run` has no such checkpoint, or the folder holds a run that was not forked from it.
    """
    if cfg.checkpoint.resume == "never":
        control.together(lambda: _refuse_older(folder))
        return None
    if control.world.is_main:
        discard_abandoned(folder.path)
    own = choose(folder.checkpoints, control)
    if own is not None:
        meta = read_meta(own)
        if cfg.resume.run and not _same_run(meta.forked_from, cfg.resume.run):
            raise UserError(
                f"run.dir={folder.path} holds a run that was {_origin(meta)}, and resume.run={cfg.resume.run} would "
                "fork it anew; drop resume.run to go on with it, or give another run.dir"
            )
        return Start(own, meta, meta.forked_from)
    if not cfg.resume.run:
        return None
    run, step = control.together(lambda: split_step(cfg.resume.run))
    chosen = control.together(lambda: checkpoints.find(run, step))
    why = damage(chosen, control)
    if why:
        raise UserError(f"resume.run={cfg.resume.run}: {why}; choose another step with FOLDER@STEP")
    meta = read_meta(chosen)
    if control.world.is_main:
        _take_history(run, folder, meta.step)
    return Start(chosen, replace(meta, forked_from=cfg.resume.run), cfg.resume.run)


def _same_run(one: str, other: str) -> bool:
    """Whether two texts name the same step of the same run."""
    if not one:
        return False
    if one == other:
        return True
    (a, step_a), (b, step_b) = split_step(one), split_step(other)
    return a.resolve() == b.resolve() and step_a == step_b


def _origin(meta: CheckpointMeta) -> str:
    return f"forked from {meta.forked_from}" if meta.forked_from else "begun anew"


def _take_history(run: Path, folder: RunFolder, step: int) -> None:
    """The rows up to the fork, so that charts and tables of the new run are whole."""
    for name in (folder.metrics.name, CHANGES):
        if (run / name).is_file() and not (folder.path / name).exists():
            rows = [row for row in read_metrics(run / name) if row["step"] <= step]
            write_atomically(folder.path / name, "".join(json.dumps(row) + "\n" for row in rows))


# -- choosing a checkpoint ----------------------------------------------------------------------------


def choose(folder: Path, control: ControlPlane) -> Checkpoint | None:
    """The newest checkpoint that is complete and undamaged; rank 0 reports why newer ones are passed over."""
    listed = control.broadcast(_listed(folder) if control.world.is_main else None)
    assert isinstance(listed, list)
    why = ""
    for path, lacks in listed:
        checkpoint = Checkpoint(path, int(path.name.removeprefix("step-")))
        why = lacks or damage(checkpoint, control)
        if not why:
            return checkpoint
        if control.world.is_main:
            plain_console(stderr=True).print(f"passed over: {why}", soft_wrap=True)
            _set_aside(path, why)
    if listed:
        raise Fault(
            f"none of the {len(listed)} checkpoints in {folder} is whole, the newest: {why}; they are kept there as "
            f"{ASIDE}..., give another run.dir to start anew"
        )
    return None


def _set_aside(path: Path, why: str) -> None:
    """Keep a damaged checkpoint under another name, so that nobody counts on it, and note why."""
    with (path.parent / PASSED_OVER).open("a") as file:
        file.write(f"{why}\n")
    aside = path.with_name(f"{ASIDE}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.replace(aside)


def _refuse_older(folder: RunFolder) -> None:
    """Raises UserError where checkpoints of an earlier run would be mixed with those of a new one."""
    older = checkpoints.list_checkpoints(folder.checkpoints)
    if older and folder.is_main:
        raise UserError(
            f"run.dir={folder.path} holds checkpoints up to step {older[-1].step}, and checkpoint.resume=never starts "
            "anew beside them; give another run.dir, or remove that folder"
        )


def _listed(folder: Path) -> list[tuple[Path, str]]:
    """Checkpoints newest first, each with why it is not complete, or an empty string."""
    paths = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    newest = sorted(paths, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
    lacks = {path: checkpoints.why_incomplete(path) for path in newest}
    return [(path, why and f"{path}: {why}") for path, why in lacks.items()]


def damage(checkpoint: Checkpoint, control: ControlPlane) -> str:
    """Which file does not match its digest, or an empty string; the ranks share the reading."""
    world = control.world
    mine = checkpoints.damaged(checkpoint, part=world.rank, parts=world.size)
    damages = [text for text in control.gather_objects(mine) if text]
    return str(damages[0]) if damages else ""


# -- what has changed since ---------------------------------------------------------------------------


def allowed_changes(cfg: Config, saved: dict[str, Any]) -> list[Change]:
    """The recorded keys that differ from the configuration that a checkpoint holds.

    Raises:
        ConfigError: a refused key differs; it names up to five, with both values.
    """
    saved = _with_defaults(saved, cfg)
    now = cfg.model_dump(mode="json")
    if cfg.train.epochs:
        # A run of epochs gets them in steps once its tape is known.
        now["train"] |= {key: saved["train"][key] for key in ("steps", "epochs")}
    differing = changes(saved, now)
    refused = [change for change in differing if resume_class(change[0]) != "recorded"]
    if refused:
        differences = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in refused[:5])
        raise ConfigError(
            f"run.dir={cfg.run.dir} holds another experiment: {differences}; "
            "use the old values to go on, or another run.dir to start anew"
        )
    return differing


def changed_draws(meta: CheckpointMeta) -> list[Change]:
    """Whether a checkpoint was trained with draws of another generator: from here on noise, noise levels, conditions
    and dropped captions are others than that version would have drawn, of the same laws."""
    before = meta.versions.get("draws", OLDEST_DRAWS)
    return [] if before == DRAWS else [("draws", before, DRAWS)]


def changed_exclusion(data: TrainingData, changed: Sequence[Change]) -> list[Change]:
    """Whether the file of data.exclude names other clips than before, where its path alone does not tell."""
    sources = data.sources
    if not sources.change or any(key == "data.exclude" for key, _, _ in changed):
        return []
    before, now = (len(snapshot.excluded) for snapshot in sources.snapshots[-2:])
    same = sources.snapshots[-2].excluded == sources.snapshots[-1].excluded
    return [] if same else [("data.exclude", f"{before} clips", f"{now} clips")]


def _with_defaults(saved: dict[str, Any], cfg: Config) -> dict[str, Any]:
    """A key that came after the checkpoint was written had its default's meaning."""
    return overlaid(type(cfg)().model_dump(mode="json"), saved)


def record_changes(run: RunContext, step: int, changed: list[Change]) -> None:
    """Show what changed and write it down with the step from which it counts; the first rank alone."""
    if not changed or not run.is_main or run.cfg.dry_run:
        return
    table = Table(title=f"changed from step {step} on", title_justify="left")
    for column in ("key", "was", "is"):
        table.add_column(column)
    for key, old, new in changed:
        table.add_row(key, str(old), str(new))
    plain_console().print(table)
    path = run.folder.path / CHANGES
    rows = [{"step": step, "key": key, "was": old, "is": new} for key, old, new in changed]
    before = path.read_text() if path.exists() else ""
    new_lines = "".join(json.dumps(row) + "\n" for row in rows)
    # A start that is repeated after a crash records the same changes.
    if not before.endswith(new_lines):
        write_atomically(path, before + new_lines)


# -- loading ------------------------------------------------------------------------------------------


def load_parts(run: RunContext, parts: Components, start: Start) -> None:
    """Fill all tensors but those that `resume.allow_missing` lets the checkpoint lack, and the quarantine list.

    Raises:
        UserError: tensors are missing, left over or of another shape, or a frozen network is another.
        ConfigError: `resume.allow_missing` names what the run does not have.
        Fault: the data were opened without what the checkpoint says of them.
    """
    parts.data.sources.require_following(start.meta.snapshots)
    parts.objective.require_same(start.meta.objective, start.meta.step)
    tensors, patterns = parts.tensors(), run.cfg.resume.allow_missing
    stored = FileSystemReader(start.checkpoint.path).read_metadata().state_dict_metadata
    lacking = set(tensors) - set(stored)
    allowed = {name for name in lacking if any(fnmatch.fnmatchcase(name, one) for one in patterns)}
    for pattern in patterns:
        if not fnmatch.filter(tensors, pattern):
            raise ConfigError(
                f"resume.allow_missing holds {pattern!r}, and this run has no tensor of that name; drop it"
            )
    loaded = {name: tensor for name, tensor in tensors.items() if name not in allowed}
    checkpoints.load(start.checkpoint, loaded, run.control, verified=True)
    parts.engine.weights_changed()
    parts.ema.begin_with(parts.engine.weights, allowed)
    if allowed and run.is_main:
        names = f"{', '.join(sorted(allowed)[:5])}{' ...' if len(allowed) > 5 else ''}"
        plain_console(stderr=True).print(
            f"{len(allowed)} tensors begin anew, which {start.checkpoint.path} lacks: {names}",
            soft_wrap=True,
        )
    parts.data.loader.quarantine.restore(start.meta.quarantine, record=run.is_main)


def require_same_loss(
    run: RunContext, parts: Components, start: Start, changed: list[Change]
) -> None:
    """Raises Fault where the probe's loss is another than when the checkpoint was written.

    Nothing is compared where the checkpoint's probe had noise of other draws."""
    if run.cfg.resume.allow_missing or start.meta.probe is None or changed_draws(start.meta):
        return
    inexact = ("model.", "vae.", "text.", "parallel.", "run.")
    exactly = not any(key.startswith(inexact) for key, _, _ in changed)
    now = measure_probe(run, parts)
    require_same_probe(run.cfg, start.meta.step, start.meta.probe, now, exactly=exactly)


def find_place(data: TrainingData, meta: CheckpointMeta, data_step: int) -> tuple[int, str]:
    """The step of the tape to go on with, and what is passed over for it, in words.

    `data_step` is the step that would be next. With another number of micro-batches a step, it is the next step's
    first one; with other micro-batches it is the next epoch, since the rest of this one is unknown.
    """
    per_step = int(meta.config["train"]["micro_batches"])
    same = data.plan_digest(meta.train.data_step * per_step) == meta.plan
    epoch = math.ceil(meta.epoch)
    # What was left out by going back lies behind the checkpoint's own place.
    position = data_step * per_step if same else data.tape.index_after(epoch)
    place = math.ceil(position / data.micro_batches)
    if not same and epoch > meta.epoch:
        return place, (
            f"the tape is another than that of the checkpoint, so the run goes on with epoch {epoch}, and "
            f"{epoch - meta.epoch:.1%} of the one it was in is passed over"
        )
    over = place * data.micro_batches - position
    if not over:
        return place, ""
    return place, f"{over} micro-batch(es) are passed over, so that a step begins where one did"


def require_step(cfg: Config, step: int) -> None:
    """Raises ConfigError where a checkpoint's step lies beyond the run's end, which would train nothing."""
    if step > cfg.train.steps:
        raise ConfigError(
            f"run.dir={cfg.run.dir} stands at step {step}, beyond train.steps="
            f"{cfg.train.steps}; raise train.steps, or fork an earlier step with resume.run"
        )

"""`sora replay RUN --step N`: any step of any run again, on one machine, whatever it was trained on.

What a step consumes and every draw are functions of (config, manifest, seed, step), so the run's own
config, the tape and the code of training give its micro-batches again; the weights are those of the
nearest checkpoint. Nothing is written into the run but the replay itself.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sora_train import checkpoint as checkpoints
from sora_train.base.files import write_atomically
from sora_train.checkpoint import Checkpoint
from sora_train.checkpoint.layout import weights_digest
from sora_train.checkpoint.meta import read_meta
from sora_train.config import Config, ParallelConfig
from sora_train.data.manifest import Manifest
from sora_train.data.sample import ClipBatch
from sora_train.data.storage.ranges import is_digest_of
from sora_train.data.storage.remote import is_remote
from sora_train.diffusion.draws import DRAWS, OLDEST_DRAWS
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import Fault, UserError
from sora_train.models.adapters.inject import adapter_weights
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.run_folder import Part, RunFolder, parts_of
from sora_train.objectives import LossTerm
from sora_train.objectives.spec import build_spec, spec_of
from sora_train.parallel.degrees import resolve_degrees
from sora_train.parallel.layout import Layout, build_mesh
from sora_train.parallel.parallelize import apply_fsdp
from sora_train.parallel.protocol import resolve_param_dtype
from sora_train.runtime import world as distributed
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.health import Health
from sora_train.runtime.world import World
from sora_train.sampling.api import attending_here, shipped_config
from sora_train.training.components import Builder, Components, build_networks, build_vae
from sora_train.training.initialise import (
    adapter_start,
    begin_adapter,
    require_fitting,
    require_same_base,
    source_of,
    take_adapter,
    take_weights,
)
from sora_train.training.outputs.step_picture import draw_sheet, table_of
from sora_train.training.outputs.step_samples import StepSample, finite, samples_of
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.run import RunContext
from sora_train.training.trainer import Trainer

SHEET, FACTS = "contact_sheet.png", "replay.json"
MAX_ROWS = 48
"""Clips drawn on a sheet, those with the highest loss first; the JSON has all."""


@dataclass(frozen=True)
class ReplayRequest:
    """Which step of a run (counted as metrics.jsonl does, the first is 1), and how it is looked at.

    `rank` of `ranks` picks one rank's share (default: all of the step, dealt out over the ranks that
    trained it); `checkpoint` names the weights (default: the newest before the step; 0: those drawn
    from the seed).
    """

    run: Path
    step: int
    rank: int | None = None
    ranks: int | None = None
    out: Path | None = None
    loss: bool = True
    checkpoint: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Plan:
    """What the run's files say about a step, before anything is built. Each `cp` neighbours of its ranks shared
    their clips."""

    cfg: Config
    row: dict[str, float]
    tape_step: int
    ranks: int
    cp: int
    weights: Checkpoint | None
    newest: Checkpoint | None


def replay(
    request: ReplayRequest,
    beside: Callable[[RunContext], Builder] = Trainer.beside,
    config_cls: type[Config] = Config,
) -> str:
    """Rebuild a step, write its sheet and its facts, and return what is to be printed.

    `beside` makes the builder of the run's parts: a project of one's own hands over its `MyTrainer.beside`, so that
    its model, data and objective are used, and its `config_cls`.

    Raises:
        UserError: no such run, step, rank or checkpoint, or the sources are not what they were.
        Fault: the clips cannot be read, or nothing can be written.
    """
    plan = look(request, config_cls)
    world = distributed.start(request.device, plan.cfg.run.threads)
    try:
        return _replay(request, plan, beside, world)
    finally:
        distributed.stop(world)


def _replay(
    request: ReplayRequest, plan: Plan, beside: Callable[[RunContext], Builder], world: World
) -> str:
    torch.use_deterministic_algorithms(world.device.type == "cpu")
    parts_of_step = plan.ranks // plan.cp
    rank, ranks = (0, 1) if request.rank is None else (request.rank // plan.cp, parts_of_step)
    run = context_alone(
        plan.cfg, replace(world, rank=rank, size=ranks, local_rank=0, ranks_per_node=1)
    )
    parts = rebuilt(request, plan, beside(run))
    try:
        batches = _read(parts.data, plan.tape_step)
        entries = range(rank, rank + ranks * len(batches), ranks)
        places = [(entry % parts_of_step * plan.cp, entry // parts_of_step) for entry in entries]
        terms: list[dict[str, LossTerm]] = []
        totals: dict[str, float] = {}
        if request.loss:
            assert parts.model is not None
            model = computing(parts.model, plan.cfg, world)
            with torch.no_grad():
                terms = [parts.objective.terms(model, batch) for batch in batches]
            for weights in map(parts.objective.weights, batches):
                totals = {name: totals.get(name, 0.0) + value for name, value in weights.items()}
        by_batch = samples_of(parts.objective, parts.data, batches, places, terms, totals)
        samples = [sample for of_batch in by_batch for sample in of_batch]
        about = _about(request, plan, terms, totals, world)
        title = _title(about)
        out = request.out or request.run / "replay" / _folder_name(request)
        written = _write(out, about, samples, batches, parts.vae)
    finally:
        parts.data.close()
    return "\n".join([table_of(samples), "", title, *(f"wrote {path}" for path in written)])


def _read(data: TrainingData, tape_step: int) -> list[ClipBatch]:
    """The micro-batches of a step. Raises UserError where a clip is not what was trained, or cannot be read."""
    manifest = data.manifest
    failed_then = set(data.loader.quarantine.rows())
    batches = data.step(tape_step)
    for batch in batches:
        changed = {lost.row: f"{lost.reason}: {lost.detail}" for lost in batch.failures}
        changed = {row: why for row, why in changed.items() if row not in failed_then}
        changed |= {
            clip.row: "its bytes changed"
            for clip in batch.clips
            if clip.pixels is not None and not _as_indexed(manifest, clip.row)
        }
        for row, why in changed.items():
            raise UserError(
                f"clip {manifest.key[row]!r} of {manifest.path(row)} was trained in this step and is not what it was "
                f"({why}); restore the files that data.source had"
            )
    return batches


def _as_indexed(manifest: Manifest, row: int) -> bool:
    """Whether a clip's bytes have the digest of the index; those of a store are compared as they are read."""
    path, digest = manifest.path(row), str(manifest.sample_digest[row])
    if is_remote(path) or not digest:
        return True
    with Path(path).open("rb") as file:
        file.seek(int(manifest.offset[row]))
        return is_digest_of(digest, file.read(int(manifest.length[row])))


def look(request: ReplayRequest, config_cls: type[Config] = Config) -> Plan:
    """Find the step in the run's files. Raises UserError where it is not there."""
    run, step = request.run, request.step
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml; give the folder of a run")
    metrics = run / "metrics.jsonl"
    rows = {int(row["step"]): row for row in read_metrics(metrics)} if metrics.exists() else {}
    saved = checkpoints.list_checkpoints(run / "checkpoints")
    reached = max([*rows, *(checkpoint.step for checkpoint in saved)], default=0)
    if not 1 <= step <= reached:
        raise UserError(
            f"--step {step}: {run} has trained the steps 1 to {reached}; give one of them"
            if reached
            else f"--step {step}: {run} has not trained a step yet"
        )
    part = _part_of(run, step)
    cfg = shipped_config(run, part.config if part else "config.yaml", config_cls)
    ranks = request.ranks or (part.ranks if part else None)
    if request.rank is not None and ranks is None:
        raise UserError(
            f"--rank {request.rank}: run.json of {run} does not say how many ranks trained; add --of RANKS"
        )
    if request.rank is not None and ranks is not None and not 0 <= request.rank < ranks:
        raise UserError(
            f"--rank {request.rank}: step {step} was trained on {ranks} rank(s), 0 to {ranks - 1}; give one of them, "
            "or --of RANKS to deal it out otherwise"
        )
    _require_same_draws(request, saved)
    cp = cfg.parallel.ulysses * cfg.parallel.ring
    if (ranks or cp) % cp:
        raise UserError(
            f"--of {ranks}: each {cp} ranks of the run share their clips (parallel.ulysses={cfg.parallel.ulysses}, "
            f"parallel.ring={cfg.parallel.ring}); give a multiple of {cp}"
        )
    return Plan(
        on_one_machine(cfg, run),
        rows.get(step, {}),
        _tape_step(step, rows),
        ranks or cp,
        cp,
        _weights(request, cfg, saved) if request.loss else None,
        saved[-1] if saved else None,
    )


def _require_same_draws(request: ReplayRequest, saved: Sequence[Checkpoint]) -> None:
    """Raises UserError where the step's noise was drawn by a generator of an earlier version.

    The oldest checkpoint that holds the step was written by who trained it; without one, so was the newest."""
    if not saved:
        return
    later = [checkpoint for checkpoint in saved if checkpoint.step >= request.step]
    meta = read_meta((later or saved[-1:])[0])
    drawn_by = meta.versions.get("draws", OLDEST_DRAWS)
    if drawn_by != DRAWS:
        version = " ".join(f"{name} {value}" for name, value in meta.code.items())
        raise UserError(
            f"--step {request.step}: {request.run} was trained with draws of {drawn_by}, and this version draws by "
            f"{DRAWS}, so its noise cannot be made again; replay it with the sora_train that trained it"
            f"{f' ({version})' if version else ''}"
        )


def _part_of(run: Path, step: int) -> Part | None:
    """The part of the run that trained a step."""
    parts = [part for part in parts_of(run) if part.step < step]
    return parts[-1] if parts else None


def _tape_step(step: int, rows: dict[int, dict[str, float]]) -> int:
    """The step of the tape (counted from 0) that a step trained: the rows say where clips were skipped."""

    def ahead(known: int) -> int:
        return int(rows[known].get("train/data_step", known)) - known

    before = max((known for known in rows if known <= step), default=None)
    after = min((known for known in rows if known >= step), default=None)
    leads = {ahead(known) for known in (before, after) if known is not None}
    if len(leads) > 1:
        raise UserError(
            f"--step {step}: clips were skipped between the logged steps {before} and {after}, and which of the two "
            "tapes this step trained was not logged; give one of the logged steps"
        )
    return step - 1 + (leads.pop() if leads else 0)


def _weights(request: ReplayRequest, cfg: Config, saved: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint that was asked for, or the newest before the step; None: the weights the run began with."""
    if request.checkpoint == 0:
        return None
    if request.checkpoint is not None:
        return checkpoints.find(request.run, request.checkpoint)
    before = [checkpoint for checkpoint in saved if checkpoint.step < request.step]
    if before:
        return before[-1]
    if saved and (request.step > 1 and saved[0].step > cfg.checkpoint.every > 0):
        raise UserError(
            f"--step {request.step}: the checkpoints before it were removed (checkpoint.keep_last="
            f"{cfg.checkpoint.keep_last}), the oldest left is {saved[0].step}; add --checkpoint {saved[0].step} to "
            "take these later weights, --checkpoint 0 for those the run began with, or --no-loss"
        )
    return None


def on_one_machine(cfg: Config, run: Path) -> Config:
    """The config with what concerns the machine and not the numbers set for this one; as a dry run it leaves no
    trace in the run's caches."""
    changes: dict[str, Any] = {
        "run": cfg.run.model_copy(update={"dir": str(run)}),
        "parallel": ParallelConfig(param_dtype=cfg.parallel.param_dtype),
        "data": cfg.data.model_copy(update={"prefetch": 0}),
        "elastic": cfg.elastic.model_copy(update={"min_efficiency": 0.0}),
        "dry_run": True,
    }
    return cfg.model_copy(update=changes)


def context_alone(cfg: Config, world: World) -> RunContext:
    """The run as seen from this machine: no folder is locked, no rank met and nothing watched."""
    cfg = cfg.model_copy(update={"model": attending_here(cfg.model, world.device, torch.float32)})
    alone = ControlPlane(replace(world, rank=0, size=1))
    folder = RunFolder(cfg, is_main=False)
    health = Health(cfg.health, alone, folder.path, watched=False)
    dtype = resolve_param_dtype(cfg.parallel.param_dtype, world.device)
    layout = Layout(resolve_degrees(cfg.parallel, 1), dtype)
    return RunContext(cfg, world, layout, alone, health, folder)


def rebuilt(request: ReplayRequest, plan: Plan, builder: Builder) -> Components:
    """The parts of a run but its engine, with data and objective as for training and the weights of the plan.

    Raises UserError where checkpoint or sources do not fit.
    """
    run, parts = builder.run, builder.parts
    meta = read_meta(plan.newest) if plan.newest else None
    builder.resumed = meta
    if request.loss or run.cfg.task == "vae":
        build_networks(builder, empty=False)
    else:
        parts.vae = build_vae(run, None)
    stored = DiffusionSpec.from_dict(meta.spec) if meta and meta.spec else None
    if stored is not None and stored.vae_digest != parts.vae.digest():
        raise UserError(
            f"{request.run} was trained on the latents of another VAE than vae.path={run.cfg.vae.path!r} now holds; "
            "restore that folder"
        )
    if parts.model is not None:
        _fill(parts.model, plan, parts.vae)
        parts.spec = build_spec(run.cfg, parts.vae, parts.model)
    else:
        digests = (stored.text_digest, stored.image_digest) if stored else ("", "")
        parts.spec = spec_of(run.cfg, parts.vae, *digests)
    parts.data = builder.build_data(parts.model)
    parts.data.loader.quarantine.detach()
    if meta:
        parts.data.sources.require_following(meta.snapshots)
        parts.data.loader.quarantine.restore(meta.quarantine, record=False)
    parts.objective = builder.build_objective()
    return parts


def _fill(model: nn.Module, plan: Plan, vae: VideoVAE) -> None:
    """Give the model the weights of the plan's checkpoint, or those its run began with."""
    cfg, trained = plan.cfg, dict(model.named_parameters())
    if cfg.adapter.on:
        trained = adapter_weights(model)
        origin = source_of(cfg)
        require_fitting(cfg, model, vae, origin)
        meta = read_meta(plan.weights) if plan.weights else None
        require_same_base(cfg, weights_digest(origin, cfg.init.weights), meta)
        begin_adapter(cfg, origin, model, trained)
        if plan.weights is None:
            take_adapter(cfg, adapter_start(cfg, origin, model), trained)
    values = {name: parameter.detach() for name, parameter in trained.items()}
    if plan.weights is not None:
        tensors = {f"model.{name}": value for name, value in values.items()}
        checkpoints.load_part(plan.weights, tensors, "model.")
    elif cfg.init.run and not cfg.adapter.on:
        origin = source_of(cfg)
        require_fitting(cfg, model, vae, origin)
        take_weights(cfg, origin, values)


def computing(model: nn.Module, cfg: Config, world: World) -> nn.Module:
    """The model on its device, computing in the precision that training has there."""
    dtype = resolve_param_dtype(cfg.parallel.param_dtype, world.device)
    mesh = build_mesh(resolve_degrees(cfg.parallel, world.size), world)
    return apply_fsdp(model.to(world.device), mesh, dtype)


def _about(
    request: ReplayRequest,
    plan: Plan,
    terms: Sequence[dict[str, LossTerm]],
    totals: dict[str, float],
    world: World,
) -> dict[str, Any]:
    """What replay.json says of the step itself."""
    about: dict[str, Any] = {
        "run": str(request.run),
        "step": request.step,
        "tape_step": plan.tape_step,
        "ranks": plan.ranks,
        "rank": request.rank,
        "logged_loss": plan.row.get("train/loss"),
    }
    if not terms:
        return about
    step = plan.weights.step if plan.weights else 0
    sums = {name: sum(float(part[name].sum) for part in terms if name in part) for name in totals}
    return about | {
        "checkpoint": step,
        "steps_before": request.step - 1 - step,
        "loss": sum(value / max(totals[name], 1.0) for name, value in sums.items()),
        "computed": f"{resolve_param_dtype(plan.cfg.parallel.param_dtype, world.device)} on {world.device}",
    }


def _write(
    out: Path,
    about: dict[str, Any],
    samples: Sequence[StepSample],
    batches: Sequence[ClipBatch],
    vae: VideoVAE,
) -> list[Path]:
    """Write `about` the step with all samples as JSON, and their sheet. Raises Fault where that is not possible."""
    facts = {**finite(about), "samples": [sample.to_dict() for sample in samples]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / FACTS, json.dumps(facts, indent=1))
        sheet = draw_sheet(out / SHEET, _title(about), samples, batches, vae, MAX_ROWS)
    except OSError as error:
        raise Fault(
            f"the replay cannot be written to {out}: {error.strerror}; give another folder with --out"
        ) from error
    return [out / FACTS, *([sheet] if sheet else [])]


def _title(about: dict[str, Any]) -> str:
    """The step, its loss and under which weights, in a sentence."""
    who = "" if about["rank"] is None else f", rank {about['rank']} of {about['ranks']}"
    text = f"step {about['step']} of {about['run']}{who}"
    if "loss" not in about:
        return text
    name = f"checkpoint {about['checkpoint']}" if about["checkpoint"] else "step 0"
    ahead = about["steps_before"]
    where = (
        "the very weights before this step"
        if ahead == 0
        else f"{abs(ahead)} steps {'older' if ahead > 0 else 'newer'} than those it was trained with"
    )
    logged = about["logged_loss"]
    beside = "" if logged is None or about["rank"] is not None else f", logged {logged:.6f}"
    return f"{text}: loss {about['loss']:.6f}{beside}, under the weights of {name}, {where}"


def _folder_name(request: ReplayRequest) -> str:
    rank = "" if request.rank is None else f"-rank-{request.rank}"
    return f"step-{request.step:06d}{rank}"


def facts(folder: Path) -> dict[str, Any]:
    """What a replay wrote in JSON."""
    return json.loads((folder / FACTS).read_text())

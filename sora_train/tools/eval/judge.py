"""One evaluation from beginning to end: clips made or read, every number of the tiers asked for, and the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.base.progress import Progress
from sora_train.checkpoint.layout import split_step
from sora_train.config import Config
from sora_train.errors import UserError
from sora_train.evaluation import measures
from sora_train.evaluation.cases import Sampled
from sora_train.evaluation.measures import Weights
from sora_train.models.text.lengths import CaptionLengths
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.status import is_run
from sora_train.sampling import api
from sora_train.sampling.files import save_clips
from sora_train.tools.eval import run as runs
from sora_train.tools.eval.folder import read_folder
from sora_train.tools.eval.results import Evaluation
from sora_train.training.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What is asked of every target alike."""

    prompts: Sequence[str] = ()
    num: int = 16
    seed: int = 0
    frames: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the sampler."""
    weights: str = "ema"
    recipe: Recipe | None = None
    tiers: str = "ab"
    given: Weights = Weights()
    reference: Path | None = None
    """A folder of real clips, in place of the run's held-out ones."""


def evaluate(target: str, options: Options, out: Path | None) -> Evaluation:
    """Judge a run or a folder of clips. Raises UserError where it is neither, or a file of weights is none."""
    began = time.monotonic()
    folder, step = split_step(target)
    if is_run(folder):
        found, real = _of_run(folder, step, options, out)
    else:
        clips, notes = read_folder(Path(target), options.num)
        where = out or Path(target) / "eval"
        found, real = Evaluation(target, where, {"clips_of": target}, clips, notes=notes), []
    if options.reference is not None:
        real = [one.clip for one in read_folder(options.reference, 10**6)[0]]
    _measure(found, real, options)
    found.facts |= {"real_clips": len(real), "seconds": round(time.monotonic() - began, 1)}
    return found


def _of_run(
    folder: Path, step: int | None, options: Options, out: Path | None
) -> tuple[Evaluation, list[np.ndarray]]:
    recipe = options.recipe
    info = api.checkpoint_info(folder, step, recipe.config if recipe else Config)
    spec = api.with_settings(info.spec, options.settings)
    model = api.load(folder, step=info.checkpoint.step, weights=options.weights, project=recipe)
    shape = model.clip_shape(None, options.frames, None)
    clips, note = runs.held_out(info, folder, model)
    prompts = runs.prompts_of(info.cfg, options.prompts, clips, options.num)
    notes = [*filter(None, [note]), *CaptionLengths(info.cfg.text).cut_notes(prompts)]
    cases = runs.cases_of(info, prompts, clips, shape)
    with Progress(len(cases), f"sampling {folder}") as bar:
        sampled = runs.sample_cases(model, spec, cases, shape, options.seed, bar.update)
    where = out or folder / "eval" / f"step-{info.checkpoint.step:06d}"
    sampled = _saved(sampled, where, options.seed)
    metrics = folder / "metrics.jsonl"
    facts = {
        "run": str(folder),
        "step": info.checkpoint.step,
        "weights": options.weights,
        "seed": options.seed,
        "steps_of_sampler": spec.num_steps,
        "guidance_scale": spec.guidance_scale,
        "shape": f"{shape.frames}x{shape.height}x{shape.width} at {shape.fps:g} fps",
    }
    found = Evaluation(f"{folder}@{info.checkpoint.step}", where, facts, sampled, notes=notes)
    found.curves = read_metrics(metrics) if metrics.exists() else []
    if clips and recipe is None:
        loss = runs.validation(info, model, clips)
        found.facts["val"] = loss
        found.of_set |= {"val_loss": loss["val/loss"]} if "val/loss" in loss else {}
    # As many real clips as made ones: a distance hangs on both numbers.
    return found, [clip.pixels for clip in clips if clip.pixels is not None][: options.num]


def _saved(sampled: list[Sampled], out: Path, seed: int) -> list[Sampled]:
    """The clips as files, a folder a group."""
    placed: list[Sampled] = []
    for group in dict.fromkeys(one.case.group for one in sampled):
        inside = [one for one in sampled if one.case.group == group]
        pictures, labels = [one.clip for one in inside], [one.case.prompt for one in inside]
        files = save_clips(
            out / group, pictures, labels, fps=inside[0].fps or 1.0, seeds=[seed] * len(inside)
        )
        placed += [
            replace(one, file=f"{group}/{path.name}")
            for one, path in zip(inside, files, strict=True)
        ]
    return placed


def _measure(found: Evaluation, real: list[np.ndarray], options: Options) -> None:
    """Every number of the tiers asked for, into the clips and the evaluation."""
    parts: list[Callable[[Sampled], dict[str, float]]] = [measures.weightless]
    missing = measures.missing_packages() if "b" in options.tiers else []
    wheels = "b" in options.tiers and not missing
    if missing:
        found.notes.append(
            f"Tier b is left out: {', '.join(missing)} not installed; pip install 'sora_train[eval]'."
        )
    if wheels:
        parts.append(measures.from_wheels)
    parts.append(lambda one: measures.by_path(one, options.given))
    judged = []
    with Progress(len(found.clips), "measuring") as bar:
        for one in found.clips:
            numbers: dict[str, float] = {}
            for part in parts:
                numbers |= part(one)
            judged.append(replace(one, numbers=numbers))
            bar.update(len(judged))
    found.clips = judged
    made = [one.clip for one in judged if one.case.group in ("t2v", "clips")]
    try:
        found.of_set |= measures.of_sets(made, real, options.given, wheels=wheels)
    except UserError as error:
        # What has been measured before is kept.
        found.notes.append(f"{error}.")
    if not real and (options.given.i3d or options.given.vjepa):
        found.notes.append(
            f"--i3d and --vjepa compare with real clips, and {found.name} has none; give --reference FOLDER."
        )

"""The end of a run: scores, exports, summary.json, report.html, a short table."""

import json
import shlex
from typing import Any

from rich.table import Table
from torch import Tensor

from sora_train.base.console import plain_console
from sora_train.base.files import write_atomically
from sora_train.checkpoint.meta import TrainState
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.report.report import write_report
from sora_train.parallel.protocol import Engine
from sora_train.parallel.shards import full
from sora_train.training.components import Components
from sora_train.training.outputs.evaluate import oracle_scores
from sora_train.training.run import RunContext

SHOWN = (
    "steps",
    "seconds",
    "params",
    "final_loss",
    "val_loss",
    "val_psnr",
    "val_ssim",
    "tokens_per_s",
    "data_wait",
    "encoding",
)
"""Rows of the table at the end."""


def finish(run: RunContext, parts: Components, state: TrainState, seconds: float) -> None:
    """Score and export the averaged weights, and write the summary and the report. A collective.

    `seconds` is how long this process has taken.
    """
    oracle = None
    with parts.averaged():
        if run.cfg.sample.oracle_prompts and parts.spec is not None:
            oracle = oracle_scores(run, parts)
        export(run, parts)
    if not run.is_main:
        return
    folder = run.folder.path
    summary = summarise(run, parts, state, oracle) | {"seconds": seconds}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1))
    report = write_report(folder)
    print_summary(run, summary)
    print(f"report: {report}\nsamples: {folder / 'samples'}")
    if parts.spec is not None:
        print(f'next: sora sample --ckpt {shlex.quote(str(folder))} --prompt "..."', flush=True)
        if run.cfg.adapter.on:
            file = "--to comfyui --out adapter.safetensors"
            print(f"      sora ckpt export {shlex.quote(str(folder))} {file}", flush=True)


def export(run: RunContext, parts: Components) -> None:
    """Hand the whole weights to the objective, where it exports them."""
    if not parts.objective.exports:
        return
    weights = whole_weights(parts.engine)
    if run.is_main:
        loader = parts.data.loader
        clips = (clips for _, clips, _ in loader.chunks(loader.cache_chunks(8)))
        parts.objective.export(weights, run.folder.path, clips)


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """Parameters, gathered one at a time, and buffers by name, on the CPU; a collective."""
    model = engine.model
    buffers = {name: value.cpu() for name, value in model.named_buffers()}
    kept = {name: value for name, value in buffers.items() if name in model.state_dict()}
    return kept | {name: full(value).cpu() for name, value in engine.model_state().items()}


def summarise(
    run: RunContext, parts: Components, state: TrainState, oracle: dict[str, Any] | None
) -> dict[str, Any]:
    """The contents of summary.json but for `seconds`; speeds are means over all steps but the first."""
    data, folder = parts.data, run.folder
    rows = read_metrics(folder.metrics)
    validated = next((row for row in reversed(rows) if "val/loss" in row), {})
    trained = next((row for row in reversed(rows) if "train/loss" in row), {})
    timed = rows[1:] or rows
    seconds = sum(row["train/step_seconds"] for row in timed)
    waited = sum(row["train/data_wait"] * row["train/step_seconds"] for row in timed)
    encoding = sum(row.get("train/encode_seconds", 0.0) for row in timed)
    tokens = sum(row["train/tokens_per_second"] * row["train/step_seconds"] for row in timed)
    samples = sorted(folder.samples(state.step).glob("*.mp4"))
    return {
        "name": run.cfg.name,
        "steps": state.step,
        "params": parts.num_params,
        "final_loss": trained.get("train/loss"),
        "val_loss": validated.get("val/loss"),
        "val_psnr": validated.get("val/psnr"),
        "val_ssim": validated.get("val/ssim"),
        "tokens_per_s": tokens / seconds if seconds else None,
        "data_wait": waited / seconds if seconds else None,
        "encoding": encoding / seconds if seconds else None,
        "oracle": oracle,
        "samples": [str(path.relative_to(folder.path)) for path in samples],
        "clips": data.account(),
        "clips_by_source": data.account_by_source(),
        "dropped": data.assignment.dropped(),
        "failed_to_decode": len(data.loader.quarantine),
        "captions_cut": state.captions_cut,
        "skipped_steps": int(state.row.get("train/skipped", 0)),
        "rollbacks": int(state.row.get("train/rollbacks", 0)),
        "lost_clips": int(state.row.get("train/lost_clips", 0)),
    }


def print_summary(run: RunContext, summary: dict[str, Any]) -> None:
    table = Table(title=f"{run.cfg.name}: done", title_justify="left", show_header=False)
    for key in SHOWN:
        value = summary[key]
        if value is not None:
            table.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
    console = plain_console()
    console.print(table)
    if summary["captions_cut"]:
        console.print(
            f"captions cut at text.max_length={run.cfg.text.max_length}: {summary['captions_cut']:,}"
        )
    if summary["skipped_steps"]:
        console.print(
            f"steps skipped: {summary['skipped_steps']:,}, roll-backs: {summary['rollbacks']}, clips not trained for "
            f"it: {summary['lost_clips']:,}; see {run.folder.path / 'spikes'}",
        )
    if summary["oracle"]:
        console.print(oracle_table(summary["oracle"]))


def oracle_table(oracle: dict[str, Any]) -> Table:
    """What share of clips show what their prompt asks for, beside chance and the two ceilings."""
    table = Table(title="oracle: share of clips that show what was asked", title_justify="left")
    table.add_column("")
    factors = list(oracle["seen"])
    for factor in factors:
        table.add_column(factor, justify="right")
    for key in oracle:
        table.add_row(key.replace("_", " "), *[f"{oracle[key][factor]:.1%}" for factor in factors])
    return table

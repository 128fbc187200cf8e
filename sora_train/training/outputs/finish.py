"""The end of a run: last checkpoint, last samples, scores, summary.json, report.html, a short table."""

import json
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sora_train.base.files import write_atomically
from sora_train.models.text_to_video import TextToVideo
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.report.report import write_report
from sora_train.training.outputs.evaluate import oracle_scores

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer


def finish(trainer: "Trainer") -> None:
    """Commit the final checkpoint first: what follows can fail without losing the training."""
    trainer.save()
    trainer.commit()
    trainer.write_samples()
    oracle = None
    if trainer.cfg.sample.oracle_prompts and isinstance(trainer.engine.model, TextToVideo):
        with trainer.averaged():
            oracle = oracle_scores(trainer)
    if trainer.cfg.task == "vae":
        export_vae(trainer)
    if trainer.world.is_main:
        summary = summarise(trainer, oracle)
        write_atomically(trainer.folder.path / "summary.json", json.dumps(summary, indent=1))
        report = write_report(trainer.folder.path)
        print_summary(trainer, summary)
        Console().print(
            f"report: {report}\nsamples: {trainer.folder.path / 'samples'}", highlight=False
        )
        if trainer.cfg.task == "text_to_video":
            Console().print(
                f'next: sora sample --ckpt {trainer.folder.path} --prompt "..."', highlight=False
            )


def summarise(trainer: "Trainer", oracle: dict[str, Any] | None) -> dict[str, Any]:
    """The contents of summary.json; speeds are means over all steps but the first."""
    rows = read_metrics(trainer.folder.metrics)
    validated = next((row for row in reversed(rows) if "val/loss" in row), {})
    timed = rows[1:] or rows
    seconds = sum(row["train/step_seconds"] for row in timed)
    weighted = sum(row["train/data_wait"] * row["train/step_seconds"] for row in timed)
    tokens = sum(row["train/tokens_per_second"] * row["train/step_seconds"] for row in timed)
    samples = sorted(trainer.folder.samples(trainer.step).glob("*.mp4"))
    return {
        "name": trainer.cfg.name,
        "steps": trainer.step,
        "seconds": time.monotonic() - trainer.started,
        "params": trainer.params,
        "final_loss": next(
            (row["train/loss"] for row in reversed(rows) if "train/loss" in row), None
        ),
        "val_loss": validated.get("val/loss"),
        "val_psnr": validated.get("val/psnr"),
        "val_ssim": validated.get("val/ssim"),
        "tokens_per_s": tokens / seconds if seconds else None,
        "data_wait": weighted / seconds if seconds else None,
        "oracle": oracle,
        "samples": [str(path.relative_to(trainer.folder.path)) for path in samples],
        "clips": trainer.data.account(),
        "clips_by_source": trainer.data.account_by_source(),
        "dropped": trainer.data.assignment.dropped(),
        "failed_to_decode": len(trainer.data.loader.quarantine),
        "captions_cut": trainer.captions_cut,
        "skipped_steps": trainer.judge.tally.skipped,
        "rollbacks": trainer.judge.tally.rollbacks,
        "lost_clips": trainer.judge.tally.lost_clips,
    }


def print_summary(trainer: "Trainer", summary: dict[str, Any]) -> None:
    table = Table(title=f"{trainer.cfg.name}: done", title_justify="left", show_header=False)
    for key in (
        "steps",
        "seconds",
        "params",
        "final_loss",
        "val_loss",
        "val_psnr",
        "val_ssim",
        "tokens_per_s",
        "data_wait",
    ):
        value = summary[key]
        if value is not None:
            table.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
    console = Console()
    console.print(table)
    if summary["captions_cut"]:
        console.print(
            f"captions cut at text.max_length={trainer.cfg.text.max_length}: {summary['captions_cut']:,}"
        )
    if summary["skipped_steps"]:
        console.print(
            f"steps skipped: {summary['skipped_steps']:,}, roll-backs: {summary['rollbacks']}, clips not trained for "
            f"it: {summary['lost_clips']:,}; see {trainer.folder.path / 'spikes'}",
            highlight=False,
        )
    if summary["oracle"]:
        console.print(oracle_table(summary["oracle"]))


def oracle_table(oracle: dict[str, Any]) -> Table:
    """What share of clips show what their prompt asks for, beside chance and the two ceilings."""
    table = Table(title="oracle: share of clips that show what was asked", title_justify="left")
    table.add_column("")
    rows = [
        key
        for key in ("seen", "held_out", "chance", "ceiling_clean", "ceiling_vae")
        if key in oracle
    ]
    factors = list(oracle["seen"])
    for factor in factors:
        table.add_column(factor, justify="right")
    for key in rows:
        table.add_row(key.replace("_", " "), *[f"{oracle[key][factor]:.1%}" for factor in factors])
    return table


def export_vae(trainer: "Trainer") -> None:
    """Write the averaged VAE, with its latent statistics measured, in the diffusers layout."""
    from sora_train.training.outputs.vae_export import export

    with trainer.averaged():
        export(trainer)

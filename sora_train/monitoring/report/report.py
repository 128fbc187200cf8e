"""report.html: what a run did, in one file that needs no network, made from the run folder alone.

Every part is made from a file of the run folder and left out where the file is missing: a run cut short has a report
too.
"""

import base64
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.base.progress import duration
from sora_train.monitoring.events import events
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.report.page import compact, render
from sora_train.monitoring.report.run_charts import notes_of, runtime_charts, training_charts

EMBED_BYTES = 48 * 2**20  # videos beyond this total are linked: a browser has to open the file
FACTORS = ("colour", "shape", "motion")
ORACLE_ROWS = {
    "seen": "samples, combinations seen in training",
    "held_out": "samples, combinations held out",
    "chance": "chance",
    "ceiling_vae": "ceiling: the VAE's reconstructions",
    "ceiling_clean": "ceiling: clean clips",
}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what the folder holds, atomically, and return its path."""
    run_dir = Path(run_dir)
    summary = json.loads(_read(run_dir / "summary.json") or "{}")
    metrics_path = run_dir / "metrics.jsonl"
    rows = read_metrics(metrics_path) if metrics_path.exists() else []
    oracle = summary.get("oracle") or {}
    happened = events(run_dir)
    folders = _sample_folders(run_dir)
    prompt = next(_prompts(folders), "a red square moves right")
    page = render(
        "monitoring/report/templates/run.html",
        title=run_dir.resolve().name,
        ended=bool(summary),
        tiles=_tiles(summary, rows),
        oracle_heads=["", *FACTORS],
        oracle=_oracle(oracle),
        oracle_samples=len(oracle.keys() & {"seen", "held_out"}),
        sample_steps=[step for step, _ in folders],
        samples=_samples(folders, run_dir),
        training_charts=training_charts(rows, notes_of(happened)),
        runtime_charts=runtime_charts(rows, happened),
        events=happened,
        dropped=_dropped(summary.get("dropped") or {}, summary.get("failed_to_decode")),
        command=f"sora sample --ckpt {shlex.quote(str(run_dir))} --prompt {shlex.quote(prompt)}",
        config=_read(run_dir / "config.yaml"),
        fingerprint=_read(run_dir / "run.json"),
    )
    path = run_dir / "report.html"
    temporary = run_dir / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def _tiles(summary: dict[str, Any], rows: list[dict[str, float]]) -> dict[str, str]:
    last = {name: value for row in rows[-200:] for name, value in row.items()}
    running = {"mfu": last.get("train/mfu"), "goodput": last.get("goodput/productive")}
    facts = {**_facts_from(rows), **running, **{k: v for k, v in summary.items() if v is not None}}

    def number(name: str, form: str) -> str:
        return "" if facts.get(name) is None else form.format(facts[name])

    return {
        "steps": number("steps", "{:,.0f}"),
        "time": duration(facts["seconds"]) if "seconds" in facts else "",
        "parameters trained": compact(facts["params"]) if "params" in facts else "",
        "last training loss": number("final_loss", "{:.4f}"),
        "validation loss": number("val_loss", "{:.4f}"),
        "held-out PSNR, dB": number("val_psnr", "{:.2f}"),
        "tokens a second": number("tokens_per_s", "{:,.0f}"),
        "steps skipped": number("skipped_steps", "{:,.0f}") if facts.get("skipped_steps") else "",
        "roll-backs": number("rollbacks", "{:,.0f}") if facts.get("rollbacks") else "",
        "waiting for data": number("data_wait", "{:.1%}"),
        "encoding, of the time": number("encoding", "{:.1%}") if facts.get("encoding") else "",
        "MFU": number("mfu", "{:.1%}"),
        "goodput": number("goodput", "{:.1%}"),
    }


def _facts_from(rows: list[dict[str, float]]) -> dict[str, float]:
    """What metrics.jsonl alone can tell, for a run that has no summary."""
    facts: dict[str, float] = {}
    for row in rows:
        facts["steps"] = row["step"]
        for fact, name in (("final_loss", "train/loss"), ("val_loss", "val/loss")):
            if name in row:
                facts[fact] = row[name]
    if len(rows) > 1:
        facts["seconds"] = rows[-1]["time"] - rows[0]["time"]
    return facts


def _oracle(oracle: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row for each kind of clips: its name, and the share that agrees with the prompt for each factor."""
    return [
        [label, *(f"{oracle[key][f]:.1%}" if f in oracle[key] else "\u2013" for f in FACTORS)]
        for key, label in ORACLE_ROWS.items()
        if oracle.get(key)
    ]


def _dropped(dropped: dict[str, int], failed: int | None) -> dict[str, int]:
    """Clips left out before training by reason, and those that failed to decode while it went on."""
    counts = {str(reason).replace("_", " "): number for reason, number in dropped.items()}
    return counts | ({"failed to decode during training": failed} if failed else {})


def _sample_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the first, the middle and the last samples."""
    folders = sorted(
        (int(path.parent.name.removeprefix("step-")), path.parent)
        for path in run_dir.glob("samples/step-*/prompts.json")
    )
    if len(folders) <= 3:
        return folders
    middle = min(folders[1:-1], key=lambda item: abs(item[0] - folders[-1][0] / 2))
    return [folders[0], middle, folders[-1]]


def _prompts(folders: list[tuple[int, Path]]) -> Iterator[str]:
    for _, folder in reversed(folders):
        for entry in json.loads((folder / "prompts.json").read_text("utf-8")):
            yield entry["prompt"]


@dataclass(frozen=True)
class SampleCell:
    """A sample in the page: `source` holds its bytes, or, beyond EMBED_BYTES, `link` says where it lies."""

    source: str = ""
    link: str = ""
    is_video: bool = False


@dataclass
class SampleRow:
    """A prompt and its samples by step."""

    prompt: str
    held_out: bool
    cells: list[SampleCell]


def _samples(folders: list[tuple[int, Path]], run_dir: Path) -> list[SampleRow]:
    rows: dict[tuple[str, int], SampleRow] = {}
    left = EMBED_BYTES
    # The last step's clips are embedded first: if the bytes run out, they are inside.
    for number in reversed(range(len(folders))):
        folder = folders[number][1]
        for entry in json.loads((folder / "prompts.json").read_text("utf-8")):
            row = rows.setdefault(
                (entry["prompt"], entry.get("seed", 0)),
                SampleRow(
                    entry["prompt"], entry.get("held_out", False), [SampleCell()] * len(folders)
                ),
            )
            path = folder / entry["file"]
            if path.exists():
                embedded = path.stat().st_size <= left
                left -= path.stat().st_size if embedded else 0
                row.cells[number] = _cell(path, run_dir, embedded)
    return list(rows.values())


def _cell(path: Path, run_dir: Path, embedded: bool) -> SampleCell:
    if not embedded:
        return SampleCell(link=path.relative_to(run_dir).as_posix())
    is_video = path.suffix != ".png"
    kind = "video/mp4" if is_video else "image/png"
    data = base64.b64encode(path.read_bytes()).decode()
    return SampleCell(f"data:{kind};base64,{data}", is_video=is_video)

"""report.html: what a run did, in one file that needs no network, made from the run folder alone.

Every part is drawn from a file of the run folder and left out, with a word said, where the file is
missing: a report of a run cut short is still a report.
"""

import base64
import json
import os
import shlex
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from sora_train.base.progress import duration
from sora_train.monitoring.events import Event, events
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.report.charts import charts
from sora_train.monitoring.report.runtime import events_table, notes_of, panels

EMBED_BYTES = 48 * 2**20  # videos beyond this total are linked: a browser has to open the file
VIDEO_HEIGHT = 160  # CSS pixels
FACTORS = ("colour", "shape", "motion")
ORACLE_ROWS = (
    ("seen", "samples, combinations seen in training"),
    ("held_out", "samples, combinations held out"),
    ("chance", "chance"),
    ("ceiling_vae", "ceiling: the VAE's reconstructions"),
    ("ceiling_clean", "ceiling: clean clips"),
)


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what the folder holds, atomically, and return its path."""
    run_dir = Path(run_dir)
    summary = _read_json(run_dir / "summary.json") or {}
    metrics_path = run_dir / "metrics.jsonl"
    rows = read_metrics(metrics_path) if metrics_path.exists() else []
    found = events(run_dir)
    parts = [
        _header(run_dir, summary, rows),
        _oracle(summary.get("oracle")),
        _samples(run_dir),
        _charts(rows, found),
        events_table(found),
        _dropped(summary.get("dropped"), summary.get("failed_to_decode")),
        _next_steps(run_dir),
        _verbatim(run_dir / "config.yaml", "Configuration (resolved)"),
        _verbatim(run_dir / "run.json", "Fingerprint: seed, threads, versions"),
    ]
    template = Template(
        files("sora_train.monitoring.report").joinpath("report_template.html").read_text("utf-8")
    )
    page = template.substitute(title=escape(_name(run_dir)), body="\n".join(filter(None, parts)))
    path = run_dir / "report.html"
    temporary = run_dir / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _name(run_dir: Path) -> str:
    return run_dir.resolve().name


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _header(run_dir: Path, summary: dict[str, Any], rows: list[dict[str, float]]) -> str:
    last = {name: value for row in rows[-200:] for name, value in row.items()}
    running = {"mfu": last.get("train/mfu"), "goodput": last.get("goodput/productive")}
    facts = {**_facts_from(rows), **running, **{k: v for k, v in summary.items() if v is not None}}
    tiles = [
        ("steps", _number(facts.get("steps"), "{:,.0f}")),
        ("time", duration(facts["seconds"]) if "seconds" in facts else None),
        ("parameters trained", count(facts["params"]) if "params" in facts else None),
        ("last training loss", _number(facts.get("final_loss"), "{:.4f}")),
        ("validation loss", _number(facts.get("val_loss"), "{:.4f}")),
        ("held-out PSNR, dB", _number(facts.get("val_psnr"), "{:.2f}")),
        ("tokens a second", _number(facts.get("tokens_per_s"), "{:,.0f}")),
        ("steps skipped", _number(facts.get("skipped_steps") or None, "{:,.0f}")),
        ("roll-backs", _number(facts.get("rollbacks") or None, "{:,.0f}")),
        ("waiting for data", _number(facts.get("data_wait"), "{:.1%}")),
        ("MFU", _number(facts.get("mfu"), "{:.1%}")),
        ("goodput", _number(facts.get("goodput"), "{:.1%}")),
    ]
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{name}</span></div>'
        for name, value in tiles
        if value is not None
    )
    missing = "" if summary else " There is no summary.json: the run has not ended."
    return (
        f"<h1>{escape(_name(run_dir))}</h1>"
        f'<p class="faint">Training report of sora_train.{missing}</p>'
        f'<div class="tiles">{cells}</div>'
    )


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


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def count(number: float) -> str:
    """`812`, `6.1 K`, `14.2 M`, `1.30 B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def _oracle(oracle: dict[str, dict[str, float]] | None) -> str:
    if not oracle:
        return ""
    body = []
    for key, label in ORACLE_ROWS:
        scores = oracle.get(key)
        if not scores:
            continue
        cells = "".join(
            f'<td class="n">{_number(scores.get(factor), "{:.1%}") or "&ndash;"}</td>'
            for factor in FACTORS
        )
        marked = ' class="main"' if key in ("seen", "held_out") else ""
        body.append(f"<tr{marked}><th>{label}</th>{cells}</tr>")
    heads = "".join(f'<th class="n">{factor}</th>' for factor in FACTORS)
    return (
        "<h2>Do the videos show what the prompts say?</h2>"
        "<p>The oracle reads each factor off the sampled clips; the share that agrees with the "
        "prompt:</p>"
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _charts(rows: list[dict[str, float]], found: list[Event]) -> str:
    if not rows:
        return '<h2>Curves</h2><p class="faint">No metrics were written.</p>'
    curves, running = _figures(charts(rows, notes_of(found))), _figures(panels(rows, found))
    return "".join(
        f'<h2>{title}</h2><div class="charts">{figures}</div>'
        for title, figures in (("Curves", curves), ("How it ran", running))
        if figures
    )


def _figures(drawn: list[tuple[str, str]]) -> str:
    return "".join(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}</figure>'
        for title, svg in drawn
    )


def _sample_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the first, the middle and the last samples."""
    found = sorted(
        (int(path.parent.name.removeprefix("step-")), path.parent)
        for path in run_dir.glob("samples/step-*/prompts.json")
    )
    if len(found) <= 3:
        return found
    middle = min(found[1:-1], key=lambda item: abs(item[0] - found[-1][0] / 2))
    return [found[0], middle, found[-1]]


def _samples(run_dir: Path) -> str:
    folders = _sample_folders(run_dir)
    if not folders:
        return ""
    columns: list[dict[tuple[str, int], Path]] = []
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    for _, folder in reversed(folders):  # the last folder's prompts come first
        column = {}
        for entry in json.loads((folder / "prompts.json").read_text("utf-8")):
            key = (entry["prompt"], entry.get("seed", 0))
            column[key] = folder / entry["file"]
            entries.setdefault(key, entry)
        columns.insert(0, column)
    budget = Budget(EMBED_BYTES)
    cells = {
        # The last step's clips are embedded first: if the budget ends, they are inside.
        (key, number): _clip(columns[number].get(key), run_dir, budget)
        for number in reversed(range(len(columns)))
        for key in entries
    }
    body = "".join(
        f'<tr><td class="prompt">{escape(entry["prompt"])}'
        + ('<br><span class="tag">held out of training</span>' if entry.get("held_out") else "")
        + "</td>"
        + "".join(f"<td>{cells[key, number]}</td>" for number in range(len(columns)))
        + "</tr>"
        for key, entry in entries.items()
    )
    heads = "".join(f"<th>step {step:,}</th>" for step, _ in folders)
    return (
        "<h2>Samples</h2><p>The same prompts and the same noise as training goes on.</p>"
        '<div class="scroll"><table class="samples">'
        f"<thead><tr><th>prompt</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


class Budget:
    """Bytes that may still be embedded."""

    def __init__(self, size: int):
        self.left = size

    def take(self, size: int) -> bool:
        if size > self.left:
            return False
        self.left -= size
        return True


def _clip(path: Path | None, run_dir: Path, budget: Budget) -> str:
    if path is None or not path.exists():
        return '<span class="faint">none</span>'
    if not budget.take(path.stat().st_size):
        link = escape(path.relative_to(run_dir).as_posix(), quote=True)
        return f'<a href="{link}">{link}</a><br><span class="faint">too large to embed</span>'
    data = base64.b64encode(path.read_bytes()).decode()
    kind = "image/png" if path.suffix == ".png" else "video/mp4"
    if kind == "image/png":
        return f'<img class="still" height="{VIDEO_HEIGHT}" alt="" src="data:{kind};base64,{data}">'
    return (
        f'<video height="{VIDEO_HEIGHT}" autoplay loop muted playsinline '
        f'src="data:{kind};base64,{data}"></video>'
    )


def _dropped(dropped: dict[str, int] | None, failed: int | None) -> str:
    """Clips left out before training by reason, and those that failed to decode while it went on."""
    counts = {str(reason).replace("_", " "): number for reason, number in (dropped or {}).items()}
    if failed:
        counts["failed to decode during training"] = failed
    if not counts:
        return ""
    body = "".join(
        f'<tr><td>{escape(reason)}</td><td class="n">{number:,}</td></tr>'
        for reason, number in counts.items()
    )
    return (
        "<h2>Clips left out of training</h2><table><thead><tr><th>reason</th>"
        f'<th class="n">clips</th></tr></thead><tbody>{body}</tbody></table>'
    )


def _next_steps(run_dir: Path) -> str:
    folder = shlex.quote(str(run_dir))
    prompt = next(_prompts(run_dir), "a red square moves right")
    command = f"sora sample --ckpt {folder} --prompt {shlex.quote(prompt)}"
    return (
        "<h2>Next</h2><p>Sample from the checkpoint of this run:</p>"
        f"<pre>{escape(command)}</pre>"
        "<p>Every number above is a row of <code>metrics.jsonl</code> in the run folder.</p>"
    )


def _prompts(run_dir: Path) -> Iterator[str]:
    for _, folder in reversed(_sample_folders(run_dir)):
        for entry in json.loads((folder / "prompts.json").read_text("utf-8")):
            yield entry["prompt"]


def _verbatim(path: Path, title: str) -> str:
    if not path.exists():
        return ""
    text = escape(path.read_text("utf-8"))
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>"

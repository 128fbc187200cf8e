"""The report tells what the run folder holds, whatever is missing, in one file without a network."""

import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.monitoring.metrics import METRICS
from sora_train.monitoring.metrics_reference import reference
from sora_train.monitoring.report import charts as report_charts
from sora_train.monitoring.report import report
from sora_train.monitoring.report.charts import smooth, spread, thin, ticks
from sora_train.monitoring.report.page import compact
from sora_train.monitoring.report.report import write_report
from sora_train.monitoring.report.run_charts import training_charts

REPO = Path(__file__).parents[2]
TIMES = (0.1, 0.5, 0.9)
SCORES = {"colour": 0.9712, "shape": 0.7, "motion": 0.8}
ORACLE = {
    "seen": SCORES,
    "held_out": {"colour": 0.9511, "shape": 0.5, "motion": 0.6},
    "chance": {"colour": 1 / 6, "shape": 0.2, "motion": 0.125},
    "ceiling_clean": {"colour": 1.0, "shape": 1.0, "motion": 1.0},
    "ceiling_vae": {"colour": 0.9876, "shape": 0.99, "motion": 0.99},
}
SUMMARY = {
    "steps": 1000,
    "seconds": 372.4,
    "params": 6123456,
    "final_loss": 0.25119,
    "val_loss": 0.26,
    "tokens_per_s": 5812.3,
    "data_wait": 0.0032,
    "oracle": ORACLE,
    "samples": [],
    "dropped": {"too_short": 3},
}


class Page(HTMLParser):
    """Every tag with its attributes, and that all tags are closed in order."""

    VOID = {"meta", "br", "img", "path", "circle", "polyline"}

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attrs for name, attrs in self.tags if name == tag)


def add_metrics(run_dir: Path, steps: int = 40) -> None:
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "time": 100.0 + step,
            "train/loss": 1 / step,
            "train/data_wait": 0.001,
            "train/tokens_per_second": 5000.0,
        }
        if step % 10 == 0:
            row |= {"val/loss": 0.3, **{f"val/loss/t{t:.2f}": 0.2 + t / 10 for t in TIMES}}
        rows.append(row)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_samples(run_dir: Path, step: int, *prompts: str, **more: Any) -> None:
    folder = run_dir / f"samples/step-{step:06d}"
    folder.mkdir(parents=True)
    rows = []
    for number, prompt in enumerate(prompts):
        (folder / f"{number:03d}.mp4").write_bytes(f"clip {step} {number}".encode())
        rows.append({"prompt": prompt, "file": f"{number:03d}.mp4", "seed": 0, **more})
    (folder / "prompts.json").write_text(json.dumps(rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    folder.mkdir()
    add_metrics(folder)
    for step in (0, 10, 20, 30, 40):
        add_samples(folder, step, "a red square moves", "a blue circle grows")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text("seed: 0\nnote: <script>alert(1)</script>\n")
    return folder


def test_the_report_is_one_file_that_asks_for_nothing(run_dir: Path):
    page = Page(write_report(run_dir))
    addresses = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "srcset")
    ]
    assert addresses and all(str(value).startswith("data:") for value in addresses)
    text = (run_dir / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|@import|<script|<link", text.replace("&lt;script", ""))
    assert not list(run_dir.glob("*.tmp"))


def test_numbers_of_the_summary_are_shown(run_dir: Path):
    text = Page(write_report(run_dir)).text
    for shown in ("my run", "1,000", "6:12 min", "6.12 M", "0.2512", "5,812", "0.3%", "too short"):
        assert shown in text
    for score in ("97.1%", "95.1%", "16.7%", "12.5%", "98.8%", "100.0%"):
        assert score in text


def test_first_middle_and_last_samples_stand_beside_their_prompts(run_dir: Path):
    page = Page(write_report(run_dir))
    clips = [base64.b64decode(str(v["src"]).split(",")[1]).decode() for v in page.named("video")]
    assert clips == [f"clip {step} {number}" for number in (0, 1) for step in (0, 20, 40)]
    assert all({"autoplay", "loop", "muted"} <= set(video) for video in page.named("video"))
    assert "a red square moves" in page.text


def test_held_out_prompts_are_marked(tmp_path: Path):
    add_samples(tmp_path, 0, "seen")
    assert "held out" not in Page(write_report(tmp_path)).text
    add_samples(tmp_path, 1, "unseen", held_out=True)
    assert "held out" in Page(write_report(tmp_path)).text


def test_what_a_person_wrote_is_escaped(tmp_path: Path):
    add_samples(tmp_path, 0, "<b onclick='x'>\"bold\" & $title</b>")
    page = Page(write_report(tmp_path))
    assert "<b onclick='x'>\"bold\" & $title</b>" in page.text
    assert not any("onclick" in attrs for _, attrs in page.tags)


@pytest.mark.parametrize(
    "missing", ["summary.json", "metrics.jsonl", "config.yaml", "samples", "oracle", "everything"]
)
def test_missing_parts_are_left_out(run_dir: Path, missing: str):
    if missing == "samples":
        (run_dir / "samples").rename(run_dir.parent / "elsewhere")
    elif missing == "oracle":
        (run_dir / "summary.json").write_text(json.dumps({**SUMMARY, "oracle": None}))
    elif missing == "everything":
        run_dir = run_dir.parent / "empty"
        run_dir.mkdir()
    else:
        (run_dir / missing).unlink()
    page = Page(write_report(run_dir))
    assert ("chance" in page.text) == (missing in ("metrics.jsonl", "config.yaml", "samples"))
    assert ("has not ended" in page.text) == (missing in ("summary.json", "everything"))
    assert any(page.named("video")) == (missing not in ("samples", "everything"))


def test_a_run_without_summary_still_tells_its_steps_and_loss(run_dir: Path):
    (run_dir / "summary.json").unlink()
    text = Page(write_report(run_dir)).text
    assert "40steps" in text and "0.0250" in text and "39 s" in text


def test_a_missing_clip_is_said(run_dir: Path):
    (run_dir / "samples/step-000040/001.mp4").unlink()
    page = Page(write_report(run_dir))
    assert len(list(page.named("video"))) == 5 and "none" in page.text


def test_clips_beyond_the_limit_are_linked_the_last_step_goes_in_first(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report, "EMBED_BYTES", 2 * len(b"clip 40 0"))
    page = Page(write_report(run_dir))
    clips = [base64.b64decode(str(v["src"]).split(",")[1]).decode() for v in page.named("video")]
    assert clips == ["clip 40 0", "clip 40 1"]
    assert "samples/step-000020/000.mp4" in [attrs.get("href") for attrs in page.named("a")]


def test_an_old_report_survives_a_failure(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_report(run_dir)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run_dir)
    assert path.read_bytes() == before


def test_each_noise_level_is_a_labelled_curve(run_dir: Path):
    write_report(run_dir)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    drawn = dict(training_charts(rows))
    svg = drawn["Validation loss by noise level t (EMA weights)"]
    assert svg.count("<polyline") == len(TIMES) + 1
    assert all(f"t = {t:g}<" in svg for t in TIMES)
    # More noise, more loss in these rows: the curve lies higher, so its y is smaller.
    ends = [float(points.split(",")[-1]) for points in re.findall(r'points="([^"]+)"', svg)]
    assert ends[0] > ends[1] > ends[2]


def test_curves_keep_inside_the_picture_and_skip_what_is_not_finite():
    rows = [
        {"step": step, "time": 0.0, "train/loss": value}
        for step, value in enumerate([1.0, float("nan"), 1e9, float("inf"), *[0.5] * 3000])
    ]
    ((_, svg),) = training_charts(rows)
    numbers = [
        float(n)
        for points in re.findall(r'points="([^"]+)"', svg)
        for n in re.split("[ ,]", points)
    ]
    assert numbers and all(0 <= number <= report_charts.WIDTH for number in numbers)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, 0.0, 0.0], [-1.0, 1e-12]])
def test_flat_and_single_curves_are_drawn(values: list[float]):
    names = (
        "train/loss",
        "val/loss",
        "val/loss/t0.50",
        "val/psnr",
        "train/tokens_per_second",
        "train/data_wait",
    )
    rows = [{"step": i, "time": 0.0, **dict.fromkeys(names, v)} for i, v in enumerate(values)]
    assert len(training_charts(rows)) == 5
    assert "nan" not in "".join(svg for _, svg in training_charts(rows))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, size: float):
    found = ticks(low, low + size)
    assert 2 <= len(found) <= 8
    assert all(low - size * 1e-3 <= tick <= low + size * (1 + 1e-3) for tick in found)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.integers(1, 20))
def test_smoothing_keeps_length_and_range(values: list[float], window: int):
    smoothed = smooth(np.array(values), window)
    assert len(smoothed) == len(values)
    assert min(values) - 1e-9 <= smoothed.min() and smoothed.max() <= max(values) + 1e-9


def test_thinning_keeps_the_mean():
    steps = np.arange(6000.0)
    thinned = thin((steps, steps * 2))
    assert len(thinned[0]) == report_charts.MAX_POINTS
    np.testing.assert_allclose(thinned[1].mean(), steps.mean() * 2)
    np.testing.assert_allclose(thinned[1], thinned[0] * 2)


@given(st.lists(st.floats(0, 200), max_size=8).map(sorted))
def test_labels_never_overlap_and_keep_their_order(places: list[float]):
    moved = spread(places, 13, 12, 216)
    assert all(b - a >= 13 - 1e-9 for a, b in zip(moved, moved[1:], strict=False))
    assert all(12 - 1e-9 <= place <= 216 + 1e-9 for place in moved)


def test_counts_are_short():
    assert [compact(n) for n in (812, 6123, 14_200_000, 1_300_000_000)] == [
        "812",
        "6.12 K",
        "14.2 M",
        "1.3 B",
    ]


def test_the_metrics_page_is_current():
    page = (REPO / "docs/metrics.md").read_text("utf-8")
    assert page == reference(), "run `python -m sora_train.monitoring.metrics_reference`"
    assert all(f"`{name}`" in page for name in METRICS)

"""The panels of how a run ran: each from its metrics, absent without them, and inside its picture."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sentences import says

from sora_train.monitoring.events import Event
from sora_train.monitoring.goodput import PARTS
from sora_train.monitoring.report.charts import HEIGHT, WIDTH
from sora_train.monitoring.report.report import write_report
from sora_train.monitoring.report.run_charts import goodput, runtime_charts

SHARES = dict(zip([*PARTS, "other"], [0.8, 0.05, 0.02, 0.03, 0.04, 0.06], strict=True))


def rows(count: int) -> list[dict[str, float]]:
    families = {f"by_t/{t}": 1.0 for t in ("0-0.2", "0.2-0.4")}
    families |= {f"by_bucket/{name}": 1.0 for name in ("5x32x32", "17x32x32", "1x32x32")}
    families |= {f"by_task/{name}": 1.0 for name in ("t2v", "i2v", "extend")}
    found = []
    for step in range(1, count + 1):
        row = {
            "step": float(step),
            "time": 100.0 + step,
            "train/loss": 1 / step,
            "train/mfu": 0.5,
            "train/tflops": 9.0,
        }
        row |= {f"train/{name}": value / step for name, value in families.items()}
        row |= {f"goodput/{name}": share for name, share in SHARES.items()}
        row |= {
            "gpu/power": 600.0,
            "gpu/power/min": 500.0,
            "gpu/power/max": 700.0,
            "memory/host": 2.0,
        }
        found.append(row)
    return found


@pytest.mark.parametrize("count", [1, 2, 50, 5000])
def test_every_panel_keeps_inside_its_picture(count: int):
    drawn = dict(runtime_charts(rows(count), [Event("a", "restart", 1, 0.0, "went <on>")]))
    assert len(drawn) == 8
    for title, svg in drawn.items():
        assert "nan" not in svg and "inf" not in svg.lower().replace("infill", ""), title
        for points in re.findall(r'points="([^"]+)"', svg):
            for point in points.split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT
    buckets = re.findall(r">(\d+x32x32)<", drawn["Loss by bucket"])
    assert set(buckets) == {"1x32x32", "5x32x32", "17x32x32"}
    assert "went &lt;on&gt;" in drawn["TFLOP/s of the model, all ranks"]


def test_the_parts_of_the_time_fill_the_picture_in_proportion():
    """The area of each polygon is its share of the whole."""
    areas = []
    for points in re.findall(r'<polygon points="([^"]+)"', goodput(rows(9))):
        corners = [tuple(map(float, point.split(","))) for point in points.split()]
        following = [*corners[1:], corners[0]]
        area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, following, strict=True))
        areas.append(abs(area) / 2)
    shares = [area / sum(areas) for area in areas]
    assert shares == pytest.approx(list(SHARES.values()), abs=2e-3)


def test_nothing_is_drawn_of_nothing():
    assert runtime_charts([]) == []
    assert runtime_charts([{"step": 1.0, "time": 1.0, "train/loss": 1.0}]) == []


def test_the_report_tells_what_happened(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(5)))
    told = [{"time": 1.0, "step": 0, "ranks": 1}, {"time": 2.0, "step": 3, "ranks": 2}]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in told))
    page = write_report(tmp_path).read_text()
    HTMLParser().feed(page)
    says(page, "step 3", "2 rank(s)", "How it ran")
    assert "<b>80.0%</b><span>goodput</span>" in page

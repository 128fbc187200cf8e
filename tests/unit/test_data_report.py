"""The data report: what it says of each clip is what a run would make of it, on a page of its own."""

import csv
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from clip_files import write_clip
from PIL import Image
from sentences import says

from sora_train.cli import run
from sora_train.config.compose import compose
from sora_train.models.vae.autoencoder import VideoVAE, read_geometry
from sora_train.monitoring.report.charts import histogram
from sora_train.tools.data.report import account, page, write_data_report
from sora_train.tools.data.report_plan import DataPlan

HOSTILE = '<b>a "hostile" & bold caption</b>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips for two buckets, and one for each reason to be dropped."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "long.mp4", count=30, fps=24, height=48, width=96)
    write_clip(folder / "slow.mp4", count=6, fps=4, height=48, width=96)
    write_clip(folder / "narrow.mp4", count=12, height=32, width=320)
    write_clip(folder / "tiny.mp4", count=12, height=16, width=16)
    write_clip(folder / "short.mp4", count=2, height=48, width=96)
    (folder / "broken.mp4").write_bytes((folder / "long.mp4").read_bytes()[:200])
    write_clip(folder / "silent.mp4", count=12, height=64, width=64)
    for name in ("long", "slow", "narrow", "tiny", "short", "broken"):
        (folder / f"{name}.txt").write_text(HOSTILE if name == "long" else f"a {name} clip")
    return folder


def overrides(folder: Path, work: Path) -> list[str]:
    classes = '[{name: c, pixels: 2304, frames: [5, 9], aspect_ratios: ["1:1", "2:1"]}]'
    return [
        "experiment=real_tiny",
        f"data.source={folder}",
        f"run.dir={work}",
        f"buckets.classes={classes}",
    ]


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataPlan, list[Path]]:
    work = tmp_path_factory.mktemp("report")
    cfg = compose(overrides(folder, work / "run")).config
    return write_data_report(cfg, work / "out")


def row_of(plan: DataPlan, key: str) -> int:
    return plan.manifest.key.tolist().index(key)


def test_the_fate_of_a_clip_is_told_in_words(written: tuple[DataPlan, list[Path]]):
    plan, _ = written
    told = {key: plan.fate(row) for row, key in enumerate(plan.manifest.key.tolist())}
    says(told["long.mp4"], "30 frames", "24", "10 at 8 fps", "9x32x64")
    says(told["slow.mp4"], "6 frames", "6 at 4 fps", "5x32x64")
    says(told["short.mp4"], "2 frames", "2 at 8 fps", "too short")
    assert told["tiny.mp4"].endswith("dropped: too small")
    assert told["narrow.mp4"].endswith("dropped: aspect ratio")
    assert told["broken.mp4"] == "dropped: unreadable"
    assert told["silent.mp4"].endswith("dropped: no caption")
    assert plan.framing(row_of(plan, "long.mp4")) == "96x48 -> 100 % kept -> 64x32"


def test_captions_are_counted_by_name(written: tuple[DataPlan, list[Path]]):
    plan, _ = written
    captions = plan.manifest.captions.copy()
    captions[row_of(plan, "long.mp4")] = '{"fields": {"subject": "a ball"}, "short": "ball"}'
    data = plan.cfg.data.model_copy(update={"caption_weights": {"fields": 1.0, "short": 0.0}})
    named = replace(
        plan,
        manifest=plan.manifest.with_columns(captions=captions),
        cfg=plan.cfg.model_copy(update={"data": data}),
    )
    without = np.count_nonzero(plan.manifest.drop_reason == "") - 1
    says(account(named), f"{without} with none", "data.caption_weights")
    told = page(named, [])
    assert "captions named fields; 0 % (0 of 1)" in told and "named short" in told
    says(account(named), "captions named short", "0 of 1", "the longest has 5 bytes")
    assert "named" not in account(plan) and "captions named" not in page(plan, [])


def test_used_and_dropped_add_up(written: tuple[DataPlan, list[Path]]):
    plan, paths = written
    with paths[1].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(plan.manifest) == 7
    used = [row for row in rows if row["bucket"]]
    assert len(used) == len(plan.used) == int(plan.clips_per_bucket.sum()) == 2
    assert all(bool(row["bucket"]) != bool(row["reason"]) for row in rows)
    assert "7 clips = 2 used + 5 dropped" in account(plan)
    assert {int(row["tokens"]) for row in used} == {
        plan.tokens[number] for number in np.flatnonzero(plan.clips_per_bucket)
    }


def test_the_page_stands_alone_and_escapes(written: tuple[DataPlan, list[Path]]):
    page = written[1][0].read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "http" not in page
    assert HOSTILE not in page and "<b>a " not in page
    assert HOSTILE in unescape(page)
    for reason in ("too short", "too small", "aspect ratio", "unreadable", "no caption"):
        assert f"<td>{reason}</td>" in page
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert page.count("<svg ") == 7
    assert "9x32x64: 1 clip" in page


def test_the_picture_holds_the_examples(written: tuple[DataPlan, list[Path]]):
    with Image.open(written[1][2]) as picture:
        # Five frames of 64x32, each grown fourfold, beside the captions.
        assert picture.width > 5 * 256 and picture.height > 2 * 128


def test_nothing_that_fits_is_a_report_too(folder: Path, tmp_path: Path):
    given = [*overrides(folder, tmp_path), "buckets.classes.0.pixels=1000000"]
    given = [text.replace("pixels: 2304", "pixels: 1000000") for text in given[:-1]]
    plan, paths = write_data_report(compose(given).config, tmp_path / "out")
    assert len(plan.used) == 0
    assert [path.suffix for path in paths] == [".html", ".csv"]
    assert "7 clips = 0 used + 7 dropped" in account(plan)


def test_the_command_says_where_things_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "defaults: [real_tiny]\n"
        f"data: {{source: '', sources: [{{name: one, source: {folder}}}, {{name: two, source: {folder}}}]}}\n"
    )
    given = [*overrides(folder, tmp_path), "data.source=''", f"out={tmp_path / 'here'}"]
    assert run(["data", "report", str(mine), *given[1:]]) == 0
    assert (tmp_path / "here/data_report.html").exists()
    said = capsys.readouterr().out
    assert str(tmp_path / "here/data_report.png") in said and "one, two: 14 clips" in said


@pytest.mark.parametrize("name", ["tiny", "tiny_random", "micro"])
def test_the_geometry_read_is_that_of_the_vae_built(name: str):
    cfg = compose([f"vae={name}"]).config.vae
    vae, geometry = VideoVAE.from_config(cfg), read_geometry(cfg)
    assert geometry == vae.geometry
    assert (geometry.frame_step, geometry.spatial_factor) == (vae.frame_step, vae.spatial_factor)


def test_a_histogram_counts_every_value():
    values = np.array([0.0] * 3 + [10.0] * 9)
    heights = [
        float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', histogram(values, "s"))
    ]
    assert len(heights) == 2 and heights[1] == pytest.approx(3 * heights[0], rel=0.01)
    assert "<svg" in histogram(np.array([4]), "equal values have one bar")

"""Scenes: the transitions of footage are those it was made with, whatever the camera does and however it is read."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.footage import JOINS, Footage, random_footage, write_footage
from data_prep.media.reading import open_row
from data_prep.scenes.samples import Sample, difference, rate_of, samples
from data_prep.scenes.transnet import probabilities
from data_prep.stage import Workspace
from data_prep.stages.probe import ProbeConfig, probe
from data_prep.stages.scenes import ScenesConfig, scenes
from sora_train.data.decode.video_io import encode_h264
from tests.unit.clip_files import write_timed

SOURCE = {"kind": "video", "offset": 0, "range_begin": None, "range_end": None}


def parts_of(path: Path, part_seconds: float = 1e6) -> pa.Table:
    """The source as probed, a row for each part."""
    row = {"key": path.name, "path": str(path), "length": path.stat().st_size, **SOURCE}
    schema = pa.schema([("range_begin", pa.float64()), ("range_end", pa.float64())])
    rows = pa.table({name: [value] for name, value in row.items() if name not in schema.names})
    for field in schema:
        rows = rows.append_column(field.name, pa.nulls(1, field.type))
    found = probe(rows, ProbeConfig(part_seconds=part_seconds), Workspace(path.parent))
    rows = rows.take(found["of_row"])
    for name in found.column_names:
        rows = rows.append_column(name, found[name]) if name != "of_row" else rows
    return rows


def transitions_in(path: Path, part_seconds: float = 1e6, **settings: Any) -> list[dict[str, Any]]:
    parts = parts_of(path, part_seconds)
    found = scenes(parts, ScenesConfig(**settings), Workspace(path.parent))
    return [one for part in found["transitions"].to_pylist() for one in part]


def judged(film: Footage, found: list[dict[str, Any]]) -> Counter[str]:
    """Counts: KIND true, KIND hit, KIND false, and `leaked` frames of transitions that a scene would begin or end with.

    A cut is hit within two frames, a dissolve or fade where both overlap.
    """
    counts, left = Counter[str](), list(found)
    for begin, end, kind in film.transitions:
        counts[f"{kind} true"] += 1
        hits = [
            one
            for one in left
            if one["kind"] == kind
            and (abs(one["begin"] - begin) * film.fps < 2.5)
            | (one["begin"] < end and one["end"] > begin)
        ]
        if hits:
            left.remove(hits[0])
            counts[f"{kind} hit"] += 1
            counts["leaked"] += round(max(0.0, hits[0]["begin"] - begin) * film.fps)
            counts["leaked"] += round(max(0.0, end - hits[0]["end"]) * film.fps)
    return counts + Counter(f"{one['kind']} false" for one in left)


def rates(counts: Counter[str], kind: str) -> tuple[float, float]:
    """(precision, recall)"""
    hit = counts[f"{kind} hit"]
    return hit / max(1, hit + counts[f"{kind} false"]), hit / max(1, counts[f"{kind} true"])


def assert_found(counts: Counter[str]) -> None:
    assert min(rates(counts, "cut")) >= 0.98, counts
    assert min(rates(counts, "dissolve")) >= 0.9 and min(rates(counts, "fade")) >= 0.9, counts


def film_of(tmp_path: Path, film: Footage) -> Path:
    return write_footage(film, tmp_path / "film.mp4")


def test_differences_find_the_transitions_of_footage(tmp_path: Path):
    """Seeds and a rate that no threshold was chosen by; every camera and things that race are among them."""
    counts = Counter[str]()
    for seed, fps in ((3001, 12.0), (3002, 24.0)):
        film = random_footage(seed, 36, seconds=(0.7, 1.4), height=90, width=160, fps=fps)
        counts += judged(film, transitions_in(film_of(tmp_path, film), detector="difference"))
    assert_found(counts)
    assert counts["cut true"] >= 15 and counts["dissolve true"] >= 15 and counts["fade true"] >= 15


@pytest.mark.slow
def test_network_and_differences_find_the_transitions_of_footage(tmp_path: Path):
    counts = Counter[str]()
    for seed, joins, fps in ((3003, JOINS, 12.0), (3004, ("cut",), 24.0)):
        film = random_footage(seed, 30, joins, seconds=(1.0, 2.0), height=90, width=160, fps=fps)
        counts += judged(film, transitions_in(film_of(tmp_path, film)))
    assert_found(counts)


@pytest.mark.slow
def test_the_network_alone_misses_few_cuts(tmp_path: Path):
    """It misses one of these 29, which differences of frames find: the default is both joined."""
    film = random_footage(3009, 30, ("cut",), seconds=(0.8, 1.2), height=90, width=160, fps=12.0)
    counts = judged(film, transitions_in(film_of(tmp_path, film), detector="transnetv2"))
    precision, recall = rates(counts, "cut")
    assert precision >= 0.98 and recall >= 0.95, counts


def test_pyscenedetect_finds_cuts_and_fades(tmp_path: Path):
    film = random_footage(
        3005, 24, ("cut", "fade"), seconds=(0.7, 1.2), height=90, width=160, fps=12.0
    )
    counts = judged(film, transitions_in(film_of(tmp_path, film), detector="pyscenedetect"))
    assert min(rates(counts, "cut")) >= 0.9 and min(rates(counts, "fade")) >= 0.9, counts


@pytest.mark.parametrize("detector", ["difference", "pyscenedetect"])
def test_parts_joined_are_the_whole(tmp_path: Path, detector: str):
    film = random_footage(3006, 24, seconds=(0.8, 2.0), height=90, width=160, fps=12.0)
    path = film_of(tmp_path, film)
    whole = transitions_in(path, detector=detector)
    assert len(whole) >= 12
    for seconds in (10.0, 13.7, 27.0):
        assert transitions_in(path, seconds, detector=detector) == whole


@pytest.mark.slow
def test_parts_joined_are_the_whole_of_the_network_too(tmp_path: Path):
    """At 4 frames a second, whose steps are as many as those of 24 but for the time they take."""
    film = random_footage(3007, 12, seconds=(2.0, 4.0), height=54, width=96, fps=4.0)
    path = film_of(tmp_path, film)
    whole = transitions_in(path)
    assert len(whole) >= 6 and len(parts_of(path, 20.0)) >= 2
    assert transitions_in(path, 20.0) == whole


def test_the_network_judges_a_sample_by_its_block_wherever_it_is_begun():
    draws = np.random.default_rng(0)
    pictures = draws.integers(0, 256, (104, 27, 48, 3), np.uint8)
    given = [Sample(number, number / 25, picture) for number, picture in enumerate(pictures)]
    whole = [(one.number, ends, within) for one, ends, within in probabilities(given)]
    assert [number for number, _, _ in whole] == list(range(104))
    part = [(one.number, ends, within) for one, ends, within in probabilities(given[60:])]
    assert part == whole[100:]


def sampled(row: dict[str, Any], first: int, last: int) -> list[Sample]:
    with open_row(row) as file:
        return list(samples(file, row, first, last))


def assert_parts_are_sampled_as_the_whole(path: Path, step: int = 13) -> list[Sample]:
    [row] = parts_of(path).to_pylist()
    whole = sampled(row, 0, 10_000)
    assert [one.number for one in whole] == list(range(len(whole)))
    for first in range(1, len(whole), step):
        part = sampled(row, first, first + 20)
        for one, same in zip(part, whole[first : first + 21], strict=True):
            assert (one.number, one.time) == (same.number, same.time)
            assert (one.picture == same.picture).all()
    return whole


@pytest.mark.parametrize("fps", [12.0, 50.0, 60000 / 1001])
def test_samples_come_evenly_and_say_when_the_picture_changed(tmp_path: Path, fps: float):
    film = random_footage(3008, 4, ("cut",), seconds=(0.8, 1.2), height=54, width=96, fps=fps)
    whole = assert_parts_are_sampled_as_the_whole(film_of(tmp_path, film))
    assert abs(len(whole) - film.num_frames * rate_of(fps) / fps) <= 1
    changes = [difference(a.picture, b.picture) for a, b in pairwise(whole)]
    found = sorted(whole[1 + int(n)].time for n in np.argsort(changes)[-3:])
    assert found == pytest.approx([begin for begin, _, _ in film.transitions], abs=1e-3)


def test_a_frame_that_is_shown_for_long_is_sampled_for_as_long(tmp_path: Path):
    times = [0, 40, 80, 2500, 2510, 2520, 5000, 5040, 9000]
    whole = assert_parts_are_sampled_as_the_whole(write_timed(tmp_path / "film.mkv", times), 1)
    rate = rate_of(parts_of(tmp_path / "film.mkv")["source_fps"][0].as_py())
    assert len(whole) > 6 and len(np.unique([one.picture.mean() for one in whole])) >= 3
    for one in whole:
        shown = max(n for n, time in enumerate(times) if time / 1000 * rate < one.number + 0.75)
        assert one.picture.mean() == pytest.approx(16 + 6 * shown, abs=2)


def test_nasa_has_a_dissolve_and_a_cut_and_others_have_none(real_videos: Path):
    dissolve, cut = transitions_in(real_videos / "nasa.mp4")
    assert dissolve["kind"] == "dissolve" and cut["kind"] == "cut"
    assert 127 <= round(dissolve["begin"] * 25) < round(dissolve["end"] * 25) <= 151
    assert abs(round(cut["begin"] * 25) - 202) <= 2 and cut["begin"] == cut["end"]


def assert_one_scene(folder: Path, detector: str) -> None:
    for name in ("press.mp4", "hiker.mp4"):
        assert transitions_in(folder / name, detector=detector) == []


def test_differences_find_nothing_in_one_scene(real_videos: Path):
    assert_one_scene(real_videos, "difference")


@pytest.mark.slow
def test_the_network_finds_nothing_in_one_scene(real_videos: Path):
    assert_one_scene(real_videos, "joined")


@pytest.mark.parametrize("detector", ["difference", "pyscenedetect"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 11, 14, 20])
def test_the_shortest_sources_have_no_transitions(tmp_path: Path, count: int, detector: str):
    moving = (np.arange(count)[:, None, None, None] * 3 + np.arange(64)[:, None]) % 256
    frames = np.broadcast_to(moving, (count, 32, 64, 3)).astype(np.uint8)
    encode_h264(np.ascontiguousarray(frames), 12, tmp_path / "short.mp4")
    assert transitions_in(tmp_path / "short.mp4", detector=detector) == []

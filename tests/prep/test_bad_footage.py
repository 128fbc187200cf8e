"""Footage of any kind of damage: nothing stops the run, and every file ends as clips or with a reason."""

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sentences import refuses

from data_prep.command import prepare
from sora_train.errors import Fault, UserError

LIGHT = [
    "workers=2", "scenes.detector=difference", "score.text=false", "score.faces=false", "score.nsfw=false",
    "score.brisque=false", "cut.min_seconds=0.5", "caption.allow_empty=true",
]  # fmt: skip
# The 4K one alone would be most of the time.
LEFT_OUT = ("motorcycle_4k.mp4",)


def truncated(data: bytes, draws: random.Random) -> bytes:
    return data[: draws.randrange(len(data))]


def bits_flipped(data: bytes, draws: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draws.choice((1, 10, 1000))):
        changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
    return bytes(changed)


def zeroed(data: bytes, draws: random.Random) -> bytes:
    start = draws.randrange(len(data))
    length = min(draws.choice((16, 512, 65536)), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def spliced(data: bytes, draws: random.Random) -> bytes:
    half = draws.randrange(len(data))
    return data[:half] + data[draws.randrange(len(data)) :]


def enormous(data: bytes, draws: random.Random) -> bytes:
    """The size of a box, of a picture or of a table claims to be enormous."""
    changed = bytearray(data)
    names = [
        name
        for name in (b"avc1", b"hvc1", b"stsz", b"stts", b"stco", b"mdat", b"trak", b"tkhd")
        if name in data
    ]
    if not names:
        return bits_flipped(data, draws)
    place = data.index(draws.choice(names)) + draws.choice((-4, 4, 12, 16, 28))
    changed[place : place + 4] = b"\x7f\xff\xff\xff"
    return bytes(changed)


def empty(data: bytes, draws: random.Random) -> bytes:
    return b""


KINDS: list[Callable[[bytes, random.Random], bytes]] = [
    truncated,
    bits_flipped,
    zeroed,
    spliced,
    enormous,
    empty,
]
EXTENSIONS = ("mp4", "mkv", "webm", "avi", "ts", "gif", "mov", "png", "flv")


def damaged(source: Path, folder: Path, count: int) -> Path:
    """`count` damaged copies of the real clips, the same each time, beside the clips themselves."""
    left_out = shutil.ignore_patterns(*LEFT_OUT, "README.md", "captions.jsonl")
    shutil.copytree(source, folder, ignore=left_out)
    clips = sorted(path for path in source.iterdir() if path.suffix in (".mp4", ".mkv", ".mov"))
    clips = [path for path in clips if path.name not in LEFT_OUT]
    draws = random.Random(2026)
    for number in range(count):
        clip, kind = clips[number % len(clips)], KINDS[number % len(KINDS)]
        extension = draws.choice(EXTENSIONS) if draws.random() < 0.2 else clip.suffix[1:]
        name = f"{number:03d}-{kind.__name__}.{extension}"
        (folder / name).write_bytes(kind(clip.read_bytes(), draws))
    return folder


@pytest.mark.parametrize(
    "count", [18, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(5400)])]
)
def test_every_damaged_copy_is_accounted_for(real_videos: Path, tmp_path: Path, count: int):
    folder = damaged(real_videos, tmp_path / "footage", count)
    out = tmp_path / "out"
    prepare([f"input={folder}", f"output={out}", *LIGHT])
    rows = pq.read_table(next((out / "prep/stages/report").rglob("*.parquet"))).to_pylist()
    files = {path.name for path in folder.iterdir() if path.suffix not in (".jsonl", ".md")}
    assert {row["source"] or row["key"] for row in rows} == files, (
        "a file is neither kept nor dropped"
    )
    dropped = [row for row in rows if row["drop_reason"]]
    assert all(row["drop_stage"] and row["drop_detail"] for row in dropped)
    # A copy that was hardly damaged may be kept in place of the clip itself.
    fates = {row["source"]: row["drop_reason"] for row in rows}
    assert all(fates[name] in ("", "duplicate") for name in ("hiker.mp4", "press.mp4", "nasa.mp4"))
    codes = {row["drop_reason"] for row in dropped}
    assert "failed" not in codes, [row for row in dropped if row["drop_reason"] == "failed"][:3]


def test_filters_that_keep_nothing_are_told_from_a_sample(real_videos: Path, tmp_path: Path):
    folder = tmp_path / "footage"
    folder.mkdir()
    for name in ("hiker.mp4", "nasa.mp4", "press.mp4"):
        shutil.copy(real_videos / name, folder)
    given = [f"input={folder}", f"output={tmp_path / 'out'}", *LIGHT, "filter.keep=exposure > 2"]
    with refuses(UserError, "keep none of 2 clips", "exposure > 2", "sample=0"):
        prepare([*given, "sample=2"])


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_after_it(
    real_videos: Path, tmp_path: Path
):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", place]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted: not root here")
    folder = tmp_path / "footage"
    folder.mkdir()
    shutil.copy(real_videos / "press.mp4", folder)
    given = [f"input={folder}", f"output={place / 'out'}", *LIGHT]
    try:
        with refuses(Fault, "No space left", "clip"):
            prepare(given)
        assert not list((place / "out").rglob("*.mp4")), "nothing half written under a final name"
        subprocess.run(["mount", "-o", "remount,size=20m", place], check=True)
        assert "1 clips" in prepare(given)
    finally:
        subprocess.run(["umount", "-l", place], check=False)

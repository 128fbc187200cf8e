"""Damaged tars, tables and texts: whatever bytes are flipped, cut or inserted, a clip is used, dropped or refused.

Through what `sora data index` runs: no crash, no hang, and no clip that is neither used nor told of.
"""

import io
import json
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import UserError, sentence
from sora_train.tools.data.command import index_source

CLIPS = ("a.mp4", "sub/кот.mp4", "c.mp4")
TEXTS = ("a red square", "один, “two”", "third\nline")
FAST = 4
ALL = 20
"""Of each kind of input."""

Make = Callable[[Path, bytes], str]
"""Writes the input into a folder; the name of the file that is to be damaged."""


def loose(folder: Path, clip: bytes) -> list[tuple[str, str]]:
    (folder / "sub").mkdir()
    for name in CLIPS:
        (folder / name).write_bytes(clip)
    return list(zip(CLIPS, TEXTS, strict=True))


def a_tar(folder: Path, clip: bytes) -> str:
    members = {}
    for name, text in zip((*CLIPS, "long/" * 30 + "d.mp4"), (*TEXTS, "fourth"), strict=True):
        members[name] = clip
        members[name.replace("mp4", "txt")] = text.encode()
        members[name.replace("mp4", "json")] = json.dumps({"captions": {"short": text}}).encode()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return "0.tar"


def a_csv(folder: Path, clip: bytes) -> str:
    rows = [f'{name},"{text}",{n}' for n, (name, text) in enumerate(loose(folder, clip))]
    (folder / "captions.csv").write_text("\n".join(["file,caption,score_a", *rows]))
    return "captions.csv"


def a_jsonl(folder: Path, clip: bytes) -> str:
    rows = [{"file": name, "caption": text} for name, text in loose(folder, clip)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "captions.jsonl"


def a_parquet(folder: Path, clip: bytes) -> str:
    rows = [{"file": name, "caption": text} for name, text in loose(folder, clip)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")
    return "captions.parquet"


def sidecars(folder: Path, clip: bytes) -> str:
    for name, text in loose(folder, clip):
        (folder / name).with_suffix(".txt").write_text(text, encoding="utf-16")
    return "c.txt"


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One to three places of `data` flipped, cut out, or with bytes inserted."""
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(data) + 1), draw.choice([1, 1, 2, 9, 300])
        kind = draw.choice(["flip", "cut", "insert"])
        new = draw.choice([draw.randbytes(length), bytes(length), b'"', b"\n", b"\\", b","])
        end = at if kind == "insert" else at + (len(new) if kind == "flip" else length)
        data = data[:at] + (b"" if kind == "cut" else new) + data[end:]
    return data


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    encode_h264(np.full((2, 32, 48, 3), 99, np.uint8), 8, path)
    return path.read_bytes()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "seed",
    [pytest.param(s, marks=[pytest.mark.slow] if s >= FAST else []) for s in range(ALL)],
)
@pytest.mark.parametrize("make", [a_tar, a_csv, a_jsonl, a_parquet, sidecars])
def test_nothing_is_lost_unseen(tmp_path: Path, clip: bytes, make: Make, seed: int):
    folder = tmp_path / "in"
    folder.mkdir()
    file = folder / make(folder, clip)
    whole = file.read_bytes()
    file.write_bytes(damaged(whole, random.Random(f"{make.__name__} {seed}")))
    clips = 4 if make is a_tar else 3
    arguments = [f"source={folder}", f"work_dir={tmp_path / 'work'}", "probe=header", "workers=1"]
    try:
        told = index_source(arguments)
    except UserError as error:
        assert "internal fault" not in sentence(error)
        sentence(error).encode()
        return
    told.encode()
    counted = re.search(r": (\d+) clips = (\d+) usable \+ (\d+) dropped", told)
    assert counted, told
    total, used, dropped = map(int, counted.groups())
    assert total == used + dropped
    assert "�" not in told
    # A key whose clip lost its name is no clip any more, and counted as such.
    assert total >= clips or "left out" in told or dropped
    assert make is a_tar or total >= clips

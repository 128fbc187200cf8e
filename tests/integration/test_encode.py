"""`sora data encode` shared and killed, and `sora data verify`: what is read is whole, and what is wrong is told."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sentences import refuses, says

from sora_train.data.index.shard_writer import ShardWriter
from sora_train.data.latents.members import stored_of
from sora_train.data.latents.provenance import read_made_with, write_made_with
from sora_train.data.manifest import Manifest
from sora_train.errors import UserError
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.tools.data.command import encode_source, verify_source

TINY = ("experiment=parity_tiny", "text.trainable=false", "data.latents=sample")


def arguments(folder: Path, clips: tuple[str, str], *more: str) -> list[str]:
    return [*TINY, f"run.dir={folder / 'run'}", f"output={folder / 'out'}", *clips, *more]


def in_a_process(act: Callable[[], object]) -> int:
    """Begin `act` in a process of its own that shares what is imported; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def assert_same_shards(found: Path, wanted: Path) -> None:
    for split in ("train", "val"):
        tars = sorted((wanted / split).glob("*.tar"))
        assert tars
        for tar in tars:
            assert tar.read_bytes() == (found / split / tar.name).read_bytes()


def test_killed_anywhere_it_leaves_nothing_half_done_and_goes_on(
    encoded: Path, clips: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "out"
    encode, write, rename = VideoVAE.encode_moments, ShardWriter.write, os.rename
    counted: list[int] = []

    def count(self, pixels):
        counted.append(len(pixels))
        return encode(self, pixels)

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dies_encoding(self, pixels):
        count(self, pixels)
        return killed() if sum(counted) > 12 else encode(self, pixels)

    def dies_in_a_shard(self, key, *rest):
        write(self, key, *rest)
        return killed() if len(self._rows) == 9 else None

    def dies_between_the_splits(old, new):
        rename(old, new)
        killed()

    cases = [
        (VideoVAE, "encode_moments", dies_encoding, set()),
        (ShardWriter, "write", dies_in_a_shard, set()),
        (os, "rename", dies_between_the_splits, {"val"}),
    ]
    for owner, name, deadly, there in cases:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, deadly)
            child = in_a_process(lambda: encode_source(arguments(tmp_path, clips), None))
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert {path.name for path in output.iterdir()} & {"train", "val"} == there
    with pytest.raises(UserError, match=r"dtype\s+float32\s+bfloat16"):
        encode_source(arguments(tmp_path, clips, "dtype=bfloat16"), None)
    monkeypatch.setattr(VideoVAE, "encode_moments", count)
    encode_source(arguments(tmp_path, clips), None)
    assert counted == [], "all was encoded before"
    assert_same_shards(output, encoded)
    assert sorted(path.name for path in output.iterdir()) == ["train", "val"]
    with refuses(UserError, "empty folder"):
        encode_source(arguments(tmp_path, clips), None)


def test_parts_share_the_work_and_a_merge_writes(
    encoded: Path, clips: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    captions: list[str] = []
    embedding = TextEncoder.embedding

    def counted(self, prompt):
        captions.append(prompt)
        return embedding(self, prompt)

    monkeypatch.setattr(TextEncoder, "embedding", counted)
    assert "part 2 of 2" in encode_source(arguments(tmp_path, clips, "part=2/2"), None)
    with pytest.raises(UserError, match="not encoded yet"):
        encode_source(arguments(tmp_path, clips, "merge=true"), None)
    assert not (tmp_path / "out" / "train").exists()
    encode_source(arguments(tmp_path, clips, "part=1/2"), None)
    assert len(captions) == len(set(captions)) > 0
    encode_source(arguments(tmp_path, clips, "merge=true"), None)
    assert_same_shards(tmp_path / "out", encoded)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ranks_share_the_work(encoded: Path, clips: tuple[str, str], tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sora_train", "data", "encode", *arguments(tmp_path, clips)]
    there = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            command, env={**there, "RANK": rank}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in "01"
    ]  # fmt: skip
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert_same_shards(tmp_path / "out", encoded)
    shares = re.findall(r"encoding train clips (\d+)/\1 ", said[0])
    says(said[1], "share is done")
    assert shares and 0 < int(shares[0]) < 24


def verified(tmp_path: Path, clips: tuple[str, str], *more: str) -> tuple[str, bool]:
    verification = verify_source([*TINY, f"run.dir={tmp_path / 'run'}", *clips, *more], None)
    return str(verification), not verification.wrong


def test_what_is_sound_is_verified_and_what_is_not_is_listed(
    encoded: Path, clips: tuple[str, str], tmp_path: Path
):
    text, same = verified(tmp_path, clips, f"encoded={encoded}", "sample=3")
    assert same and "6 of 28 stored clips" in text, "three of each split"
    assert all(what in text for what in ("mean", "logvar", "embedding"))
    output = tmp_path / "out"
    shutil.copytree(encoded, output)
    manifest = Manifest.load(output / "train" / "manifest.parquet")
    place, _ = stored_of(manifest.members[7])
    with open(manifest.path(7), "r+b") as tar:
        tar.seek(place.offset + place.length - 4)
        tar.write(np.float32(9).tobytes())
    made = read_made_with(output / "train")
    made["latents"]["decoder"] = "an older one"
    write_made_with(output / "train", made)
    text, same = verified(tmp_path, clips, f"encoded={output}", "sample=100%")
    assert not same
    (listed,) = [line for line in text.splitlines() if " differs by " in line]
    assert str(manifest.key[7]) in listed.replace("/", "-").replace(".", "-") and "logvar" in listed
    assert "an older one" in text and "28 of 28 stored clips" in text
    swapped = [text.split("=")[1] for text in clips]
    other = (f"data.source={swapped[1]}", f"data.val_source={swapped[0]}")
    with pytest.raises(UserError, match="other captions"):
        verified(tmp_path, other, f"encoded={output}")


@pytest.mark.parametrize("wrong", ["sample=0", "sample=x%", "sample=200%", "encoded=/nowhere"])
def test_a_wrong_sample_is_named(wrong: str, tmp_path: Path):
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        verify_source([*TINY, f"run.dir={tmp_path}", wrong], None)

"""`sora verify`: verdicts of whole and damaged files, exit codes, and what is shown."""

import json
from dataclasses import dataclass
from pathlib import Path

import certificates_for_tests as chains
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses, says

from sora_train.cli import run
from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import UserError
from sora_train.serving.provenance.signing import open_signer
from sora_train.serving.provenance.verdict import verdict


@dataclass
class Files:
    folder: Path
    raw: Path
    created: Path
    remixed: Path
    anchors: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A video without a manifest, one with, and one that was made of it."""
    folder = tmp_path_factory.mktemp("signed")
    made = chains.make(folder / "certificates")
    signer = open_signer(certificate=made.chain, key=made.key)
    names = (folder / f"{name}.mp4" for name in ("raw", "created", "remixed"))
    files = Files(folder, *names, made.anchors)
    noise = np.random.default_rng(0).integers(0, 255, (9, 48, 48, 3), np.uint8)
    encode_h264(noise, 8, files.raw)
    signer.sign(files.raw, files.created, title="one", model="m", parameters={"seed": 3})
    signer.sign(
        files.raw, files.remixed, title="two", model="m", action="remix", parent=files.created
    )
    return files


def box(data: bytes, name: bytes) -> tuple[int, int]:
    """Where a box of the outermost level begins and ends."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == name:
            return at, at + size
        at += size
    raise AssertionError(f"no box {name!r}")


@pytest.mark.parametrize("name", [b"mdat", b"uuid", b"moov"])
@settings(max_examples=60)
@given(data=st.data())
def test_one_flipped_bit_of_pictures_or_manifest_is_invalid(
    name: bytes, data: st.DataObject, files: Files
) -> None:
    whole = files.remixed.read_bytes()
    start, end = box(whole, name)
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(start, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = files.folder / "damaged.mp4"
    damaged.write_bytes(flipped)
    found = verdict(damaged, files.anchors.read_text())
    assert (found.state, found.ok) == ("Invalid", False) and found.failures


def test_labels_sizes_and_padding_that_no_hash_covers_are_looked_at(files: Files) -> None:
    whole = files.created.read_bytes()
    start, end = box(whole, b"uuid")
    pad = whole.index(b"cpadY", start)
    label = whole.rindex(b"c2pa.signature\0", start, end)
    for place in (start + 24, start + 37, start + 47, label + 3, label - 1, pad + 2, pad + 100):
        flipped = bytearray(whole)
        flipped[place] ^= 0x40
        (files.folder / "loose.mp4").write_bytes(flipped)
        assert verdict(files.folder / "loose.mp4").state == "Invalid", place - start


def test_a_file_that_was_cut_off_is_not_well(files: Files) -> None:
    whole = files.created.read_bytes()
    for length in (0, 4, 100, 2000, len(whole) - 1):
        (files.folder / "cut.mp4").write_bytes(whole[:length])
        assert not verdict(files.folder / "cut.mp4").ok


def test_the_verdict_tells_who_made_it_of_what(files: Files) -> None:
    found = verdict(files.remixed, files.anchors.read_text())
    assert (found.state, found.ok, found.ai, found.title) == ("Trusted", True, True, "two")
    assert (found.issuer, found.parents) == ("Example Studio", ("one",))
    assert [action.name for action in found.actions] == ["c2pa.opened", "c2pa.edited"]
    assert found.actions[1].parameters == {"model": "m", "sora_train.operation": "remix"}
    assert verdict(files.raw).state == "None"


def test_trust_counts_where_roots_are_given(files: Files, tmp_path: Path) -> None:
    others = chains.make(tmp_path).anchors.read_text()
    assert (verdict(files.created).state, verdict(files.created).ok) == ("Valid", True)
    untrusted = verdict(files.created, others)
    assert (untrusted.state, untrusted.ok) == ("Valid", False)
    assert untrusted.failures == ("signingCredential.untrusted",)


def test_a_parent_that_was_damaged_before_is_told(files: Files) -> None:
    made = files.folder / "certificates"
    signer = open_signer(certificate=made / "chain.pem", key=made / "key.pem")
    flipped = bytearray(files.created.read_bytes())
    flipped[box(bytes(flipped), b"mdat")[0] + 100] ^= 1
    bad, target = files.folder / "bad.mp4", files.folder / "of_bad.mp4"
    bad.write_bytes(flipped)
    signer.sign(files.raw, target, title="t", model="m", action="edit", parent=bad)
    assert verdict(target).parents == ("one (damaged)",)


def test_the_command_answers_by_its_exit_code_and_its_table(
    files: Files, capsys: pytest.CaptureFixture
) -> None:
    anchors = ["--anchors", str(files.anchors)]
    assert run(["verify", str(files.created), str(files.remixed), *anchors]) == 0
    says(
        capsys.readouterr().out,
        "Trusted",
        "Example Studio",
        "made by AI yes",
        "seed=3",
        "parents one",
    )
    assert run(["verify", str(files.created), str(files.raw)]) == 1
    says(capsys.readouterr().out, "verdict Valid", "verdict None")
    with refuses(UserError, "nothing.mp4"):
        run(["verify", "nothing.mp4"])
    with refuses(UserError, str(files.raw), "PEM"):
        run(["verify", str(files.created), "--anchors", str(files.raw)])


def test_json_is_for_machines(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    key = tmp_path / "key"
    key.write_text("00" * 32)
    assert run(["verify", str(files.created), "--watermark-key", str(key), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["state"], row["ok"], row["watermark"]["present"]) == ("Valid", True, False)
    assert row["actions"][0]["parameters"]["seed"] == 3
    key.write_text("short")
    with refuses(UserError, str(key), "16 bytes"):
        run(["verify", str(files.created), "--watermark-key", str(key)])

"""Signed videos, read by c2pa's own reader, and what happens where signing fails."""

import http.server
import json
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import c2pa
import certificates_for_tests as chains
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from sentences import refuses

from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import UserError
from sora_train.serving.provenance.manifests import read_manifests
from sora_train.serving.provenance.signing import AI, Signer, SigningError, open_signer


@pytest.fixture
def made(tmp_path: Path) -> chains.Made:
    return chains.make(tmp_path / "certificates")


@pytest.fixture
def signer(made: chains.Made) -> Signer:
    return open_signer(certificate=made.chain, key=made.key)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    encode_h264(np.random.default_rng(0).integers(0, 255, (9, 48, 48, 3), np.uint8), 8, path)
    return path


def read(path: Path, made: chains.Made) -> tuple[str, dict[str, Any]]:
    """State and manifests of a file by the library alone, trusting the root of `made`."""
    settings = {
        "trust": {"trust_anchors": made.anchors.read_text()},
        "verify": {"verify_trust": True},
    }
    with (
        c2pa.Context.from_dict(settings) as context,
        c2pa.Reader(str(path), context=context) as reader,
    ):
        return reader.get_validation_state(), json.loads(reader.json())


def actions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        action
        for assertion in manifest["assertions"]
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux()]


def test_a_created_video_is_trusted_and_says_that_a_model_made_it(
    clip: Path, made: chains.Made, signer: Signer, tmp_path: Path
) -> None:
    target = tmp_path / "out.mp4"
    signer.sign(clip, target, title="A cat", model="quickstart", parameters={"seed": 7})
    state, store = read(target, made)
    manifest = store["manifests"][store["active_manifest"]]
    assert state == "Trusted"
    assert manifest["title"] == "A cat"
    assert manifest["signature_info"]["issuer"] == "Example Studio"
    [action] = actions(manifest)
    assert action["action"] == "c2pa.created" and action["digitalSourceType"] == AI
    assert action["parameters"] == {
        "model": "quickstart",
        "sora_train.operation": "create",
        "seed": 7,
    }
    assert packets(target) == packets(clip)


def test_parents_are_kept_through_extend_and_remix(
    clip: Path, made: chains.Made, signer: Signer, tmp_path: Path
) -> None:
    first, second, third = (tmp_path / f"{i}.mp4" for i in range(3))
    signer.sign(clip, first, title="first", model="m")
    signer.sign(clip, second, title="second", model="m", action="extend", parent=first)
    signer.sign(clip, third, title="third", model="m", action="remix", parent=second)
    for path, depth in ((second, 2), (third, 3)):
        state, store = read(path, made)
        assert state == "Trusted" and len(store["manifests"]) == depth
    label, titles = store["active_manifest"], []
    while label:
        manifest = store["manifests"][label]
        titles.append(manifest["title"])
        parents = [
            each for each in manifest.get("ingredients", ()) if each["relationship"] == "parentOf"
        ]
        label = parents[0]["active_manifest"] if parents else None
    assert titles == ["third", "second", "first"]
    opened, edited = actions(store["manifests"][store["active_manifest"]])
    assert opened["action"] == "c2pa.opened" and opened["parameters"]["ingredients"]
    assert edited["action"] == "c2pa.edited" and edited["digitalSourceType"] == AI


def test_a_parent_without_a_manifest_or_of_another_format_is_named(
    clip: Path, made: chains.Made, signer: Signer, tmp_path: Path
) -> None:
    other, target = tmp_path / "theirs.mkv", tmp_path / "out.mp4"
    other.write_bytes(b"\x1a\x45\xdf\xa3 and so on")
    for parent in (clip, other):
        signer.sign(clip, target, title="t", model="m", action="edit", parent=parent)
        state, store = read(target, made)
        [ingredient] = store["manifests"][store["active_manifest"]]["ingredients"]
        assert (state, ingredient["title"]) == ("Trusted", parent.name)


@pytest.mark.parametrize("form", ["der", "raw"])
def test_a_kms_signs_by_its_callback(
    form: str, clip: Path, made: chains.Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sign(data: bytes) -> bytes:
        der = made.private.sign(data, ec.ECDSA(SHA256()))
        r, s = utils.decode_dss_signature(der)
        return der if form == "der" else r.to_bytes(32, "big") + s.to_bytes(32, "big")

    kms_module(monkeypatch, sign)
    signer = open_signer(certificate=made.chain, callback="kms_of_tests:sign")
    signer.sign(clip, tmp_path / "out.mp4", title="t", model="m")
    assert read(tmp_path / "out.mp4", made)[0] == "Trusted"


def kms_module(monkeypatch: pytest.MonkeyPatch, sign: Callable[[bytes], bytes]) -> None:
    module = type(sys)("kms_of_tests")
    module.sign = sign  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kms_of_tests", module)


def test_a_callback_that_cannot_sign_is_refused_at_start(
    made: chains.Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(data: bytes) -> bytes:
        raise RuntimeError("the KMS is away")

    kms_module(monkeypatch, away)
    with refuses(UserError, str(made.chain), "the KMS is away"):
        open_signer(certificate=made.chain, callback="kms_of_tests:sign")
    kms_module(monkeypatch, lambda data: b"\1" * 64)
    with refuses(UserError, str(made.chain), "cannot sign"):
        open_signer(certificate=made.chain, callback="kms_of_tests:sign")
    for name in (
        "kms_of_tests",
        "kms_of_tests:nothing",
        "no_such_module:sign",
        "kms_of_tests:__name__",
    ):
        with refuses(UserError, f"'{name}'"):
            open_signer(certificate=made.chain, callback=name)


def test_a_failure_leaves_no_target_and_the_source_as_it_was(
    clip: Path, made: chains.Made, signer: Signer, tmp_path: Path
) -> None:
    folder, before = tmp_path / "out", clip.read_bytes()
    folder.mkdir()
    text = tmp_path / "text.mp4"
    text.write_text("no video")

    def away(data: bytes) -> bytes:
        raise RuntimeError("the KMS is away")

    lying = Signer(signer.chain, callback=lambda data: b"\1" * 64)
    stamped = Signer(signer.chain, key=signer.key, timestamps="http://127.0.0.1:9")
    for one, source, more in (
        (Signer(signer.chain, callback=away), clip, {}),
        (lying, clip, {}),
        (stamped, clip, {}),
        (signer, text, {}),
        (signer, tmp_path / "missing.mp4", {}),
        (signer, clip, {"parent": tmp_path / "missing.mp4", "action": "edit"}),
        (signer, clip, {"action": "remix"}),
        (signer, clip, {"parent": clip}),
        (signer, clip, {"parameters": {"seed": object()}}),
    ):
        with pytest.raises(SigningError):
            one.sign(source, folder / "out.mp4", title="t", model="m", **more)
        assert list(folder.iterdir()) == []
    with refuses(SigningError, "in place"):
        signer.sign(clip, clip, title="t", model="m")
    assert clip.read_bytes() == before


def test_muxing_again_drops_the_manifest(clip: Path, signer: Signer, tmp_path: Path) -> None:
    signed, again = tmp_path / "signed.mp4", tmp_path / "again.mp4"
    signer.sign(clip, signed, title="t", model="m")
    with av.open(str(signed)) as given, av.open(str(again), "w") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    assert c2pa.Reader.try_create(str(again)) is None


def test_an_address_of_a_manifest_in_a_parent_is_not_fetched(signer, clip, tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        xmp = (
            '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
            '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            '<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
            f'dcterms:provenance="http://127.0.0.1:{server.server_port}/inside"/></rdf:RDF></x:xmpmeta>'
        ).encode()
        kind = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
        parent = tmp_path / "parent.mp4"
        box = struct.pack(">I4s", 24 + len(xmp), b"uuid") + kind + xmp
        parent.write_bytes(clip.read_bytes() + box)
        read_manifests(parent)
        signer.sign(clip, tmp_path / "o.mp4", title="o", model="m", action="edit", parent=parent)
        server.shutdown()
    assert asked == []

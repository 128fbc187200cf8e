"""C2PA manifests by c2pa-python: put into a file with a signature, and read back with a validation.

Nothing here needs a network but an authority for time stamps, where one is asked for. Unknown keys of the library's
settings are accepted in silence, so those used here are few, and tests see each of them work.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sora_train.serving.provenance.certificates import USAGES, Chain
from sora_train.serving.provenance.loose_bytes import Damaged, check_form

MP4 = "video/mp4"
PARENT = "parent"
"""The label by which an action names the ingredient that is a video's parent."""
# What every manifest of ours contains twice; a file with remains of it and no manifest has been damaged.
_REMAINS = (b"c2pa.assertions", b"c2pa.signature")
_SCAN_BYTES = 1 << 20
# A file may name an address where its manifest lies, and files are sent by strangers.
_FETCHES_NOTHING = {"remote_manifest_fetch": False, "ocsp_fetch": False}


class ManifestError(Exception):
    """The library refused; the message is its own."""


@dataclass(frozen=True)
class Reading:
    """The manifests of a file as JSON of the library, and what it says of them."""

    state: str
    """Trusted, Valid, Invalid, or None without a manifest."""
    failures: tuple[str, ...]
    store: dict[str, Any]

    @property
    def active(self) -> dict[str, Any]:
        return self.manifest(self.store.get("active_manifest"))

    def manifest(self, label: str | None) -> dict[str, Any]:
        return self.store.get("manifests", {}).get(label, {})


def write_manifest(
    source: Path,
    target: Path,
    manifest: dict[str, Any],
    *,
    chain: Chain,
    key: bytes | None,
    callback: Callable[[bytes], bytes] | None,
    timestamps: str,
    parent: Path | None,
) -> None:
    """Copy `source` to another file with `manifest`, signed by the key or by the callback.

    The parent becomes the ingredient PARENT, and its own manifests come along; one that is no mp4 has none that could,
    and is named alone. Raises ManifestError.
    """
    import c2pa

    # The caller reads the file back, which checks more than the library does by itself.
    settings = {
        "verify": {"verify_trust": False, "verify_after_sign": False} | _FETCHES_NOTHING,
        "trust": {"trust_config": "\n".join(USAGES)},
    }
    if parent is not None and not _is_mp4(parent):
        manifest = manifest | {"ingredients": [_ingredient(parent)]}
    try:
        with (
            _signer(chain, key, callback, timestamps or None) as signer,
            c2pa.Context.from_dict(settings) as context,
            c2pa.Builder(manifest, context=context) as builder,
        ):
            if parent is not None and _is_mp4(parent):
                with open(parent, "rb") as file:
                    builder.add_ingredient(_ingredient(parent), MP4, file)
            with open(source, "rb") as file, open(target, "w+b") as out:
                builder.sign(signer, MP4, file, out)
    except c2pa.C2paError as error:
        raise ManifestError(_words(error)) from error


def _ingredient(parent: Path) -> dict[str, str]:
    kind = MP4 if _is_mp4(parent) else "application/octet-stream"
    title = read_manifests(parent).active.get("title") or parent.name
    return {"title": title, "format": kind, "relationship": "parentOf", "label": PARENT}


def _is_mp4(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8)[4:] == b"ftyp"


def _signer(
    chain: Chain,
    key: bytes | None,
    callback: Callable[[bytes], bytes] | None,
    timestamps: str | None,
) -> Any:
    import c2pa

    if callback is not None:
        algorithm = c2pa.C2paSigningAlg[chain.algorithm.upper()]
        return c2pa.Signer.from_callback(callback, algorithm, chain.pem, timestamps)
    assert key is not None, "a chain signs with its key or by a callback"
    return c2pa.Signer.from_info(
        c2pa.C2paSignerInfo(
            alg=chain.algorithm, sign_cert=chain.pem.encode(), private_key=key, ta_url=timestamps
        )
    )


def read_manifests(path: Path, anchors: str | None = None) -> Reading:
    """The manifests of a file; with `anchors`, PEM of trusted roots, whether the signer leads to one of them.

    What cannot be read at all has no manifest, with the library's words as its failure. Raises OSError where the file
    cannot be opened.
    """
    import c2pa

    settings: dict[str, Any] = {"verify": {"verify_trust": anchors is not None} | _FETCHES_NOTHING}
    settings["trust"] = {"trust_config": "\n".join(USAGES)}
    if anchors is not None:
        settings["trust"]["trust_anchors"] = anchors
    try:
        with open(path, "rb") as file, c2pa.Context.from_dict(settings) as context:
            reader = c2pa.Reader.try_create(MP4, file, context=context)
            if reader is None:
                return _without_manifest(path)
            with reader:
                store = json.loads(reader.json())
                reading = Reading(reader.get_validation_state(), _failures(store), store)
        check_form(path)
        return reading
    except Damaged as error:
        return replace(reading, state="Invalid", failures=(*reading.failures, str(error)))
    except c2pa.C2paError as error:
        told = f"it cannot be read as an mp4 ({_words(error)}); give the video itself, whole"
        return _without_manifest(path, told)


def _without_manifest(path: Path, *failures: str) -> Reading:
    """None, or Invalid where there is a manifest that damage hides from the library."""
    overlap = max(map(len, _REMAINS))
    with open(path, "rb") as file:
        tail = b""
        while block := file.read(_SCAN_BYTES):
            if any(mark in tail + block for mark in _REMAINS):
                return Reading("Invalid", failures or ("a manifest of it is damaged",), {})
            tail = block[-overlap:]
    return Reading("None", failures, {})


def _failures(store: dict[str, Any]) -> tuple[str, ...]:
    """Codes of all that failed, those of the parents behind those of the file itself."""
    results = store.get("validation_results", {})
    statuses = [results.get("activeManifest", {})]
    statuses += [each.get("validationDeltas", {}) for each in results.get("ingredientDeltas", ())]
    return tuple(
        dict.fromkeys(
            failure["code"] for status in statuses for failure in status.get("failure", ())
        )
    )


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Signs a finished video: what made it, how, and out of which other video.

This is the last thing that happens to a file: whatever muxes it again drops the manifest.
"""

from __future__ import annotations

import importlib
import io
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.base.code_version import code_version
from sora_train.base.files import renamed_when_whole
from sora_train.errors import Fault, UserError
from sora_train.serving.provenance.certificates import Chain, dev_files, read_chain, read_key
from sora_train.serving.provenance.manifests import (
    PARENT,
    ManifestError,
    read_manifests,
    write_manifest,
)

AI = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's name of what a trained model made."""
OPERATION = "sora_train.operation"
GENERATOR = "sora_train"

Callback = Callable[[bytes], bytes]


class SigningError(Fault):
    """A video could not be signed, and must not be delivered."""


@dataclass(frozen=True)
class Signer:
    """A chain with its key, or with a function that signs bytes where the key is kept.

    The function answers with the signature of its bytes under the chain's algorithm; for elliptic curves as DER or as
    r and s side by side.
    """

    chain: Chain
    key: bytes | None = None
    callback: Callback | None = None
    timestamps: str = ""
    """Address of an authority for time stamps; without one a manifest counts while the certificate is in date."""

    def sign(
        self,
        source: Path,
        target: Path,
        *,
        title: str,
        model: str,
        action: str = "create",
        parent: Path | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the mp4 `source` to another path with a manifest: created, or opened from `parent` and edited.

        `action` (create, edit, extend, remix) and `parameters` (what JSON can hold) are in the manifest beside the
        model. The target appears whole, and only after it has been read back as valid.

        Raises:
            SigningError: for every reason why it is not there.
        """
        if (action == "create") != (parent is None):
            raise SigningError(
                f"a video that was made by '{action}' has {'no' if parent else 'a'} parent"
            )
        if target.exists() and target.samefile(source):
            raise SigningError(f"{source} cannot be signed in place; give another target")
        manifest = _manifest(
            title,
            {"model": model, OPERATION: action, **(parameters or {})},
            edited=parent is not None,
        )
        failures: list[Exception] = []
        try:
            with renamed_when_whole(target) as partial:
                write_manifest(
                    source,
                    partial,
                    manifest,
                    chain=self.chain,
                    key=self.key,
                    callback=self.callback and _remembering(self.callback, failures),
                    timestamps=self.timestamps,
                    parent=parent,
                )
                _check(partial, edited=parent is not None)
        except (ManifestError, OSError, ValueError, TypeError) as error:
            cause = failures[0] if failures else error
            raise SigningError(f"{source.name} could not be signed: {cause}") from cause


def open_signer(
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    callback: str = "",
    timestamps: str = "",
    dev_folder: Path | None = None,
) -> Signer:
    """The signer that the settings describe, after it has signed a clip for trial.

    It has a certificate with its key, a certificate with `callback`, `package.module:function` of a KMS, or nothing but
    the folder of a development chain, which is made there.

    Raises:
        UserError: other combinations, and whatever would keep it from signing videos.
    """
    if dev_folder is not None:
        if certificate or key or callback:
            raise UserError(
                "the development chain signs in place of a certificate of your own: give one of the two"
            )
        files = dev_files(dev_folder)
        certificate, key = files.chain, files.key
    if certificate is None:
        raise UserError(
            "a signer has a certificate: give its PEM file, or ask for the development chain"
        )
    if bool(key) == bool(callback):
        raise UserError(
            f"the certificate {certificate} signs with the file of its key or with a KMS callback: give one of the two"
        )
    chain = read_chain(certificate)
    signer = Signer(
        chain,
        key=read_key(key, chain) if key else None,
        callback=_function(callback) if callback else None,
        timestamps=timestamps,
    )
    _try(signer, certificate)
    return signer


def _function(name: str) -> Callback:
    """The function that `package.module:function` names. Raises UserError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        function = (
            getattr(importlib.import_module(module), attribute) if module and attribute else None
        )
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the KMS callback '{name}' cannot be imported: {error}; check its name"
        ) from error
    if not callable(function):
        raise UserError(f"the KMS callback '{name}' is no function: write package.module:function")
    return function


def _try(signer: Signer, certificate: Path) -> None:
    """Sign a still of 16 pixels. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.mp4")
        source.write_bytes(_small_mp4())
        try:
            signer.sign(source, Path(folder, "signed.mp4"), title="trial", model="")
        except SigningError as error:
            raise UserError(
                f"the certificate {certificate} cannot sign: {error}; check it, its key and the KMS"
            ) from error


def _small_mp4() -> bytes:
    import numpy as np

    from sora_train.data.decode.video_io import encode_h264

    file = io.BytesIO()
    encode_h264(np.zeros((1, 16, 16, 3), np.uint8), 1.0, file)
    return file.getvalue()


def _manifest(title: str, parameters: Mapping[str, Any], *, edited: bool) -> dict[str, Any]:
    version = code_version()["package"] or "0"
    generator = {"name": GENERATOR, "version": version}
    made = {
        "action": "c2pa.edited" if edited else "c2pa.created",
        "digitalSourceType": AI,
        "softwareAgent": generator,
        "parameters": dict(parameters),
    }
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": [PARENT]}}
    actions = [opened, made] if edited else [made]
    return {
        "claim_generator_info": [generator],
        "title": title,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }


def _remembering(function: Callback, failures: list[Exception]) -> Callback:
    """The library tells nothing of what a callback raises; here it is kept for the message."""

    def call(data: bytes) -> bytes:
        try:
            return function(data)
        except Exception as error:
            failures.append(error)
            raise

    return call


def _check(path: Path, *, edited: bool) -> None:
    """Read a signed file back. Raises ManifestError."""
    reading = read_manifests(path)
    if reading.state not in ("Valid", "Trusted"):
        raise ManifestError(f"it was read back as {reading.state} ({', '.join(reading.failures)})")
    if edited and not reading.active.get("ingredients"):
        raise ManifestError("its parent is not in the manifest that was read back")

"""What stored latents and embeddings were made with, kept as `cache.json` beside them, and compared.

Keys of entries name all of it already, so a wrong entry is never used. The comparison is for a folder
that took days to fill: after a changed setting none of its entries would be used, and the user must
know before it is filled a second time.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from sora_train.base.files import renamed_when_whole
from sora_train.data.storage.remote import is_remote
from sora_train.data.transforms import TRANSFORM_VERSION
from sora_train.errors import UserError

FILE_NAME = "cache.json"

Section = dict[str, str]
Made = dict[str, Section]
"""The value of each part, by section (`latents`, `text`, ...)."""


def decoder_name(backend: str) -> str:
    """A decoder and the versions that its pixels depend on."""
    if backend != "pyav":
        try:
            return f"{backend} {importlib.metadata.version(backend)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{backend} (not installed)"
    import av

    versions = {name: av.library_versions[name][0] for name in ("libavcodec", "libswscale")}
    return f"pyav with {', '.join(f'{name} {major}' for name, major in versions.items())}"


def latents_made_with(vae_digest: str, vae_dtype: str, decoder: str) -> Section:
    """The section `latents`: what every entry of a folder has in common."""
    return {
        "VAE": vae_digest,
        "vae.dtype": vae_dtype,
        "decoder": decoder,
        "transform": str(TRANSFORM_VERSION),
    }


def text_made_with(text_digest: str, padding: str, longest: int) -> Section:
    """The section `text`."""
    return {"text encoder": text_digest, "text.padding": padding, "text.max_length": str(longest)}


def read_made_with(folder: Path | str) -> Made:
    """The `cache.json` of a folder; {} where it has none. Raises UserError where it cannot be read."""
    file = Path(folder) / FILE_NAME
    try:
        sections = json.loads(file.read_text(encoding="utf-8"))
        return {
            str(name): {str(part): str(value) for part, value in section.items()}
            for name, section in sections.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); name another folder, or remove this file if you know that the folder "
            "belongs to these settings"
        ) from error


def shard_made_with(path: str) -> Made:
    """The `cache.json` beside a local shard; {} for a remote one."""
    return {} if is_remote(path) else read_made_with(Path(path).parent)


def write_made_with(folder: Path | str, made: Mapping[str, Section]) -> None:
    """Write sections of `cache.json`; its other sections stay."""
    sections = {**read_made_with(folder), **made}
    with renamed_when_whole(Path(folder) / FILE_NAME) as partial:
        partial.write_text(json.dumps(sections, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def differences(there: Mapping[str, Section], now: Mapping[str, Section]) -> str:
    """A table of the parts that differ, for sections that both have; '' where none does."""
    rows = [("part", "there", "now")]
    for name in now:
        if name not in there:
            continue
        for part in dict.fromkeys([*there[name], *now[name]]):
            values = there[name].get(part, "unknown"), now[name].get(part, "unknown")
            if values[0] != values[1]:
                rows.append((part, *values))
    if len(rows) == 1:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"  {part:<{widths[0]}}  {before:<{widths[1]}}  {after}" for part, before, after in rows
    )


def require_same(folder: Path | str, now: Mapping[str, Section], key: str) -> None:
    """Raise UserError with both values of every part in which a folder that `key` names differs."""
    table = differences(read_made_with(folder), now)
    if table:
        raise UserError(
            f"{key}={folder} was filled with other settings than these, so nothing in it could be used; name another "
            f"folder, or restore what differs:\n{table}"
        )

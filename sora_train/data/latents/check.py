"""Checks before step 1 that the latents and embeddings in the shards are those that this run would make.

Rows of the manifest's column `members` mostly differ in byte ranges and captions alone. So one row of
each distinct description is checked, which takes seconds for a million rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from sora_train.data.latents.members import stored_of
from sora_train.data.latents.provenance import Made, Section, differences, shard_made_with
from sora_train.data.manifest import Manifest
from sora_train.errors import UserError

_CAPTION = '"caption_digest": "'
_CAPTION_END = len(_CAPTION) + 32


def first_of_each(members: np.ndarray, rows: Sequence[int]) -> list[int]:
    """The first row of each distinct description among `rows` that have one."""
    first: dict[str, int] = {}
    for row, text in zip(rows, members[np.asarray(rows, int)].tolist(), strict=True):
        if text:
            # Byte ranges come first and are lists; the descriptions follow in braces.
            begin, caption = max(0, text.find("{", 1)), text.rfind(_CAPTION)
            end = len(text) if caption < 0 else caption
            first.setdefault(text[begin:end] + text[end + _CAPTION_END :], row)
    return list(first.values())


def require_latents(
    manifest: Manifest,
    rows: Iterable[int],
    vae_digest: str,
    latent_shape: Callable[[int, int, int], tuple[int, ...]],
    *,
    drawn: bool = False,
    now: Mapping[str, Section] | None = None,
) -> None:
    """Raise UserError where stored latents of these rows are another VAE's, or cannot be `drawn` from.

    `now` is what this run's own would be made with.
    """
    for row in rows:
        latents, _ = stored_of(manifest.members[row])
        if latents is None:
            continue
        where = f"the latents of {manifest.key[row]!r} in {manifest.path(row)}"
        if latents.vae_digest != vae_digest:
            raise UserError(
                f"{where} were made by the VAE {latents.vae_digest}, this run's is {vae_digest}: give vae.path the "
                "VAE that made them, encode the clips again with `sora data encode`, or set "
                "data.stored_latents=ignore to train from the clips where there are any"
                + _table(manifest.path(row), "latents", {"VAE": latents.vae_digest}, now)
            )
        if drawn and not latents.logvar:
            raise UserError(
                f"{where} have no log-variance, which data.latents=sample draws by: set data.latents=mode, or encode "
                "the clips again with `sora data encode data.latents=sample`"
            )
        pixels = latents.pixels
        shape = latent_shape(pixels.frames, pixels.height, pixels.width)
        if latents.shape != shape:
            raise UserError(
                f"{where} have the shape {list(latents.shape)} where this VAE gives {list(shape)} for {pixels.name}; "
                "encode the clips again with `sora data encode`"
            )


def refuse_latents(manifest: Manifest, rows: Iterable[int], instead: str) -> None:
    """Raise UserError where these rows hold latents, in a run that gives frames encoded from pixels; `instead` is what
    can be trained on latents."""
    members = manifest.members
    for row in rows:
        if members[row] and stored_of(members[row])[0] is not None:
            raise UserError(
                f"{manifest.key[row]!r} in {manifest.path(row)} holds latents, and objective.conditioning gives "
                "frames that are encoded from pixels of their own; set data.stored_latents=ignore to train from the "
                f"clips, or {instead}"
            )


def require_text(
    manifest: Manifest,
    rows: Iterable[int],
    encoder_digest: str,
    trainable: bool,
    longest: int,
    *,
    now: Mapping[str, Section] | None = None,
) -> None:
    """Raise UserError where stored embeddings of these rows cannot replace the run's own."""
    for row in rows:
        _, text = stored_of(manifest.members[row])
        if text is None:
            continue
        where = f"the caption embedding of {manifest.key[row]!r} in {manifest.path(row)}"
        if trainable:
            raise UserError(
                f"{where} cannot be used, because text.trainable=true changes the encoder that made it; set "
                "data.stored_text=ignore to encode captions in the run, or text.trainable=false"
            )
        if text.text_digest != encoder_digest:
            raise UserError(
                f"{where} was made by the text encoder {text.text_digest}, this run's is {encoder_digest}: restore "
                "the text section and the seed it was encoded with, encode again with `sora data encode`, or set "
                "data.stored_text=ignore"
                + _table(manifest.path(row), "text", {"text encoder": text.text_digest}, now)
            )
        if text.shape[0] > longest:
            raise UserError(
                f"{where} has {text.shape[0]} tokens, more than text.max_length={longest}; encode again with "
                "`sora data encode`, or set data.stored_text=ignore"
            )


def _table(path: str, section: str, stored: Section, now: Mapping[str, Section] | None) -> str:
    """The parts in which a shard differs from this run, by its `cache.json` and the members' metadata."""
    if now is None or section not in now:
        return ""
    there: Made = {section: {**shard_made_with(path).get(section, {}), **stored}}
    # Shards made elsewhere name few parts; those they leave open do not differ.
    known = {section: {part: now[section][part] for part in now[section] if part in there[section]}}
    table = differences(there, known)
    return f"\n{table}" if table else ""

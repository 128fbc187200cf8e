"""Lists a webdataset tar without reading the clips in it: where each begins, and its caption.

Samples that cannot be used are listed too, with the reason: a key without a clip, an empty member, a
member that occurs twice, a tar that is cut off. A fault of the shard itself is a sample of the empty key.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sora_train.base.text import NotText, decode_text, printable
from sora_train.data.captions.texts import (
    MAIN,
    Fields,
    Named,
    caption_of_file,
    dumped,
    known_scores,
    named_by,
    text_or_fields,
    told,
    with_main,
)
from sora_train.data.index.kinds import is_further, media_kind
from sora_train.data.latents import members as stored
from sora_train.data.storage.ranges import ByteRange, StorageFault
from sora_train.errors import UserError

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BAD_CAPTION, BAD_NAME = "bad_caption", "bad_name"
# A larger member is no caption, whatever its name.
MAX_CAPTION_BYTES = 1 << 20
# Webdataset's own expression. A name that does not match (`noext`, `._copy.mp4`) belongs to no sample.
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")
_BLOCK = 512
_NO_CLIP = (True, True, True)


@dataclass(frozen=True)
class MemberKeys:
    """The extensions of the clip and of its captions.

    `video`: extensions of clips, empty for any known one. `captions`: extensions (`txt`, `short.txt`) or
    fields of a JSON member (`json:caption.long`); the first that occurs counts. `short=txt` names a
    further caption beside the main one.
    """

    video: tuple[str, ...] = ()
    captions: tuple[str, ...] = ("txt", "json")

    @property
    def text_extensions(self) -> set[str]:
        return {"json", *(caption_name(key)[1].partition(":")[0].lower() for key in self.captions)}


@dataclass
class TarSample:
    """The members of one key: the clip's byte range, the texts of its captions, and why it cannot be used.

    `lacks` says why it has no caption.
    """

    key: str
    name: str = ""
    kind: str = ""
    offset: int = 0
    length: int = 0
    reason: str = ""
    detail: str = ""
    extensions: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    caption: str = ""
    captions: str = ""
    scores: str = ""
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    descriptions: dict[str, dict[str, Any]] = field(default_factory=dict)
    damage: str = ""
    digest: str = ""
    bad_text: str = ""
    text_again: str = ""
    lacks: str = ""

    @property
    def members(self) -> str:
        """The manifest's column of that name: byte ranges and descriptions of latents and text."""
        return stored.as_members(self.places, self.descriptions)


@dataclass(frozen=True)
class ListRequest:
    """Asks a decode process for the samples of a tar of `length` bytes."""

    row: int
    key: str
    path: str
    offset: int
    length: int
    members: MemberKeys


@dataclass(frozen=True)
class Listing:
    """The samples of a tar, or the compression that hides them."""

    samples: list[TarSample]
    compressed: str = ""


def split_name(name: str) -> tuple[str, str]:
    """Webdataset's key and extension: the file's name is split at its first dot; ('', '') where it has none."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def caption_name(key: str) -> tuple[str, str]:
    """A caption key's name and place: `short=json:caption.short` names one, `txt` is a place of the main one."""
    before, equals, place = key.partition("=")
    return (before, place) if equals and ":" not in before else (MAIN, key)


def caption_of(texts: dict[str, str], keys: Sequence[str]) -> str:
    """The first text that `keys` name among a sample's text members, '' where there is none."""
    captions = (caption for key in keys for caption in _captions_at(texts, key))
    return next((caption for caption in captions if isinstance(caption, str)), "")


def captions_of(texts: dict[str, str], keys: Sequence[str]) -> tuple[str, str]:
    """The manifest's columns `caption` and `captions`: what `keys` name among a sample's text members.

    A plain `json` also takes every caption of the `captions` object that the member holds.
    """
    named: Named = {}
    main: list[str] = []
    for name, place in map(caption_name, keys):
        if name == MAIN:
            main.append(place)
        elif captions := _captions_at(texts, place):
            named.setdefault(name, captions[0])
    if "json" in (place.lower() for place in main):
        named = {**named_by(_json_member(texts).get("captions")), **named}
    return with_main(caption_of(texts, main), named)


def scores_of(texts: dict[str, str]) -> str:
    """The manifest's column `scores`: the numbers of the `scores` object of the JSON member."""
    return dumped(known_scores(_json_member(texts).get("scores")))


def _captions_at(texts: dict[str, str], place: str) -> list[str | Fields]:
    """The captions, texts or fields, at a place such as `txt` or `json:caption.long`."""
    return [caption for value in _values_at(texts, place) if (caption := text_or_fields(value))]


def _values_at(texts: dict[str, str], place: str) -> list[object]:
    """What stands at a place, captions or not."""
    extension, _, path = place.partition(":")
    extension = extension.lower()
    if extension.rsplit(".", 1)[-1] != "json":
        return [caption_of_file(texts.get(extension, ""))]
    values: list[object] = []
    for steps in [path] if path else ["caption", "text"]:
        value: Any = _json_member(texts, extension)
        for step in steps.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        values.append(value)
    return values


def _without_caption(texts: dict[str, str], keys: Sequence[str]) -> str:
    """Why `keys` name no main caption: what stands at a place of one, or that nothing does."""
    places = [place for name, place in map(caption_name, keys) if name == MAIN]
    found = [
        f"{place} holds {told(value)}"
        for place in places
        for value in _values_at(texts, place)
        if not (value is None or isinstance(value, str))
    ]
    return "; ".join([f"none under {', '.join(keys)}", *found[:1]])


def _json_member(texts: dict[str, str], extension: str = "json") -> dict[str, Any]:
    """The object that a JSON member holds, an empty one where it holds none."""
    try:
        value = json.loads(texts.get(extension) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def compression(head: bytes) -> str:
    """The name of the compression a file begins with, '' for none."""
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")


def compressed_error(path: object, packed: str = "") -> UserError:
    """The error about a compressed tar; `packed` is the compression of one that is named as a plain tar."""
    kind = (
        f"is compressed ({packed}) under the name of a plain tar"
        if packed
        else "is a compressed tar"
    )
    return UserError(
        f"{path} {kind}, in which no clip can be found without unpacking all before it; unpack it first "
        "(`gunzip`, `zstd -d`: video does not shrink) and use the .tar file"
    )


def list_tar(path: Path) -> list[TarSample]:
    """The samples of a local tar in its order, keys without a clip too.

    A clip that the end of the file cuts off is listed with its reason, a damage of the tar itself under
    the empty key. Raises UserError on a compressed tar, on a file that is no tar, and on two clips of one key.
    """
    size = path.stat().st_size
    with ByteRange(str(path), 0, size) as file:
        packed = compression(file.read(8) or b"")
        if packed:
            raise compressed_error(path, packed)
        samples = list_shard(file, size, path.name, MemberKeys())
    for sample in samples:
        if sample.reason in ("not_a_tar", "empty_shard"):
            raise UserError(
                f"{path} is not a tar file ({sample.detail}); remove it or make it again"
            )
        if sample.reason in ("ambiguous_clip", "duplicate_key"):
            raise UserError(
                f"{path} holds two clips under the key {sample.key!r} ({sample.detail}); give each its own"
            )
    return samples


def list_shard(file: Any, size: int, name: str, keys: MemberKeys) -> list[TarSample]:
    """Every sample of a tar open as `file` (a ByteRange or RemoteRange of `size` bytes), usable or not.

    Details of failures call the shard `name`. Raises StorageFault.
    """
    if size == 0:
        return [TarSample("", reason="empty_shard", detail=f"the shard {name} holds no byte")]
    samples: dict[str, TarSample] = {}
    again: list[TarSample] = []
    end = 0
    tar = None
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.offset_data < end:
                    raise tarfile.ReadError(f"the header before byte {end} is damaged")
                # The size of a sparse file counts its holes, which are not in the tar.
                stored_bytes = 0 if member.issparse() else member.size
                end = member.offset_data + -(-stored_bytes // _BLOCK) * _BLOCK
                if member.isfile() or member.islnk() or member.issym():
                    _add(tar, member, size, samples, again, keys)
        reason, detail = _bad_end(file, tar.offset)
    # A damaged header of its own kind (PAX, sparse) raises what parsing it comes upon.
    except (tarfile.TarError, ValueError, IndexError, OverflowError) as error:
        if tar is None:
            return [TarSample("", reason="not_a_tar", detail=f"the shard {name}: {error}")]
        reason, detail = ("shard_cut" if end > size else "shard_damaged"), str(error)
    except OSError as error:
        raise StorageFault(file.fault or f"{name}: {error.strerror or error}") from error
    twice = {sample.key for sample in again}
    for sample in samples.values():
        # Where the clip is there again too, the second text is that one's.
        if sample.key not in twice:
            sample.bad_text = sample.bad_text or sample.text_again
    listed = [*(_judged(sample, keys, name) for sample in samples.values()), *again]
    if reason and not any(sample.reason == "shard_cut" for sample in listed):
        listed.append(TarSample("", reason=reason, detail=f"the shard {name}: {detail}"))
    return listed


def _bad_end(file: Any, offset: int) -> tuple[str, str]:
    """Reason and detail where the tar's members end without an end mark, else two ''."""
    file.seek(offset)
    block = file.read(_BLOCK) or b""
    if len(block) < _BLOCK:
        return "shard_cut", "it is cut off, its end mark is missing"
    if block.strip(b"\0"):
        return (
            "shard_damaged",
            f"the header at byte {offset} is damaged, so the members after it cannot be read",
        )
    return "", ""


def _add(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    size: int,
    samples: dict[str, TarSample],
    again: list[TarSample],
    keys: MemberKeys,
) -> None:
    key, extension = split_name(member.name)
    if not key:
        return
    sample = samples.setdefault(key, TarSample(key))
    whole = member.offset_data + member.size <= size
    kind = media_kind(member.name) if not keys.video else ""
    if extension in keys.video:
        kind = media_kind(member.name) or "video"
    reason = "shard_cut" if not whole else "empty_member" if member.size == 0 else ""
    elsewhere = _elsewhere(member)
    if elsewhere:
        reason = "unreadable"
    if sample.kind and is_further(member.name) and not is_further(sample.name):
        kind = ""  # a preview beside the clip
    place: dict[str, Any] = {
        "name": member.name,
        "kind": kind,
        "offset": member.offset_data,
        "length": member.size,
    }
    before = _rank(sample.name, sample.kind) if sample.kind else _NO_CLIP
    if kind and extension in sample.extensions:
        detail = f"{member.name} is in the shard before"
        again.append(TarSample(key, **place, reason="duplicate_key", detail=detail))
    elif kind and _rank(member.name, kind) < before:
        samples[key] = replace(sample, **place, reason=reason, detail=elsewhere)
    elif kind and _rank(member.name, kind) == before:
        sample.reason = "ambiguous_clip"
        sample.detail = f"{sample.name}, {member.name}: choose one with video_key="
    elif elsewhere and extension in (stored.LATENTS, stored.TEXT):
        sample.damage = elsewhere
    elif elsewhere and extension in keys.text_extensions:
        sample.bad_text = elsewhere
    elif extension in keys.text_extensions and extension in sample.extensions:
        sample.text_again = f"{printable(member.name)} is in the shard before"
    elif extension in (stored.LATENTS, stored.TEXT):
        _add_stored(tar, member, extension, sample, whole)
    elif whole and extension in keys.text_extensions and member.size <= MAX_CAPTION_BYTES:
        data = tar.extractfile(member)
        assert data is not None, "a regular member can be read"
        try:
            sample.texts[extension] = decode_text(data.read(), printable(member.name))
        except NotText as error:
            sample.bad_text = sample.bad_text or str(error)
    samples[key].extensions.append(extension)


def _elsewhere(member: tarfile.TarInfo) -> str:
    """Why a member's bytes do not lie behind its header, '' where they do."""
    name = printable(member.name)
    if member.issparse():
        return f"{name} is a sparse file in the tar; make it without `-S`"
    if member.isfile():
        return ""
    target = printable(member.linkname)
    return (
        f"{name} is a link to {target} in the tar; make it with `--dereference --hard-dereference`"
    )


def _rank(name: str, kind: str) -> tuple[bool, ...]:
    """What is the clip of several members: a video before an image, and both before a rarer kind, as of a preview."""
    return is_further(name), kind == "image"


def _add_stored(
    tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: TarSample, whole: bool
) -> None:
    """Add the place of latents or an embedding and what their header says, or their damage."""
    if extension in sample.places:
        sample.damage = f"{member.name} is in the shard before"
    elif not whole:
        sample.damage = f"the shard is cut off inside {member.name}"
    else:
        data = tar.extractfile(member)
        assert data is not None, "a regular member can be read"

        def read(offset: int, count: int) -> bytes:
            data.seek(offset)
            return data.read(count)

        try:
            sample.descriptions[extension] = stored.describe(read, member.size, extension)
            sample.places[extension] = (member.offset_data, member.size)
        except stored.DamagedMember as error:
            sample.damage = f"{member.name}: {error}"
            return
        if extension == stored.LATENTS:
            sample.digest = stored.digest(read, member.size)


def _judged(sample: TarSample, keys: MemberKeys, shard: str) -> TarSample:
    """The sample with its captions and scores, and the reason and detail where it cannot be used."""
    bad_text = sample.bad_text or _bad_json(sample)
    try:
        if not bad_text:
            sample.caption, sample.captions = captions_of(sample.texts, keys.captions)
            sample.scores = scores_of(sample.texts)
    except NotText as error:
        bad_text = f"{printable(sample.key)}: {error}"
    if not sample.caption:
        sample.lacks = _without_caption(sample.texts, keys.captions)
    sample.texts = {}
    members = ", ".join(sample.extensions) or "none"
    if not sample.kind and stored.LATENTS in sample.extensions:
        sample.kind, sample.name = stored.KIND, f"{sample.key}.{stored.LATENTS}"
        sample.offset, sample.length = sample.places.get(stored.LATENTS, (0, 0))
    if sample.damage and not sample.reason:
        sample.reason, sample.detail = "stored_damaged", sample.damage
    elif not sample.kind:
        sample.reason = "missing_clip"
        sample.detail = f"the members of the key are {members}"
    elif sample.reason == "shard_cut":
        sample.detail = f"the shard {shard} is cut off inside the clip"
    elif sample.reason == "empty_member":
        sample.detail = f"{sample.name} holds no byte"
    if printable(sample.key + sample.name) != sample.key + sample.name:
        sample.key, sample.name = printable(sample.key), printable(sample.name)
        sample.reason, sample.detail = BAD_NAME, "the name in the tar is no UTF-8; make it again"
    elif bad_text and not sample.reason:
        sample.reason, sample.detail = BAD_CAPTION, bad_text
    return sample


def _bad_json(sample: TarSample) -> str:
    """What is wrong with a JSON member, '' for nothing."""
    for extension, text in sample.texts.items():
        if extension.rpartition(".")[2] == "json" and text.strip():
            try:
                json.loads(text)
            except (ValueError, RecursionError) as error:
                return f"{printable(sample.key)}.{extension} is not JSON: {error}"
    return ""

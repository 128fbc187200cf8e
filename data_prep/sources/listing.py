"""Every source of an input, whatever form it has; nothing is left out without a reason."""

from __future__ import annotations

import glob
import os
from dataclasses import replace
from pathlib import Path

from data_prep.sources.curated import is_curated, list_curated
from data_prep.sources.source import Source, file_source
from data_prep.sources.tables import list_names, list_table, said_of
from sora_train.data.captions.tables import TABLE_SUFFIXES
from sora_train.data.index.kinds import media_kind
from sora_train.data.index.listing import Member, list_source
from sora_train.data.index.walk import plain
from sora_train.data.storage.remote import expand, filesystem, is_remote
from sora_train.errors import UserError


def list_sources(given: str, captions: str = "", follow_links: bool = False) -> list[Source]:
    """The sources of `given` in a stable order, each key once. `captions` is a table for a folder.

    Raises UserError where it does not exist, holds no footage, or names a source twice.
    """
    sources = _listed(given, captions, follow_links)
    if not sources:
        raise UserError(
            f"input={given} holds no footage: no file whose extension is that of a video or an image"
        )
    seen: set[str] = set()
    for source in sources:
        if source.key in seen:
            raise UserError(
                f"input={given} names {source.key!r} twice; keep one, or give each a range of its own (columns begin "
                "and end)"
            )
        seen.add(source.key)
    return sources


def _listed(given: str, captions: str, follow_links: bool) -> list[Source]:
    path = Path(given).expanduser()
    if is_remote(given):
        return _remote(given)
    if path.is_dir():
        return list_curated(path) if is_curated(path) else _folder(path, captions, follow_links)
    if captions:
        raise UserError(f"ingest.captions={captions} is for a folder, and input={given} is none")
    if path.is_file():
        return _file(path)
    if any(mark in given for mark in "*?[{"):
        names = [name for one in _braces(given) for name in sorted(glob.glob(one, recursive=True))]
        return [file_source(name, name) for name in names if media_kind(name)]
    raise UserError(f"input={given} does not exist; give a folder, a list or a table of videos")


def _file(path: Path) -> list[Source]:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return list_table(path)
    if suffix == ".txt":
        return list_names(path)
    if suffix == ".tar":
        return [_of_member(member, path.parent) for member in _tar(path)]
    if media_kind(path.name):
        return [file_source(path.name, str(path))]
    raise UserError(
        f"input={path} is neither a video nor a list (.txt) or table ({', '.join(TABLE_SUFFIXES)}) of them"
    )


def _folder(path: Path, captions: str, follow_links: bool) -> list[Source]:
    try:
        listed = list_source(path, captions)
    except UserError as error:
        words = (
            str(error)
            .replace("data.source=", "input=")
            .replace("data.captions=", "ingest.captions=")
        )
        raise UserError(words) from error
    root = os.path.realpath(path)
    sources = [_of_member(member, listed.root) for member in listed.members]
    if table := _table_of(path, captions):
        said = said_of(table, path)
        nothing = ("", "")
        sources = [
            replace(source, licence=licence, provenance=provenance)
            for source in sources
            for licence, provenance in [said.get(plain(source.key), nothing)]
        ]
    return sources if follow_links else [_inside(source, root) for source in sources]


def _table_of(folder: Path, captions: str) -> Path | None:
    """The table of captions of a folder, given or in it."""
    if captions:
        return Path(captions).expanduser()
    there = (folder / f"captions{suffix}" for suffix in TABLE_SUFFIXES)
    return next((path for path in there if path.exists()), None)


def _inside(source: Source, root: str) -> Source:
    """A source as it is; with a reason where it is a link to something outside the folder."""
    # `path` is where the bytes really are.
    if not source.path or source.path.startswith(root.rstrip("/") + "/"):
        return source
    return replace(
        source,
        path="",
        drop_reason="link_outside",
        drop_detail=f"a link to {source.path}, outside of the input; ingest.follow_links=true takes it",
    )


def _of_member(member: Member, root: Path) -> Source:
    """A source of a clip as the index of training lists it: a loose file, or the member of a tar."""
    is_loose = member.key == member.shard
    source = (
        file_source(member.key, str(root / member.shard)) if member.shard else Source(member.key)
    )
    source = replace(
        source,
        kind=member.kind or source.kind,
        given_caption=member.caption,
        given_captions=member.captions,
    )
    if not is_loose and member.shard:
        key = f"{member.shard}/{member.key}"
        source = replace(source, key=key, offset=member.offset, length=member.length)
    if member.fault:
        reason = member.reason or "unreadable"
        return replace(source, drop_reason=reason, drop_detail=member.fault)
    if source.kind not in ("video", "image"):
        return replace(
            source, drop_reason="no_footage", drop_detail=f"it is {source.kind or 'no clip'}"
        )
    return source


def _tar(path: Path) -> list[Member]:
    from sora_train.data.index.tars import list_tar

    return [Member.of_sample(path.name, sample) for sample in list_tar(path)]


def _remote(given: str) -> list[Source]:
    """The files at an address: one, those of a pattern, or all below a folder."""
    if any(mark in given for mark in "*?{"):
        names = expand(given)
    elif media_kind(given.partition("?")[0]):
        names = [given]
    else:
        system = filesystem(given)
        try:
            names = [system.unstrip_protocol(name) for name in sorted(system.find(given))]
        # Each protocol's client raises its own exceptions.
        except Exception as error:
            raise UserError(f"input={given} cannot be listed: {error}") from error
    return [file_source(name, name) for name in names if media_kind(name.partition("?")[0])]


def _braces(pattern: str) -> list[str]:
    return expand(pattern) if "{" in pattern else [pattern]

"""Indexes webdataset tars made elsewhere, local or remote: what `sora data index` does with shards.

All shards are listed first, which is cheap and finds mistakes in the command; then every clip is probed.
The rows of a shard are kept beside the output as soon as they are complete, so an interrupted command
continues where it stopped, and several machines can each do a part. The manifest is written whole at
the end. Rows of an existing manifest keep their places; those of new shards follow.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sora_train.data.decode.pool import DecodePool
from sora_train.data.index.decoders import measured
from sora_train.data.index.folder import CHECK_THREADS, Progress, begin_probe, member_row
from sora_train.data.index.kinds import media_kind
from sora_train.data.index.listing import Member, require_name, require_one_kind
from sora_train.data.index.tars import (
    COMPRESSED_SUFFIXES,
    Listing,
    ListRequest,
    MemberKeys,
    TarSample,
    compressed_error,
)
from sora_train.data.index.walk import walk
from sora_train.data.manifest import FILE_NAME, Manifest, Stamp
from sora_train.data.sample import Failure
from sora_train.data.storage.ranges import StorageFault
from sora_train.data.storage.remote import (
    MISSING,
    common_root,
    expand,
    fingerprint,
    is_remote,
    size_of,
)
from sora_train.errors import Fault, UserError

PARTS_FOLDER = ".manifest.parts"
PARTS_VERSION = "5"
# A server that stalls is given up after some attempts; the child process must outlive them.
REMOTE_SECONDS = 180.0
LIST_SECONDS = 1800.0
# Probes begun ahead for each process: enough to keep it busy, few enough to bound memory.
AHEAD = 16

Listed = list[tuple["Shard", list[TarSample]]]


@dataclass(frozen=True)
class HowToIndex:
    """The options that decide which rows a shard gives. `probe` is `decode`, `packets` or `header`."""

    members: MemberKeys = MemberKeys()
    probe: str = "decode"
    allow_empty_captions: bool = False
    timeout: float = 60.0


@dataclass(frozen=True)
class Shard:
    """A shard to be indexed: its name in the manifest, its path, its size and fingerprint."""

    name: str
    path: str
    stamp: Stamp

    def kept_as(self, folder: Path, how: HowToIndex) -> Path:
        """The file that keeps its rows until the manifest is written; its name depends on shard and options."""
        state = repr((PARTS_VERSION, self.name, self.stamp, asdict(how)))
        return folder / f"{hashlib.sha256(state.encode()).hexdigest()[:24]}.parquet"


def index_shards(
    source: str,
    output: Path,
    how: HowToIndex,
    *,
    workers: int = 2,
    duplicate_keys: str = "refuse",
    part: str = "",
    merge: bool = False,
    progress: Progress | None = None,
) -> Manifest | None:
    """Index the shards that `source` names into `output`/manifest.parquet; None where only a part was done.

    `duplicate_keys` is `refuse`, `drop` or `per_shard`, `part` is `i/N`; with `merge` no shard is
    read. `progress(done, total)` counts clips. Raises UserError on names that are no shards, members
    that do not occur, duplicate keys and shards that changed since they were indexed, Fault where
    storage fails.
    """
    output = output.expanduser()
    file = output / FILE_NAME
    known = Manifest.load(file) if file.exists() else None
    names = _shard_names(source)
    root = known.root if known else common_root(names)
    new = _new_shards(_stamped(names, root), known, file)
    folder = output / PARTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    mine = new
    if part:
        number, count = map(int, part.split("/"))
        mine = new[number - 1 :: count]
    todo = [shard for shard in mine if not shard.kept_as(folder, how).exists()]
    if merge and todo:
        raise UserError(
            f"{len(todo)} of {len(new)} shards are not indexed yet, first {todo[0].name}; run the missing part=, "
            "or leave merge out"
        )
    if todo:
        _probe_shards(todo, folder, how, workers, duplicate_keys, progress)
    if part:
        return None
    parts = [Manifest.load(shard.kept_as(folder, how), root=folder) for shard in new]
    stamps = {shard.name: shard.stamp for shard in new}
    if known is None:
        merged = Manifest.joined(parts, root, stamps)
    elif new:
        stamps = {**known.shards, **stamps}
        merged = Manifest.joined([known, *parts], root, stamps, known.revision + 1)
    else:
        merged = known
    merged = _unique(merged, duplicate_keys)
    if new:
        if known:
            # The runs that were trained on the manifest as it is now may still ask for it.
            kept = file.with_name(f"{file.stem}.{known.revision}.parquet")
            if not kept.exists():
                os.link(file, kept)
        measured(merged, how.timeout, show=progress is not None).save(file)
    shutil.rmtree(folder, ignore_errors=True)
    return merged


def is_shards(source: str) -> bool:
    """Whether a source names shards rather than a folder or a table."""
    path = source.partition("?")[0].lower()
    return (
        is_remote(source)
        or any(mark in source for mark in "{*")
        or path.endswith((".tar", *COMPRESSED_SUFFIXES))
    )


def _shard_names(source: str) -> list[str]:
    """The shards that a source names. Raises UserError on none, compressed ones, and one named twice."""
    folder = Path(source).expanduser()
    if not is_shards(source) and folder.is_dir():
        files = walk(folder).names
        names = [
            str(folder / name)
            for name in files
            if name.lower().endswith((".tar", *COMPRESSED_SUFFIXES))
        ]
        require_one_kind(folder, names, [name for name in files if media_kind(name)])
    else:
        names = [
            name if is_remote(name) else os.path.abspath(os.path.expanduser(name))
            for name in expand(source)
        ]
    if not names:
        raise UserError(
            f"source={source} holds no .tar shard; name a folder or a pattern of shards"
        )
    for name in names:
        if name.partition("?")[0].lower().endswith(COMPRESSED_SUFFIXES):
            raise compressed_error(name)
        require_name(name, "the shard")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"source={source} names {twice[0]} twice; name every shard once")
    return names


def _stamped(names: Sequence[str], root: Path) -> list[Shard]:
    """The shards with sizes and fingerprints. Raises UserError where some do not exist."""

    def stamped(name: str) -> Shard:
        size = size_of(name)
        short = name if is_remote(name) else os.path.relpath(name, root.resolve())
        return Shard(short, name, (size, fingerprint(name, size) if size >= 0 else ""))

    try:
        with ThreadPoolExecutor(CHECK_THREADS) as threads:
            shards = list(threads.map(stamped, names))
    except StorageFault as error:
        raise Fault(f"a shard cannot be read: {error}") from error
    missing = [shard.path for shard in shards if shard.stamp[0] == MISSING]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"source= names {len(shards)} shards, {len(missing)} do not exist: {shown}; correct the pattern"
        )
    return shards


def _new_shards(shards: list[Shard], known: Manifest | None, file: Path) -> list[Shard]:
    """The shards that the manifest does not hold yet. Raises UserError where one changed since it was indexed."""
    before = known.shards if known else {}
    for shard in shards:
        was = before.get(shard.name)
        if was and was != shard.stamp:
            raise UserError(
                f"the shard {shard.path} changed since it was indexed ({was[0]} bytes then, {shard.stamp[0]} now): "
                f"restore it, give new data a new name, or remove {file} to index all again"
            )
    if known is not None and not before:
        raise UserError(
            f"{file} does not say which shards it was made of, so none can be added; name another output"
        )
    return [shard for shard in shards if shard.name not in before]


# -- probing shards -------------------------------------------------------------------------------


def _probe_shards(
    todo: list[Shard],
    folder: Path,
    how: HowToIndex,
    workers: int,
    duplicate_keys: str,
    progress: Progress | None,
) -> None:
    """List the shards, probe their clips and keep the rows of each shard in `folder`."""
    with DecodePool(workers, how.timeout, module="sora_train.data.index.listing_worker") as pool:
        listed = _listed(pool, todo, how)
        _check_command(listed, how, duplicate_keys)
        total = sum(len(samples) for _, samples in listed)
        done = 0
        begun = _begun(pool, listed, how)
        waiting: deque[tuple[Member, Future]] = deque()
        for shard, samples in listed:
            rows: list[dict[str, object]] = []
            while len(rows) < len(samples):
                while len(waiting) < AHEAD * workers and (more := next(begun, None)):
                    waiting.append(more)
                member, future = waiting.popleft()
                row = member_row(member, future.result(), how.probe == "header")
                if not member.caption and not how.allow_empty_captions and not row["drop_reason"]:
                    row["drop_reason"] = "no_caption"
                    row["drop_detail"] = member.lacks
                rows.append(row)
                done += 1
                if progress:
                    progress(done, total)
            Manifest.from_rows(rows, folder).save(shard.kept_as(folder, how))


def _listed(pool: DecodePool, todo: list[Shard], how: HowToIndex) -> Listed:
    """The samples of every shard. Raises UserError on a compressed shard, Fault where one cannot be listed."""
    futures = [
        pool.submit(
            ListRequest(number, shard.name, shard.path, 0, shard.stamp[0], how.members),
            LIST_SECONDS,
        )
        for number, shard in enumerate(todo)
    ]
    listed = []
    for shard, future in zip(todo, futures, strict=True):
        listing: Listing | Failure = future.result()
        if isinstance(listing, Failure):
            raise Fault(
                f"the shard {shard.path} cannot be listed ({listing.reason}: {listing.detail}); check it with `tar -tf`"
            )
        if listing.compressed:
            raise compressed_error(shard.path, listing.compressed)
        listed.append((shard, listing.samples))
    return listed


def _check_command(listed: Listed, how: HowToIndex, duplicate_keys: str) -> None:
    """Raise UserError on mistakes in the command that the listing shows, before a clip is probed."""
    samples = [sample for _, in_shard in listed for sample in in_shard if sample.key]
    extensions = Counter(extension for sample in samples for extension in sample.extensions)
    members = ", ".join(f"{name} ({count})" for name, count in extensions.most_common(8)) or "none"
    if samples and not any(sample.kind for sample in samples):
        clip = f"video_key={';'.join(how.members.video)}" if how.members.video else "a clip"
        raise UserError(
            f"no sample of {listed[0][0].path} or the shards after it has {clip}; their members are {members}: "
            "name the clips with video_key="
        )
    captioned = how.allow_empty_captions or any(sample.caption for sample in samples)
    if samples and not captioned:
        raise UserError(
            f"no sample has a caption under caption_keys=[{','.join(how.members.captions)}]; the members are "
            f"{members}: name the captions with caption_keys=[txt,json:caption.long], or set allow_empty_captions=true"
        )
    if duplicate_keys == "refuse":
        shard_of: dict[str, str] = {}
        for shard, in_shard in listed:
            for sample in in_shard:
                if sample.key and (sample.reason == "duplicate_key" or sample.key in shard_of):
                    raise _duplicate(sample.key, shard_of.get(sample.key, shard.name), shard.name)
                shard_of[sample.key] = shard.name


def _duplicate(key: str, first: str, second: str) -> UserError:
    return UserError(
        f"the key {key!r} occurs in {first} and again in {second}; give clips keys of their own, or set "
        "duplicate_keys=per_shard (shards number their clips alone) or duplicate_keys=drop (the later ones are dropped)"
    )


def _begun(pool: DecodePool, listed: Listed, how: HowToIndex) -> Iterator[tuple[Member, Future]]:
    """Every sample in order with its future Probe or Failure; each probe begins as it is drawn."""
    samples = ((shard, sample) for shard, in_shard in listed for sample in in_shard)
    for number, (shard, sample) in enumerate(samples):
        member = Member.of_sample(shard.name, sample)
        timeout = how.timeout + (REMOTE_SECONDS if is_remote(shard.path) else 0.0)
        future = begin_probe(
            pool, number, member, shard.path, how.probe, timeout, reason=sample.reason
        )
        yield member, future


# -- the manifest ---------------------------------------------------------------------------------


def _unique(manifest: Manifest, duplicate_keys: str) -> Manifest:
    """The manifest with later rows of a key dropped; UserError where `duplicate_keys` is `refuse`."""
    if duplicate_keys == "per_shard":
        return manifest
    first: dict[str, int] = {}
    reason, detail = manifest.drop_reason.copy(), manifest.drop_detail.copy()
    for row in np.flatnonzero(manifest.drop_reason == "").tolist():
        key = str(manifest.key[row])
        before = first.setdefault(key, row)
        if before == row:
            continue
        if duplicate_keys == "refuse":
            raise _duplicate(key, str(manifest.shard[before]), str(manifest.shard[row]))
        reason[row] = "duplicate_key"
        detail[row] = f"the key is in {manifest.shard[before]} before"
    return manifest.with_columns(drop_reason=reason, drop_detail=detail)

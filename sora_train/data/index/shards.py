"""Indexes webdataset tars made elsewhere, local or remote: what `sora data index` does with shards.

Shards are listed first, which costs little and finds what is wrong with their names, then every clip
is looked into. What a shard holds is kept beside the output as soon as it is known, so that a run cut
off goes on where it was, and parts may run on several machines. The manifest is written whole at the
end; a manifest that is there already keeps its rows, and new shards follow them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sora_train.data.decode.frames import ProbeRequest
from sora_train.data.decode.pool import DecodePool
from sora_train.data.index.folder import CHECK_THREADS, PROBE_SECONDS_PER_MIB, Member, member_row
from sora_train.data.index.tars import (
    COMPRESSED_SUFFIXES,
    Listing,
    ListRequest,
    MemberKeys,
    TarSample,
)
from sora_train.data.latents import members as stored
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
PARTS_VERSION = "2"
# A server that stalls is given up after some attempts; its child must live to tell.
REMOTE_SECONDS = 180.0
LIST_SECONDS = 1800.0
# Clips on their way for each process: enough to keep it busy, few enough to forget.
AHEAD = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HowToIndex:
    """What decides which rows a shard gives. `probe` is `decode`, `packets` or `header`."""

    members: MemberKeys = MemberKeys()
    probe: str = "decode"
    allow_empty_captions: bool = False
    timeout: float = 60.0


@dataclass(frozen=True)
class Shard:
    """A shard to be indexed: its name in the manifest, where it lies, and what it was when it was found."""

    name: str
    path: str
    stamp: Stamp

    def kept_as(self, folder: Path, how: HowToIndex) -> Path:
        """Where its rows are kept until the manifest is written; another name for another shard or way."""
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

    `duplicate_keys` is `refuse`, `drop` or `per_shard`, `part` `i/N`; with `merge` no shard is looked
    into. `progress(done, total)` counts clips. Raises UserError on names that are no shards, members
    that do not occur, duplicate keys and shards that changed since they were indexed, Fault where
    storage fails.
    """
    output = output.expanduser()
    file = output / FILE_NAME
    known = Manifest.load(file) if file.exists() else None
    names = _named(source)
    root = known.root if known else common_root(names)
    new = _unknown(_stamped(names, root), known, file)
    folder = output / PARTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    mine = new
    if part:
        number, count = map(int, part.split("/"))
        mine = new[number - 1 :: count]
    todo = [shard for shard in mine if not shard.kept_as(folder, how).exists()]
    if merge and todo:
        raise UserError(
            f"{len(todo)} of {len(new)} shards are not indexed yet, {todo[0].name} the first; run the missing part=, "
            "or leave merge out"
        )
    if todo:
        _look_into(todo, folder, how, workers, duplicate_keys, progress)
    if part:
        return None
    parts = [_part(shard, folder, how) for shard in new]
    merged = _joined(known, new, parts, root)
    merged = _unique(merged, duplicate_keys)
    if new:
        if known:
            _keep_revision(file, known.revision)
        merged.save(file)
    shutil.rmtree(folder, ignore_errors=True)
    return merged


def is_shards(source: str) -> bool:
    """Whether a source is given by the names of shards rather than as a folder or a table."""
    path = source.partition("?")[0].lower()
    return (
        is_remote(source)
        or any(mark in source for mark in "{*")
        or path.endswith((".tar", *COMPRESSED_SUFFIXES))
    )


def _named(source: str) -> list[str]:
    """The shards a source names, each once. Raises UserError on compressed ones and other files."""
    folder = Path(source).expanduser()
    if not is_shards(source) and folder.is_dir():
        names = sorted(str(path) for path in folder.rglob("*") if _is_tar(path.name))
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
            raise _compressed(name, "")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"source={source} names {twice[0]} twice; name every shard once")
    return names


def _is_tar(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith((".tar", *COMPRESSED_SUFFIXES))


def _compressed(name: str, packed: str) -> UserError:
    what = f"is compressed ({packed}) under another name" if packed else "is a compressed tar"
    return UserError(
        f"{name} {what}, and no clip can be found in it without unpacking all before it; decompress the shards "
        "once (`gunzip`, `zstd -d`: video does not shrink) and index the .tar files"
    )


def _stamped(names: Sequence[str], root: Path) -> list[Shard]:
    """The shards with their sizes and fingerprints. Raises UserError where some do not exist."""

    def stamped(name: str) -> Shard:
        size = size_of(name)
        short = name if is_remote(name) else os.path.relpath(name, root.resolve())
        return Shard(short, name, (size, fingerprint(name, size) if size >= 0 else ""))

    try:
        with ThreadPoolExecutor(CHECK_THREADS) as threads:
            shards = list(threads.map(stamped, names))
    except StorageFault as error:
        raise Fault(f"a shard cannot be looked at: {error}") from error
    missing = [shard.path for shard in shards if shard.stamp[0] == MISSING]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"source= names {len(shards)} shards, of which {len(missing)} do not exist: {shown}; correct the pattern"
        )
    return shards


def _unknown(shards: list[Shard], known: Manifest | None, file: Path) -> list[Shard]:
    """The shards that no earlier manifest holds; one that changed since then is refused."""
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


# -- looking into shards --------------------------------------------------------------------------


def _look_into(
    todo: list[Shard],
    folder: Path,
    how: HowToIndex,
    workers: int,
    duplicate_keys: str,
    progress: Progress | None,
) -> None:
    """List the shards, look into their clips and keep the rows of each shard in `folder`."""
    with DecodePool(workers, how.timeout, module="sora_train.data.index.listing_worker") as pool:
        listed = _listed(pool, todo, how)
        _refuse(listed, how, duplicate_keys)
        total = sum(len(samples) for _, samples in listed)
        done = 0
        waiting: deque[tuple[Member, Future | Failure]] = deque()
        rows: list[dict[str, object]] = []
        begun = _begun(pool, listed, how)
        for shard, samples in listed:
            rows = []
            while len(rows) < len(samples):
                while len(waiting) < AHEAD * workers and (more := next(begun, None)):
                    waiting.append(more)
                member, future = waiting.popleft()
                found = future if isinstance(future, Failure) else future.result()
                rows.append(_sample_row(member, found, how))
                done += 1
                if progress:
                    progress(done, total)
            Manifest.from_rows(rows, folder).save(shard.kept_as(folder, how))


def _listed(
    pool: DecodePool, todo: list[Shard], how: HowToIndex
) -> list[tuple[Shard, list[TarSample]]]:
    futures = [
        pool.submit(
            ListRequest(number, shard.name, shard.path, 0, shard.stamp[0], how.members),
            LIST_SECONDS,
        )
        for number, shard in enumerate(todo)
    ]
    listed = []
    for shard, future in zip(todo, futures, strict=True):
        found = future.result()
        if isinstance(found, Failure):
            raise Fault(
                f"the shard {shard.path} cannot be listed ({found.reason}: {found.detail}); check it with `tar -tf`"
            )
        assert isinstance(found, Listing)
        if found.compressed:
            raise _compressed(shard.path, found.compressed)
        listed.append((shard, found.samples))
    return listed


def _refuse(
    listed: list[tuple[Shard, list[TarSample]]], how: HowToIndex, duplicate_keys: str
) -> None:
    """What the listing shows to be a mistake in the command, before a clip is looked into."""
    samples = [sample for _, found in listed for sample in found if sample.key]
    seen = Counter(extension for sample in samples for extension in sample.extensions)
    members = ", ".join(f"{name} ({count})" for name, count in seen.most_common(8)) or "none"
    if samples and not any(sample.kind for sample in samples):
        wanted = f"video_key={';'.join(how.members.video)}" if how.members.video else "a clip"
        raise UserError(
            f"no sample of {listed[0][0].path} or the shards after it has {wanted}; their members are {members}: "
            "name the clips with video_key="
        )
    captioned = how.allow_empty_captions or any(sample.caption for sample in samples)
    if samples and not captioned:
        raise UserError(
            f"no sample has a caption under caption_keys=[{','.join(how.members.captions)}]; the members are "
            f"{members}: name the captions with caption_keys=[txt,json:caption.long], or set allow_empty_captions=true"
        )
    if duplicate_keys == "refuse":
        where: dict[str, str] = {}
        for shard, found in listed:
            for sample in found:
                if sample.key and (sample.reason == "duplicate_key" or sample.key in where):
                    raise _duplicate(sample.key, where.get(sample.key, shard.name), shard.name)
                where[sample.key] = shard.name


def _duplicate(key: str, first: str, second: str) -> UserError:
    return UserError(
        f"the key {key!r} occurs in {first} and again in {second}; give clips keys of their own, or set "
        "duplicate_keys=per_shard (shards number their clips alone) or duplicate_keys=drop (the later ones are dropped)"
    )


def _begun(
    pool: DecodePool, listed: list[tuple[Shard, list[TarSample]]], how: HowToIndex
) -> Iterator[tuple[Member, Future | Failure]]:
    """Every sample, in order, with what will be known of it; drawn from as far ahead as there is room."""
    number = 0
    for shard, samples in listed:
        for sample in samples:
            member = Member(
                shard.name,
                sample.key,
                sample.kind,
                sample.offset,
                sample.length,
                sample.caption,
                captions=sample.captions,
                scores=sample.scores,
                members=sample.members,
                digest=sample.digest,
            )
            if sample.reason:
                yield member, Failure(number, sample.reason, sample.detail)
            elif sample.kind == stored.KIND:
                known: Future = Future()
                known.set_result(stored.probe_of(member.members, member.digest))
                yield member, known
            else:
                deadline = how.timeout + PROBE_SECONDS_PER_MIB * sample.length / 2**20
                request = ProbeRequest(
                    number,
                    sample.key,
                    shard.path,
                    sample.offset,
                    sample.length,
                    sample.kind,
                    how.probe,
                )
                extra = REMOTE_SECONDS if is_remote(shard.path) else 0.0
                yield member, pool.submit(request, deadline + extra)
            number += 1


def _sample_row(member: Member, found: object, how: HowToIndex) -> dict[str, object]:
    row = member_row(member, found, how.probe == "header")  # type: ignore[arg-type]
    row["source"] = ""
    if not member.caption and not how.allow_empty_captions and not row["drop_reason"]:
        row["drop_reason"] = "no_caption"
        row["drop_detail"] = f"none under {', '.join(how.members.captions)}"
    return row


# -- the manifest ---------------------------------------------------------------------------------


def _part(shard: Shard, folder: Path, how: HowToIndex) -> Manifest:
    return Manifest.load(shard.kept_as(folder, how), root=folder)


def _joined(
    known: Manifest | None, new: list[Shard], parts: list[Manifest], root: Path
) -> Manifest:
    if known and not new:
        return known
    stamps = {shard.name: shard.stamp for shard in new}
    if known is None:
        return Manifest.joined(parts, root, stamps)
    return Manifest.joined([known, *parts], root, {**known.shards, **stamps}, known.revision + 1)


def _unique(manifest: Manifest, duplicate_keys: str) -> Manifest:
    """The manifest with later rows of a key dropped. Raises UserError where they are refused."""
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


def _keep_revision(file: Path, revision: int) -> None:
    """The manifest as it is now under a name of its own, for the runs that were trained on it."""
    kept = file.with_name(f"{file.stem}.{revision}.parquet")
    if not kept.exists():
        os.link(file, kept)

"""Opens a source of clips in any of its forms as a manifest: indexed in place, probed once, cached.

Forms: a folder with a manifest; a folder of .tar shards made elsewhere; a plain folder of clips; a
CSV, JSONL or Parquet table. Listing is cheap and happens here. Probing decodes every clip in child
processes with a deadline; its rows are kept under a hash of the listing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from sora_train.data.decode.pool import DecodePool
from sora_train.data.decode.probe import HLG, PQ, Probe, ProbeRequest
from sora_train.data.index.decoders import measured
from sora_train.data.index.listing import Listed, Member, list_source, require_name
from sora_train.data.latents import members as stored
from sora_train.data.manifest import FILE_NAME, Manifest, empty_row
from sora_train.data.sample import Failure
from sora_train.data.storage.ranges import StorageFault
from sora_train.data.storage.remote import fingerprint, is_remote, size_of
from sora_train.errors import Fault, UserError

INDEX_VERSION = "5"
# Waiting for a disk or a server costs no core.
CHECK_THREADS = 16
# Probing decodes a clip whole, training only a few seconds of it.
PROBE_SECONDS_PER_MIB = 5.0

Progress = Callable[[int, int], None]


def open_source(
    source: str,
    *,
    captions: str = "",
    work_dir: Path | str,
    probe: str = "decode",
    workers: int = 2,
    progress: Progress | None = None,
    allow_empty_captions: bool = False,
    timeout: float = 60.0,
) -> Manifest:
    """The manifest of `source`; `work_dir` keeps it for later runs.

    `probe` is `decode` (count frames by decoding), `packets` or `header`; `progress(done, total)` is called
    as clips are probed; `timeout` is the least deadline of a clip in seconds. Raises UserError on a
    source that does not exist, is empty, is compressed, or has no captions.
    """
    path = Path(source).expanduser()
    require_name(source, "data.source")
    if not path.exists() and (is_remote(source) or "{" in source or "*" in source):
        raise UserError(
            f"data.source={source} names shards that are not indexed; run `sora data index source='{source}' "
            "output=FOLDER` once, then train with data.source=FOLDER"
        )
    if not path.exists():
        raise UserError(
            f"data.source={source} does not exist; give a folder of clips or shards, or a CSV/JSONL/Parquet table"
        )
    manifest_file = path / FILE_NAME if path.is_dir() else path
    has_manifest = manifest_file.suffix == ".parquet" and Manifest.is_manifest(manifest_file)
    has_manifest = has_manifest or (path.is_dir() and manifest_file.exists())
    if captions and (has_manifest or path.is_file()):
        raise UserError(
            f"data.captions={captions} would not be used: data.source={source} holds its own captions; "
            "leave data.captions empty"
        )
    if has_manifest:
        return checked(Manifest.load(manifest_file), manifest_file)
    listed = list_source(path, captions)
    root, members = listed.root, listed.members
    if not any(member.caption for member in members) and not allow_empty_captions:
        raise UserError(_without_captions(source, listed))
    listing = _listing_hash(root, members, probe, allow_empty_captions)
    cached = Path(work_dir) / f"manifest-{listing}.parquet"
    if cached.exists():
        manifest = Manifest.load(cached, root=root)
        manifest.left_out = listed.left_out
        return manifest
    rows = _probe_members(root, members, probe, workers, timeout, progress)
    for row in rows:
        row["source"] = path.name
    if not allow_empty_captions:
        for member, row in zip(members, rows, strict=True):
            if not row["caption"] and not row["drop_reason"]:
                row["drop_reason"] = "no_caption"
                row["drop_detail"] = member.lacks or "the clip has no caption"
    manifest = measured(Manifest.from_rows(rows, root), timeout, show=progress is not None)
    manifest.save(cached)
    manifest.left_out = listed.left_out
    return manifest


def without_hdr(manifest: Manifest) -> Manifest:
    """The manifest with its HDR clips dropped, as `data.hdr=drop` asks for."""
    reason, detail = manifest.drop_reason.copy(), manifest.drop_detail.copy()
    for row, traits in enumerate(manifest.traits.tolist()):
        if {PQ, HLG} & set(traits.split()) and not reason[row]:
            reason[row], detail[row] = "hdr", "data.hdr=tonemap would show it as SDR"
    return manifest.with_columns(drop_reason=reason, drop_detail=detail)


def _without_captions(source: str, listed: Listed) -> str:
    said = next((said for one in listed.members if (said := one.fault or one.lacks)), "")
    return (
        f"no clip of data.source={source} has a caption{f' ({said})' if said else ''}: "
        f'put {{"file": ..., "caption": ...}} lines into {listed.root / "captions.jsonl"}, or a .txt beside each '
        f"clip, or give data.captions=FILE (data.allow_empty_captions=true trains without)"
    )


def checked(manifest: Manifest, file: Path) -> Manifest:
    """The manifest, where its shards are unchanged since it was made.

    Raises UserError naming the shard that is missing or changed, Fault where storage fails.
    """
    if len(manifest) == 0:
        raise UserError(f"the manifest of {manifest.root} lists no clips; prepare the data again")
    needed: dict[str, int] = {}
    ends = manifest.offset + manifest.length
    for shard, end, reason in zip(manifest.shard, ends, manifest.drop_reason, strict=True):
        if not reason and end > needed.get(shard, -1):
            needed[shard] = int(end)

    def fault(shard: str) -> str:
        path = manifest.shard_path(shard)
        try:
            size = size_of(path)
            if size < 0:
                return f"the shard {path} is missing"
            if size < needed[shard]:
                return f"the shard {path} holds {size} bytes where {needed[shard]} are indexed"
            stamp = manifest.shards.get(shard)
            if stamp and stamp != (size, fingerprint(path, size)):
                return f"the shard {path} changed since it was indexed ({stamp[0]} bytes then, {size} now)"
        except StorageFault as error:
            raise Fault(f"a shard cannot be checked: {error}") from error
        return ""

    with ThreadPoolExecutor(CHECK_THREADS) as threads:
        for message in filter(None, threads.map(fault, needed)):
            raise UserError(f"{message}; restore it, or remove {file} to index again")
    return manifest


def _listing_hash(root: Path, members: list[Member], probe: str, allow_empty: bool) -> str:
    state = hashlib.sha256(f"{INDEX_VERSION} {probe} {allow_empty} {root.resolve()}".encode())
    stamps: dict[str, str] = {}
    for member in members:
        if member.shard and member.shard not in stamps:
            stat = (root / member.shard).stat()
            stamps[member.shard] = f"{stat.st_size} {stat.st_mtime_ns}"
        state.update(repr((member, stamps.get(member.shard))).encode())
    return state.hexdigest()[:16]


def _probe_members(
    root: Path,
    members: list[Member],
    probe: str,
    workers: int,
    timeout: float,
    progress: Progress | None,
) -> list[dict[str, object]]:
    rows = []
    with DecodePool(min(workers, len(members)), timeout) as pool:
        futures = [
            begin_probe(pool, number, member, str(root / member.shard), probe, timeout)
            for number, member in enumerate(members)
        ]
        for member, future in zip(members, futures, strict=True):
            rows.append(member_row(member, future.result(), probe == "header"))
            if progress:
                progress(len(rows), len(members))
    return rows


def begin_probe(
    pool: DecodePool,
    number: int,
    member: Member,
    path: str,
    probe: str,
    timeout: float,
    reason: str = "",
) -> Future:
    """The future Probe or Failure of a member of the file at `path`.

    `timeout` is the least deadline in seconds. A member with a `reason` or a fault fails with it, unprobed.
    """
    known: Future = Future()
    if reason or member.fault:
        known.set_result(Failure(number, reason or member.reason or "unreadable", member.fault))
    elif member.kind == stored.KIND:
        known.set_result(stored.probe_of(member.members, member.digest))
    else:
        request = ProbeRequest(
            number, member.key, path, member.offset, member.length, member.kind, probe
        )
        return pool.submit(request, timeout + PROBE_SECONDS_PER_MIB * member.length / 2**20)
    return known


def member_row(member: Member, probed: Probe | Failure, unverified: bool) -> dict[str, object]:
    """The row of the manifest of a member that was probed."""
    row = asdict(member)
    del row["fault"], row["reason"], row["lacks"], row["digest"]
    if isinstance(probed, Failure):
        return empty_row(**row, drop_reason=probed.reason, drop_detail=probed.detail)
    row |= asdict(probed)
    row["sample_digest"] = row.pop("digest")
    return empty_row(**row, unverified=unverified)

"""Opens a source of clips in any of its forms as a manifest: indexed in place, probed once, cached.

Forms: a folder with a manifest; a folder of .tar shards made elsewhere; a plain folder of clips; a
CSV, JSONL or Parquet table. Listing is cheap and happens here. Probing decodes every clip in child
processes with a deadline; its rows are kept under a hash of the listing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sora_train.data.captions.tables import TABLE_SUFFIXES, Texts, read_table
from sora_train.data.decode.frames import Probe, ProbeRequest
from sora_train.data.decode.pool import DecodePool
from sora_train.data.index.tars import (
    COMPRESSED_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    TarSample,
    compressed_error,
    list_tar,
    media_kind,
)
from sora_train.data.latents import members as stored
from sora_train.data.manifest import FILE_NAME, Manifest, empty_row
from sora_train.data.sample import Failure
from sora_train.data.storage.ranges import StorageFault
from sora_train.data.storage.remote import fingerprint, is_remote, size_of
from sora_train.errors import Fault, UserError

INDEX_VERSION = "2"
# Waiting for a disk or a server costs no core.
CHECK_THREADS = 16
# Probing decodes a clip whole, training only a few seconds of it.
PROBE_SECONDS_PER_MIB = 5.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Member:
    """One clip as listed, before it is probed. `fault` is set where its bytes are incomplete.

    `members` is the manifest's column; `digest` that of latents which have no clip beside them.
    """

    shard: str
    key: str
    kind: str
    offset: int
    length: int
    caption: str
    fault: str = ""
    captions: str = ""
    scores: str = ""
    members: str = ""
    digest: str = ""

    @classmethod
    def of_sample(cls, shard: str, sample: TarSample) -> Member:
        """The clip of a sample in a tar."""
        return cls(
            shard,
            sample.key,
            sample.kind,
            sample.offset,
            sample.length,
            sample.caption,
            sample.detail,
            sample.captions,
            sample.scores,
            sample.members,
            sample.digest,
        )


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
    root, members = _list_source(path, captions)
    if not any(member.caption for member in members) and not allow_empty_captions:
        raise UserError(
            f'no clip of data.source={source} has a caption: put {{"file": ..., "caption": ...}} lines into '
            f"{root / 'captions.jsonl'}, or a .txt beside each clip, or give data.captions=FILE "
            "(data.allow_empty_captions=true trains without)"
        )
    listing = _listing_hash(root, members, probe, allow_empty_captions)
    cached = Path(work_dir) / f"manifest-{listing}.parquet"
    if cached.exists():
        return Manifest.load(cached, root=root)
    rows = _probe_members(root, members, probe, workers, timeout, progress)
    for row in rows:
        row["source"] = path.name
        if not row["caption"] and not allow_empty_captions and not row["drop_reason"]:
            row["drop_reason"], row["drop_detail"] = "no_caption", "the clip has no caption"
    manifest = Manifest.from_rows(rows, root)
    manifest.save(cached)
    return manifest


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


def _list_source(path: Path, captions: str) -> tuple[Path, list[Member]]:
    """The root of the shards' names, and every clip in a stable order."""
    if path.is_file():
        if path.name.lower().endswith(COMPRESSED_SUFFIXES):
            raise compressed_error(path)
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise UserError(
                f"data.source={path} has no known form; give a folder of clips or .tar shards, or a "
                f"table ({', '.join(TABLE_SUFFIXES)})"
            )
        root, table = path.parent, read_table(path)
        _check_table(root, table, path)
        return root, [_loose(root, name, texts) for name, texts in table.items()]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    packed = [file for file in files if file.name.lower().endswith(COMPRESSED_SUFFIXES)]
    if packed:
        raise compressed_error(packed[0])
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    clips = [file for file in files if media_kind(file.name)]
    if tars and clips:
        raise UserError(
            f"data.source={path} holds both shards ({tars[0].name}) and loose clips ({clips[0].name}); "
            "give them folders of their own"
        )
    if not tars and not clips:
        raise UserError(
            f"data.source={path} holds no clips: no .tar shard and no file ending in "
            f"{', '.join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))}"
        )
    if tars:
        return path, _list_tars(path, tars, captions)
    return path, _list_folder(path, clips, captions)


def _check_table(root: Path, table: dict[str, Texts], path: Path) -> None:
    """Raise UserError where a table at `path` names files that do not exist or are no clips."""
    missing = [name for name in table if not (root / name).is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{path} names {len(missing)} of {len(table)} files that are not in {root}: {shown}; "
            "correct the names (they are relative to that folder) or remove the rows"
        )
    unknown = [name for name in table if not media_kind(name)]
    if unknown:
        raise UserError(
            f"{path} names {unknown[0]!r}, which is neither a video nor an image by its extension"
        )


def _loose(root: Path, name: str, texts: Texts) -> Member:
    return Member(
        name,
        name,
        media_kind(name),
        0,
        (root / name).stat().st_size,
        texts.caption,
        captions=texts.captions,
        scores=texts.scores,
    )


def _caption_table(folder: Path, captions: str) -> tuple[Path, dict[str, Texts]]:
    """The captions file `captions`, else the one in the folder, and its table; an empty table where there is none."""
    path = Path(captions).expanduser()
    if captions and not path.exists():
        raise UserError(
            f"data.captions={captions} does not exist; give a .jsonl, .csv or .parquet file"
        )
    inside = [folder / f"captions{suffix}" for suffix in TABLE_SUFFIXES]
    for file in [path] if captions else filter(Path.exists, inside):
        return file, read_table(file)
    return folder, {}


def _list_folder(folder: Path, clips: list[Path], captions: str) -> list[Member]:
    path, table = _caption_table(folder, captions)
    _check_table(folder, table, path)
    members = []
    for clip in clips:
        name = clip.relative_to(folder).as_posix()
        texts = table.get(name, Texts())
        sidecar = clip.with_suffix(".txt")
        if not texts.caption and sidecar.is_file():
            caption = sidecar.read_text(encoding="utf-8", errors="replace").strip()
            texts = replace(texts, caption=caption)
        members.append(_loose(folder, name, texts))
    return members


def _list_tars(folder: Path, tars: list[Path], captions: str) -> list[Member]:
    _, table = _caption_table(folder, captions)
    members = []
    for tar in tars:
        shard = tar.relative_to(folder).as_posix()
        for sample in list_tar(tar):
            member = Member.of_sample(shard, sample)
            # A table may name the member (`a.mp4`) or its key (`a`).
            texts = table.get(sample.name) or table.get(sample.key)
            if texts:
                scores = texts.scores or member.scores
                member = replace(
                    member, caption=texts.caption, captions=texts.captions, scores=scores
                )
            members.append(member)
    if not members:
        raise UserError(f"the {len(tars)} shards of {folder} hold no clip, first {tars[0].name}")
    return members


def _listing_hash(root: Path, members: list[Member], probe: str, allow_empty: bool) -> str:
    state = hashlib.sha256(f"{INDEX_VERSION} {probe} {allow_empty} {root.resolve()}".encode())
    stamps: dict[str, str] = {}
    for member in members:
        if member.shard not in stamps:
            stat = (root / member.shard).stat()
            stamps[member.shard] = f"{stat.st_size} {stat.st_mtime_ns}"
        state.update(repr((member, stamps[member.shard])).encode())
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
        known.set_result(Failure(number, reason or "unreadable", member.fault))
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
    del row["fault"], row["digest"]
    if isinstance(probed, Failure):
        return empty_row(**row, drop_reason=probed.reason, drop_detail=probed.detail)
    row |= asdict(probed)
    row["sample_digest"] = row.pop("digest")
    return empty_row(**row, unverified=unverified)

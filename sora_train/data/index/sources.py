"""Opens the sources of a run as one manifest, whose rows keep their numbers when shards join later.

A row's number is part of every keyed draw of its sample. So the rows that a run began with come first,
source by source; rows that joined later follow in the order of joining, and excluded ones keep theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.base.progress import Progress
from sora_train.config import Config, DataConfig, SourceConfig
from sora_train.data.exclusion import excluded_rows
from sora_train.data.index.folder import open_source, without_hdr
from sora_train.data.index.shapes_source import prepare_shapes
from sora_train.data.manifest import Manifest, text_digest
from sora_train.data.shapes.world import NEW_COLOURS, PALETTE, Lasting
from sora_train.data.storage.remote import is_remote
from sora_train.errors import Fault, UserError

SHAPES = "shapes"
ONLY = "all"
"""The name of a single source."""


@dataclass(frozen=True)
class SourceSnapshot:
    """Rows and digest of each source when a part of the tape began; `first` is its first micro-batch.

    The rows `excluded` by data.exclude are left out of that part, and from micro-batch `excluded_from` on out of what
    is left of the epoch before it.
    """

    first: int
    rows: dict[str, int]
    digests: dict[str, str]
    excluded: tuple[int, ...] = ()
    excluded_from: int = 0

    @classmethod
    def listed(cls, saved: Sequence[Mapping[str, Any]]) -> list["SourceSnapshot"]:
        """The snapshots that a checkpoint holds, in order."""
        return [
            cls(**{**snapshot, "excluded": tuple(snapshot.get("excluded", ()))})
            for snapshot in saved
        ]


@dataclass(frozen=True)
class Sources:
    """The training clips of all sources as one manifest, and the held-out ones.

    `source_of_row` indexes `names`. `blocks` counts the training rows of each snapshot and all before it.
    With a `change` since the last checkpoint (new clips, or others excluded) the last snapshot has not joined yet, and
    its micro-batches are not final.
    """

    train: Manifest
    val: Manifest
    names: tuple[str, ...] = (ONLY,)
    source_of_row: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    blocks: tuple[int, ...] = ()
    snapshots: tuple[SourceSnapshot, ...] = ()
    change: bool = False

    @classmethod
    def of(cls, train: Manifest) -> "Sources":
        """A single source without held-out clips."""
        return cls(
            train,
            train.select(np.zeros(0, int)),
            source_of_row=np.zeros(len(train), int),
            blocks=(len(train),),
            snapshots=(SourceSnapshot(0, {ONLY: len(train)}, {ONLY: train.digest()}),),
        )

    def joined_at(self, first: int, now: int) -> "Sources":
        """These sources, with the last snapshot joining at micro-batch `first` of a run that goes on at `now`."""
        last = replace(self.snapshots[-1], first=first, excluded_from=now)
        return replace(self, snapshots=(*self.snapshots[:-1], last))

    def require_following(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Raises Fault where the sources were opened without a checkpoint's snapshots, so that rows are renumbered."""
        before = SourceSnapshot.listed(saved)
        if list(self.snapshots[: len(before)]) != before:
            raise Fault(
                "the data was opened without what this run was trained on so far; where build_data is overridden, "
                "it has to hand self.resumed to TrainingData.build"
            )

    def digest(self) -> str:
        """The digest of the training clips, wherever they are mounted."""
        return text_digest(" ".join(self.snapshots[-1].digests.values()))


def open_sources(cfg: Config, run_dir: Path, snapshots: Sequence[SourceSnapshot] = ()) -> Sources:
    """The manifests of the training clips and of the held-out ones.

    `snapshots` are those of a resumed run; rows that joined the sources since then follow theirs.
    Raises UserError where a source is missing, its known rows changed, or data.exclude names no clip of them or all.
    """
    data, work_dir = cfg.data, run_dir / "data"
    sources = data.sources or (SourceConfig(name=ONLY, source=data.source, captions=data.captions),)
    share = -(-data.val_clips // len(sources))
    kept: dict[str, np.ndarray] = {}
    opened: dict[str, Manifest] = {}
    held_out: dict[str, Manifest] = {}
    for source in sources:
        manifest, split = _open(source, "train", source.clips or data.shapes_clips, cfg, work_dir)
        opened[source.name] = manifest
        began_with = snapshots[0].rows.get(source.name, 0) if snapshots else len(manifest)
        apart = np.zeros(0, int)
        if split and not data.val_source:
            held_out[source.name] = _open(source, "val", data.shapes_val_clips, cfg, work_dir)[0]
        elif not data.val_source:
            usable = np.flatnonzero(manifest.drop_reason[:began_with] == "")
            count = min(share, len(usable) // 10)
            apart = usable[len(usable) - count :]
            held_out[source.name] = manifest.select(apart)
        kept[source.name] = np.setdiff1d(np.arange(len(manifest)), apart)
    if data.val_source:
        val = SourceConfig(name="val", source=data.val_source)
        held_out = {val.name: _open(val, "val", data.shapes_val_clips, cfg, work_dir)[0]}
    now = _snapshots_now(opened, snapshots)
    found = _in_order(opened, kept, held_out, now, change=0 < len(snapshots) < len(now))
    rows = excluded_rows(data.exclude, found.train) if data.exclude else ()
    return excluding(found, rows, resumed=bool(snapshots))


def excluding(sources: Sources, rows: tuple[int, ...], *, resumed: bool) -> Sources:
    """The sources without these rows, in a snapshot of their own where a resumed run left out others."""
    *before, last = sources.snapshots
    if rows == last.excluded:
        return sources
    now = replace(last, excluded=rows)
    if sources.change or not resumed:
        return replace(sources, snapshots=(*before, now))
    blocks = (*sources.blocks, sources.blocks[-1])
    return replace(sources, snapshots=(*sources.snapshots, now), blocks=blocks, change=True)


def _snapshots_now(
    opened: Mapping[str, Manifest], snapshots: Sequence[SourceSnapshot]
) -> tuple[SourceSnapshot, ...]:
    """The snapshots so far, and one more where the sources have grown. Raises UserError where they changed."""
    rows = {name: len(manifest) for name, manifest in opened.items()}
    digests = {name: manifest.digest() for name, manifest in opened.items()}
    if not snapshots:
        return (SourceSnapshot(0, rows, digests),)
    last = snapshots[-1]
    # Rows are numbered source by source, so the order counts.
    if list(last.rows) != list(opened):
        raise UserError(
            f"this run was trained on the sources {', '.join(last.rows)} so far, now they are "
            f"{', '.join(opened)}; name them as before, in that order, or start anew in another run.dir"
        )
    for name, manifest in opened.items():
        known = last.rows[name]
        has_grown = known < len(manifest)
        digest = manifest.select(np.arange(known)).digest() if has_grown else digests[name]
        if len(manifest) < known or digest != last.digests[name]:
            where = "data.source" if name == ONLY else f"the source {name!r}"
            raise UserError(
                f"{where} is not what this run was trained on so far (its manifest changed); restore it, or "
                "start anew in another run.dir (new shards may join at the end: `sora data index` adds them)"
            )
    if rows == last.rows:
        return tuple(snapshots)
    return (*snapshots, replace(last, rows=rows, digests=digests))


def _in_order(
    opened: Mapping[str, Manifest],
    kept: Mapping[str, np.ndarray],
    held_out: Mapping[str, Manifest],
    snapshots: tuple[SourceSnapshot, ...],
    change: bool,
) -> Sources:
    """The rows of the first snapshot, source by source, then those that each later one added."""
    names = tuple(opened)
    parts: list[Manifest] = []
    numbers: list[np.ndarray] = []
    blocks: list[int] = []
    begun = dict.fromkeys(names, 0)
    for snapshot in snapshots:
        for number, name in enumerate(names):
            rows = kept[name]
            rows = rows[(rows >= begun[name]) & (rows < snapshot.rows[name])]
            parts.append(opened[name].select(rows))
            numbers.append(np.full(len(rows), number))
            begun[name] = snapshot.rows[name]
        blocks.append(sum(map(len, numbers)))
    if len(names) > 1:
        parts = [
            _placed(part, name) for part, name in zip(parts, names * len(snapshots), strict=True)
        ]
        held_out = {name: _placed(part, name) for name, part in held_out.items()}
    train, val = _together(parts), _together(list(held_out.values()))
    return Sources(train, val, names, np.concatenate(numbers), tuple(blocks), snapshots, change)


def _together(parts: Sequence[Manifest]) -> Manifest:
    if len(parts) == 1:
        return parts[0]
    stamps = {shard: stamp for part in parts for shard, stamp in part.shards.items()}
    return Manifest.joined(parts, parts[0].root, stamps)


def _placed(part: Manifest, name: str) -> Manifest:
    """The rows with absolute paths, as sources lie in different folders, and the name of their source."""
    shards, places = np.unique(part.shard.astype(str), return_inverse=True)
    paths = np.array([_whole(part.shard_path(shard)) for shard in shards.tolist()] or [""], object)
    shard = paths[places] if len(part) else part.shard
    stamps = {_whole(part.shard_path(shard)): stamp for shard, stamp in part.shards.items()}
    placed = part.with_columns(shard=shard, source=np.full(len(part), name, object))
    return Manifest.joined([placed], part.root, stamps)


def _whole(path: str) -> str:
    return path if is_remote(path) else str(Path(path).absolute())


def colour_of(source: str) -> str | None:
    """The colour in which a source of the shapes world is rendered, empty for those of the world; None for clips.

    Raises UserError for a colour that there is not.
    """
    world, colon, colour = source.partition(":")
    if world != SHAPES or source == f"{SHAPES}:":
        return None
    if colon and colour not in PALETTE:
        raise UserError(
            f"data.source={source}: the shapes world has no colour {colour!r}; choose one of {', '.join(PALETTE)}"
        )
    return colour


def new_colour(data: DataConfig) -> str:
    """The colour among the sources that the shapes world does not have otherwise; empty without one."""
    asked = [colour_of(source.source) for source in data.sources] or [colour_of(data.source)]
    return next((colour for colour in asked if colour in NEW_COLOURS), "") or ""


def _open(
    source: SourceConfig, split: str, count: int, cfg: Config, work_dir: Path
) -> tuple[Manifest, bool]:
    """A manifest, and whether the source is the shapes world (which has splits of its own)."""
    data = cfg.data
    colour = colour_of(source.source)
    if colour is not None:
        folder = work_dir / f"shapes-{split}"
        with Progress(count, f"rendering {split} clips") as progress:
            manifest = prepare_shapes(
                folder,
                split=split,
                num_clips=count,
                seed=cfg.seed,
                image_share=data.shapes_image_share,
                colour=colour,
                lasting=Lasting.of(data.shapes_motions, data.shapes_lengths),
                workers=data.num_workers,
                progress=lambda done, total: progress.update(done),
            )
        return manifest, True
    with Progress(1, f"indexing {source.source}") as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        manifest = open_source(
            source.source,
            captions=source.captions,
            work_dir=work_dir,
            probe=data.probe,
            workers=data.num_workers,
            progress=show,
            allow_empty_captions=data.allow_empty_captions,
            timeout=data.decode_timeout,
        )
    return without_hdr(manifest) if data.hdr == "drop" else manifest, False

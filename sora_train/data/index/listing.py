"""Lists the clips of a source: a plain folder, a folder of tars, or a table; with their captions, before any is probed.

Whatever cannot be used is listed too, with the reason. What is no clip is counted as left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from sora_train.base.text import NotText, printable, read_text
from sora_train.data.captions.rows import names_clips
from sora_train.data.captions.tables import TABLE_SUFFIXES, Table, Texts, read_table
from sora_train.data.captions.texts import caption_of_file
from sora_train.data.index.kinds import IMAGE_SUFFIXES, VIDEO_SUFFIXES, media_kind, suffix_of
from sora_train.data.index.tars import (
    BAD_CAPTION,
    BAD_NAME,
    COMPRESSED_SUFFIXES,
    TarSample,
    compressed_error,
    list_tar,
)
from sora_train.data.index.walk import Files, existing, plain, walk
from sora_train.errors import UserError

BAD_ROW = "bad_row"


@dataclass(frozen=True)
class Member:
    """One clip as listed, before it is probed. `fault` is set where it cannot be used, for `reason` ('': unreadable).

    `lacks` says why it has no caption. `members` is the manifest's column; `digest` that of latents which
    have no clip beside them. A row without a file has no `shard`.
    """

    shard: str
    key: str
    kind: str = ""
    offset: int = 0
    length: int = 0
    caption: str = ""
    fault: str = ""
    captions: str = ""
    scores: str = ""
    members: str = ""
    digest: str = ""
    reason: str = ""
    lacks: str = ""

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
            sample.reason if not sample.key or sample.reason in (BAD_CAPTION, BAD_NAME) else "",
            sample.lacks,
        )

    def with_texts(self, texts: Texts) -> Member:
        """The same clip with the texts of a table; a row's fault is the clip's, if it has none of its own."""
        one = replace(self, scores=texts.scores or self.scores)
        if texts.fault and not self.fault:
            one = replace(one, fault=texts.fault, reason=BAD_CAPTION)
        if texts.caption:
            return replace(one, caption=texts.caption, captions=texts.captions)
        return one if one.caption else replace(one, lacks=texts.lacks or self.lacks)


@dataclass
class Listed:
    """The root of the shards' names, every clip in a stable order, and how many files of which kind are no clips."""

    root: Path
    members: list[Member]
    left_out: Counter[str] = field(default_factory=Counter)


def list_source(path: Path, captions: str) -> Listed:
    """The clips of the folder or table at `path`; `captions` is a table for a folder, '' for the one in it.

    Raises UserError on a source without clips, of both tars and loose clips, or of compressed tars, and on
    a table that cannot be used.
    """
    if path.is_file():
        return _list_table(path)
    files = walk(path)
    packed = [name for name in files.names if name.lower().endswith(COMPRESSED_SUFFIXES)]
    if packed:
        raise compressed_error(path / packed[0])
    tars = [name for name in files.names if suffix_of(name) == "tar"]
    clips = [name for name in files.names if media_kind(name)]
    require_one_kind(path, tars, clips)
    if not tars and not clips:
        others = [f"{number} {kind}" for kind, number in _others(files, []).most_common()]
        tables = [name for name in files.names if Path(name).suffix.lower() in TABLE_SUFFIXES]
        hint = (
            f" (a table is a source of its own: data.source={path / tables[0]})" if tables else ""
        )
        raise UserError(
            f"data.source={path} holds no clips: no .tar shard and no file ending in "
            f"{', '.join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))} or another extension of video or image; it "
            f"holds {', '.join(others) or 'nothing'}{hint}"
        )
    if tars:
        for tar in tars:
            require_name(tar, "the shard")
        return _list_tars(path, files, tars, captions)
    return _list_folder(path, files, clips, captions)


def require_one_kind(path: Path, tars: list[str], clips: list[str]) -> None:
    """Raise UserError where a folder holds shards and loose clips."""
    if tars and clips:
        raise UserError(
            f"data.source={path} holds both shards ({tars[0]}) and loose clips ({printable(clips[0])}); "
            "give them folders of their own"
        )


def require_name(name: str, what: str) -> None:
    """Raise UserError where a path is no UTF-8, which a manifest cannot hold."""
    if printable(name) != name:
        raise UserError(f"{what}={printable(name)} has a name that is no UTF-8; rename it")


def _others(files: Files, used: Iterable[str]) -> Counter[str]:
    """How many files of which kind are not among those used."""
    rest = [*files.names, *files.broken]
    kinds = Counter(
        f".{suffix_of(name)}" if suffix_of(name) else "without extension" for name in rest
    )
    for name in used:
        kinds[f".{suffix_of(name)}"] -= 1
    kinds.update(f"link to a folder that holds it ({printable(name)})" for name in files.loops)
    kinds["hidden"] = files.hidden
    return +kinds


# -- a table --------------------------------------------------------------------------------------


def _list_table(path: Path) -> Listed:
    if path.name.lower().endswith(COMPRESSED_SUFFIXES):
        raise compressed_error(path)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(
            f"data.source={path} has no known form; give a folder of clips or .tar shards, or a "
            f"table ({', '.join(TABLE_SUFFIXES)})"
        )
    table = read_table(path)
    found = {name: existing(path.parent, name) for name in table.texts}
    _require_found(table, path.parent, [name for name, file in found.items() if file is None])
    _require_once(table, path.parent)
    members = [
        _loose(path.parent, found[name] or "").with_texts(texts)
        for name, texts in table.texts.items()
        if found[name] is not None
    ]
    return Listed(path.parent, [*members, *_nameless(table, found)])


def _require_found(table: Table, root: Path, missing: list[str]) -> None:
    """Raise UserError where rows that are well formed name files that do not exist, or no clips."""
    missing = [name for name in missing if not table.texts[name].fault]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{table.path} names {len(missing)} of {len(table.texts)} files that are not in {root}: {shown}; "
            f"correct the names (they are {_how_written(missing[0])}relative to that folder) or remove the rows"
        )
    unknown = [
        name for name, one in table.texts.items() if not (one.fault or media_kind(plain(name)))
    ]
    if unknown:
        raise UserError(
            f"{table.path} names {unknown[0]!r}, which is neither a video nor an image by its extension"
        )


def _how_written(name: str) -> str:
    if "://" in name:
        return "addresses, which only a manifest may hold: `sora data index` reads shards from afar; here they are "
    if name[1:3] == ":\\":
        return "paths of a Windows machine, and should be "
    return "absolute, of another machine or folder, and should be " if name.startswith("/") else ""


def _require_once(table: Table, root: Path) -> None:
    first: dict[str, str] = {}
    for name in table.texts:
        before = first.setdefault(plain(name, root), name)
        if before != name:
            raise UserError(
                f"{table.path}: {name!r} names the clip that {before!r} named before; keep one row for each clip"
            )


def _nameless(table: Table, found: dict[str, str | None]) -> list[Member]:
    """The rows that name no clip, and those so broken that what they name is none."""
    rows = dict(table.nameless)
    unknown = [name for name, file in found.items() if file is None]
    rows |= {name: fault for name in unknown if (fault := table.texts[name].fault)}
    return [Member("", place, fault=fault, reason=BAD_ROW) for place, fault in rows.items()]


def _loose(root: Path, name: str) -> Member:
    return Member(name, name, media_kind(name), 0, (root / name).stat().st_size)


# -- a folder -------------------------------------------------------------------------------------


def _caption_table(folder: Path, files: Files, captions: str) -> tuple[Table, list[str]]:
    """The table `captions`, else the one in the folder, else an empty one; and the names of it in the folder."""
    path = Path(captions).expanduser()
    if captions and not path.exists():
        raise UserError(
            f"data.captions={captions} does not exist; give a .jsonl, .csv, .tsv or .parquet file"
        )
    if captions:
        inside = path.resolve().is_relative_to(folder.resolve())
        return read_table(path), [path.name] if inside else []
    own = [f"captions{suffix}" for suffix in TABLE_SUFFIXES if f"captions{suffix}" in files.names]
    if len(own) > 1:
        raise UserError(
            f"{folder} holds {' and '.join(own)}, and only one can be meant; choose it with data.captions=FILE"
        )
    # The datasets library's name of such a table, which other programs use for other things.
    metadata = [
        f"metadata{suffix}" for suffix in TABLE_SUFFIXES if f"metadata{suffix}" in files.names
    ]
    for name in own or [name for name in metadata if names_clips(folder / name)][:1]:
        return read_table(folder / name), [name]
    return Table(folder), []


def _list_folder(folder: Path, files: Files, clips: list[str], captions: str) -> Listed:
    table, used = _caption_table(folder, files, captions)
    _require_once(table, folder)
    texts = {plain(name, folder): one for name, one in table.texts.items()}
    sidecars = _Sidecars(files.names)
    there = {plain(name) for name in files.names}
    found = {name: name if plain(name, folder) in there else None for name in table.texts}
    _require_found(table, folder, [name for name, file in found.items() if file is None])
    members = []
    for clip in clips:
        member = _loose(folder, clip)
        if printable(clip) != clip:
            fault = "the name of the file is no UTF-8; rename it"
            members.append(Member("", printable(clip), member.kind, fault=fault, reason=BAD_NAME))
            continue
        member = member.with_texts(table.texts.get(clip) or texts.get(plain(clip)) or Texts())
        sidecar = sidecars.of(clip)
        if sidecar:
            used.append(sidecar)
        if sidecar and not member.caption and not member.fault:
            member = _with_sidecar(member, folder / sidecar)
        members.append(member)
    lost = [name for name in files.broken if media_kind(name)]
    gone = "it is a link to nowhere, or no regular file"
    members += [Member("", printable(name), media_kind(name), fault=gone) for name in lost]
    members += _nameless(table, found)
    return Listed(folder, members, _others(files, [*clips, *lost, *dict.fromkeys(used)]))


class _Sidecars:
    """The text files of a folder by the clips' names, of whatever case and form of letters."""

    def __init__(self, names: list[str]):
        texts = [name for name in sorted(names) if suffix_of(name) == "txt"]
        self._exact = {self._stem(name): name for name in texts}
        self._alike = {plain(self._stem(name)): name for name in texts}

    @staticmethod
    def _stem(name: str) -> str:
        return name.rpartition(".")[0]

    def of(self, clip: str) -> str:
        """The text beside a clip, '' where there is none."""
        stem = self._stem(clip)
        return self._exact.get(stem) or self._alike.get(plain(stem), "")


def _with_sidecar(member: Member, path: Path) -> Member:
    try:
        caption = caption_of_file(read_text(path))
    except NotText as error:
        return replace(member, fault=str(error), reason=BAD_CAPTION)
    return replace(member, caption=caption, lacks="" if caption else f"{path} is empty")


# -- tars -----------------------------------------------------------------------------------------


def _list_tars(folder: Path, files: Files, tars: list[str], captions: str) -> Listed:
    table, used = _caption_table(folder, files, captions)
    _require_once(table, folder)
    texts = {plain(name, folder): name for name in table.texts}
    named: set[str] = set()
    members = []
    left_out = _others(files, [*tars, *used])
    for tar in tars:
        for sample in list_tar(folder / tar):
            if sample.key and not sample.kind:
                left_out["key without a clip"] += 1
                continue
            member = Member.of_sample(tar, sample)
            # A table may name the member (`a.mp4`) or its key (`a`).
            row = texts.get(plain(sample.name)) or texts.get(plain(sample.key))
            if row:
                named.add(row)
                member = member.with_texts(table.texts[row])
            members.append(member)
    if not any(member.kind for member in members):
        raise UserError(f"the {len(tars)} shards of {folder} hold no clip, first {tars[0]}")
    members += _nameless(table, {name: name if name in named else None for name in table.texts})
    unused = [name for name, one in table.texts.items() if name not in named and not one.fault]
    gone = f"{table.path} names it, and no shard holds it"
    members += [Member("", printable(name), fault=gone, reason="missing_clip") for name in unused]
    return Listed(folder, members, left_out)

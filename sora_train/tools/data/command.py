"""`sora data`: a source as training sees it."""

import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sora_train.tools.terminal import (
    OVERRIDES,
    ConfigDir,
    Overrides,
    ProjectFile,
    Run,
    command_group,
    counting,
    table_of,
)

if TYPE_CHECKING:
    from sora_train.config import Config
    from sora_train.config.overrides import SettingsT
    from sora_train.config.sections.settings import SourceSettings
    from sora_train.data.manifest import Manifest
    from sora_train.tools.data.verify import Verification

data_app = command_group("Look at a source of clips the way training sees it.")


@data_app.command("index", context_settings=OVERRIDES)
def data_index(settings: Overrides = None) -> None:
    """Index a source in place and print how many clips it has and which are dropped, with reasons.

    \b
    sora data index source=my_clips
    sora data index source=table.csv captions=captions.jsonl
    sora data index source=s3://bucket/shard-{000..010}.tar output=my_index probe=header workers=16
    sora data index source=my_tars output=my_index video_key=mp4 caption_keys=[json:caption.long,txt]
    sora data index source=my_tars output=my_index part=1/4       (then the same with merge=true)
    """
    print(index_source(settings or []))


@data_app.command("show", context_settings=OVERRIDES)
def data_show(settings: Overrides = None) -> None:
    """List the clips of a source: frames, size, frame rate, caption.

    \b
    sora data show source=shards limit=20
    """
    from sora_train.config.overrides import parse_settings
    from sora_train.config.sections.settings import SourceSettings

    parsed = parse_settings(SourceSettings, settings or [])
    manifest = _open(parsed)
    shown = range(min(len(manifest), parsed.limit))
    rows = [
        (
            str(manifest.key[row]),
            str(manifest.kind[row]),
            str(manifest.frames[row]),
            f"{manifest.width[row]}x{manifest.height[row]}",
            f"{manifest.fps[row]:.5g}",
            str(manifest.drop_reason[row] or manifest.caption[row]),
        )
        for row in shown
    ]
    columns = ("clip", "kind", "frames", "size", "fps", "caption, or why it is dropped")
    print(table_of(columns, rows))
    rest = len(manifest) - len(shown)
    print(f"{rest} more; raise limit=" if rest else count(manifest))


@data_app.command("report", context_settings=OVERRIDES)
def data_report(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Write a page and a picture of what a run would make of its clips: frames, buckets, drops, captions.

    Overrides are those of a run; out=DIR says where the files go.

    \b
    sora data report experiment=quickstart
    sora data report experiment=real_tiny data.source=my_clips out=my_report
    """
    from sora_train.config.sections.settings import ReportSettings
    from sora_train.tools.data.report import account, write_data_report

    settings, cfg = _own_and_run(ReportSettings, arguments, config_dir)
    out = Path(settings.out or f"{cfg.run.dir}/data_report").expanduser()
    plan, paths = write_data_report(cfg, out)
    print(f"{account(plan)}\nwrote {', '.join(map(str, paths))}")


@data_app.command("trace", context_settings=OVERRIDES)
def data_trace(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Print which clips each rank would train on in which step, a JSON row a micro-batch; no clip is decoded.

    Overrides are those of a run; steps=A:B (B excluded), world=R ranks and out=FILE.jsonl are this command's own.

    \b
    sora data trace experiment=quickstart steps=0:4 world=2
    sora data trace experiment=real_tiny data.source=my_clips steps=100:200 world=8 out=trace.jsonl
    """
    from sora_train.config.sections.settings import TraceSettings
    from sora_train.tools.data.trace import trace

    settings, cfg = _own_and_run(TraceSettings, arguments, config_dir)
    print(trace(cfg, settings))


@data_app.command("ledger")
def data_ledger(
    run_dir: Run,
    step: Annotated[
        int | None, typer.Option(help="The checkpoint that is judged, if not the newest.")
    ] = None,
    clips: Annotated[
        int, typer.Option(min=0, help="So many clips, drawn by the seed; 0: all.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    project: ProjectFile = None,
) -> None:
    """List the training clips that a run finds mislabelled, has memorised or has never learned.

    Each clip's loss at the noise levels of validation.times, with its own caption, with other clips' and with none,
    under the averaged weights of the newest checkpoint and of the oldest that was kept. Writes RUN/ledger/step-N: a
    Parquet table of all clips, a CSV of those listed, which data.exclude takes, and a contact sheet.

    \b
    sora data ledger runs/mine
    sora data ledger runs/mine --step 2000 --clips 500
    sora train experiment=my_lora data.exclude=runs/mine/ledger/step-002000.csv
    """
    from sora_train.tools.data.ledger import LedgerRequest, ledger
    from sora_train.training.recipe import Recipe, load_recipe
    from sora_train.training.trainer import Trainer

    recipe = load_recipe(project) if project else Recipe()
    request = LedgerRequest(run_dir, step, clips, device)
    print(ledger(request, lambda run: Trainer.beside(run, recipe), recipe.config))


@data_app.command("encode", context_settings=OVERRIDES)
def data_encode(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Write shards of a run's clips as latents (and caption embeddings where the text encoder is frozen).

    Overrides are those of a run; output=DIR, keep_clips=true, dtype=float32|bfloat16|float16 and max_shard_mb= are
    this command's own, and source= is data.source=. The clips go to DIR/train, held-out ones to DIR/val. Ranks of
    torchrun share the encoding, as do parts; what was cut off goes on with the same command.

    \b
    sora data encode experiment=real_tiny source=my_clips output=encoded dtype=bfloat16
    sora data encode experiment=real_tiny source=my_clips output=encoded part=1/4  (then the same with merge=true)
    sora train experiment=real_tiny data.source=encoded/train data.val_source=encoded/val
    """
    print(encode_source(arguments or [], config_dir))


@data_app.command("verify", context_settings=OVERRIDES)
def data_verify(arguments: Overrides = None, config_dir: ConfigDir = None) -> int:
    """Encode a sample of the stored latents and caption embeddings again; exit 1 with a list where they differ.

    Overrides are those of the run whose cache is looked at; sample=SHARE% or a number of clips, and encoded=DIR (the
    output of `sora data encode`, looked at instead of the cache) are this command's own.

    \b
    sora data verify experiment=real_tiny data.source=my_clips data.cache_dir=latents sample=0.1%
    sora data verify experiment=real_tiny source=my_clips encoded=encoded sample=20
    """
    verification = verify_source(arguments or [], config_dir)
    print(verification)
    return 1 if verification.wrong else 0


def index_source(arguments: Sequence[str]) -> str:
    """Index a source; returns how many clips are usable, and which are dropped, with reasons."""
    from sora_train.config.overrides import parse_settings
    from sora_train.config.sections.settings import SourceSettings
    from sora_train.data.index.shards import is_shards

    settings = parse_settings(SourceSettings, [_quote_caption_keys(text) for text in arguments])
    names_members = settings.model_fields_set & {"caption_keys", "video_key"}
    for_shards = settings.output or settings.part or settings.merge or names_members
    if for_shards or is_shards(settings.source):
        return _index_shards(settings)
    return count(_open(settings))


def _quote_caption_keys(argument: str) -> str:
    """`caption_keys=[NAME=PLACE,...]` with every element quoted: its equals sign would begin another override."""
    key, _, value = argument.partition("=")
    if key != "caption_keys" or "=" not in value or "'" in value or '"' in value:
        return argument
    places = value.removeprefix("[").removesuffix("]").split(",")
    quoted = ",".join(f"'{place.strip()}'" for place in places)
    return f"caption_keys=[{quoted}]"


def _index_shards(settings: "SourceSettings") -> str:
    """Index shards by their names into `output`."""
    from sora_train.data.captions.texts import MAIN
    from sora_train.data.index.shards import HowToIndex, index_shards
    from sora_train.data.index.tars import MemberKeys, caption_name

    name = hashlib.sha256(settings.source.encode()).hexdigest()[:12]
    output = Path(settings.output or Path(settings.work_dir) / f"shards-{name}")
    videos = tuple(key for key in settings.video_key.lower().split(";") if key)
    how = HowToIndex(
        MemberKeys(videos, settings.caption_keys), settings.probe, settings.allow_empty_captions
    )
    with counting("indexing") as advance:
        manifest = index_shards(
            settings.source,
            output,
            how,
            workers=settings.workers,
            duplicate_keys=settings.duplicate_keys,
            part=settings.part,
            merge=settings.merge,
            progress=advance,
        )
    if manifest is None:
        return (
            f"part {settings.part} is done, its rows lie in {output}; when all parts are: the same command with "
            "merge=true instead of part="
        )
    named = [name for name, _ in map(caption_name, settings.caption_keys) if name != MAIN]
    return f"{count(manifest, named)}\nnext: sora train experiment=real_tiny {source_of(output)}"


def _open(settings: "SourceSettings") -> "Manifest":
    from sora_train.data.index.folder import open_source

    with counting("indexing") as advance:
        return open_source(
            settings.source,
            captions=settings.captions,
            work_dir=settings.work_dir,
            probe=settings.probe,
            workers=settings.workers,
            progress=advance,
            allow_empty_captions=settings.allow_empty_captions,
        )


def encode_source(arguments: Sequence[str], config_dir: Path | None) -> str:
    """Encode a run's clips; returns how many were written, and the next command."""
    from sora_train.config.sections.settings import EncodeSettings
    from sora_train.tools.data.encode import encode

    settings, cfg = _own_and_run(EncodeSettings, arguments, config_dir)
    manifests = encode(cfg, settings)
    if not manifests and settings.writes:
        return f"its share is done; the first rank writes {settings.output}"
    if not manifests:
        number, parts = settings.share
        return (
            f"its share is done, part {number} of {parts}, and lies in {settings.output}; when all are: the same "
            "command with merge=true instead of part="
        )
    lines = [count(manifest) for manifest in manifests.values()]
    keys = {"train": "data.source", "val": "data.val_source"}
    sources = [source_of(settings.folder / split, keys[split]) for split in manifests]
    return "\n".join([*lines, f"next: sora train with the same overrides and {' '.join(sources)}"])


def verify_source(arguments: Sequence[str], config_dir: Path | None) -> "Verification":
    """Encode a sample of what a run has stored again, and compare."""
    from sora_train.config.sections.settings import VerifySettings
    from sora_train.tools.data.verify import verify

    settings, cfg = _own_and_run(VerifySettings, arguments, config_dir)
    return verify(cfg, settings)


def _own_and_run(
    cls: "type[SettingsT]", arguments: Sequence[str] | None, config_dir: Path | None
) -> "tuple[SettingsT, Config]":
    """The command's own settings, and the run that the other arguments describe; source= is data.source=."""
    from sora_train.config.job import compose_arguments
    from sora_train.config.overrides import split_settings

    settings, rest = split_settings(cls, arguments or [])
    overrides = [f"data.{text}" if text.startswith("source=") else text for text in rest]
    return settings, compose_arguments(overrides, config_dir=config_dir).config


def count(manifest: "Manifest", captions: Sequence[str] = ()) -> str:
    """`used + dropped(reason) = total` in words, and a line for each dropped clip up to twenty.

    Captions are counted by name where there are others than the main one, or `captions` names some.
    """
    from sora_train.data.captions.choice import caption_counts
    from sora_train.data.decode.probe import traits_told

    dropped = manifest.dropped()
    usable = len(manifest) - sum(dropped.values())
    lines = [
        f"{manifest.root}: {len(manifest)} clips = {usable} usable + {sum(dropped.values())} dropped"
    ]
    lines += [f"  {number} {reason}" for reason, number in sorted(dropped.items())]
    lines += [f"  {line}" for line in traits_told(manifest)]
    named = caption_counts(manifest)
    if len(named) > 1 or captions:
        counts = [f"{named[name]} {name}" for name in dict.fromkeys([*named, *captions])]
        lines.append(f"  captions: {', '.join(counts)}")
    if manifest.left_out:
        others = sorted(manifest.left_out.items(), key=lambda kind: -kind[1])
        lines.append(f"  left out, no clips: {', '.join(f'{n} {kind}' for kind, n in others)}")
    faulty = [row for row in range(len(manifest)) if manifest.drop_reason[row]]
    lines += [
        f"  {manifest.key[row]}: {manifest.drop_reason[row]}, {manifest.drop_detail[row]}"
        for row in faulty[:20]
    ]
    if len(faulty) > 20:
        lines.append(f"  and {len(faulty) - 20} more")
    return "\n".join(lines)


def source_of(place: object, key: str = "data.source") -> str:
    """`key=PLACE` as a shell and then Hydra's grammar read it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    value = str(place)
    if not re.fullmatch(r"[\w./ :+-]+", value):
        value = QuotedString(value, Quote.double).with_quotes()
    return shlex.quote(f"{key}={value}")

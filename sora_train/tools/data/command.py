"""The commands of `sora prep` and `sora data`: clips into shards, and a source as training sees it."""

from pathlib import Path
from typing import Annotated

import typer

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
prep_app = typer.Typer(help="Turn raw clips into what training reads fastest.")
data_app = typer.Typer(help="Look at a source of clips the way training sees it.")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
ConfigDir = Annotated[
    Path | None, typer.Option(help="A folder with config groups and experiments of your own.")
]


@prep_app.callback()
@data_app.callback()
def _group() -> None:
    """Keeps a group a group even while it has a single command."""


@prep_app.command("shards", context_settings=OVERRIDES)
def prep_shards(settings: Overrides = None) -> None:
    """Write webdataset tars and a Parquet manifest from a folder of clips and images.

    \b
    sora prep shards input=my_clips captions=my_clips/captions.jsonl output=shards
    sora prep shards input=my_clips output=shards        (a .txt beside each clip)
    """
    from sora_train.tools.terminal import prep_shards as write

    print(write(list(settings or [])))


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
    from sora_train.tools.terminal import data_index as index

    print(index(list(settings or [])))


@data_app.command("show", context_settings=OVERRIDES)
def data_show(settings: Overrides = None) -> None:
    """List the clips of a source: frames, size, frame rate, caption.

    \b
    sora data show source=shards limit=20
    """
    from sora_train.tools.terminal import data_show as show

    print(show(list(settings or [])))


@data_app.command("report", context_settings=OVERRIDES)
def data_report(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Write a page and a picture of what a run would make of its clips: frames, buckets, drops, captions.

    Overrides are those of a run; out=DIR says where the files go.

    \b
    sora data report experiment=quickstart
    sora data report experiment=real_tiny data.source=my_clips out=my_report
    """
    from sora_train.tools.terminal import data_report as report

    print(report(list(arguments or []), config_dir))


@data_app.command("trace", context_settings=OVERRIDES)
def data_trace(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Print which clips each rank would train on in which step, a JSON row a micro-batch; no clip is decoded.

    Overrides are those of a run; steps=A:B (B excluded), world=R ranks and out=FILE.jsonl are this command's own.

    \b
    sora data trace experiment=quickstart steps=0:4 world=2
    sora data trace experiment=real_tiny data.source=my_clips steps=100:200 world=8 out=trace.jsonl
    """
    from sora_train.tools.terminal import data_trace as trace

    print(trace(list(arguments or []), config_dir))


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
    from sora_train.tools.terminal import data_encode as encode

    print(encode(list(arguments or []), config_dir))


@data_app.command("verify", context_settings=OVERRIDES)
def data_verify(arguments: Overrides = None, config_dir: ConfigDir = None) -> int:
    """Encode a sample of the stored latents and caption embeddings again; exit 1 with a list where they differ.

    Overrides are those of the run whose cache is looked at; sample=SHARE% or a number of clips, and encoded=DIR (the
    output of `sora data encode`, looked at instead of the cache) are this command's own.

    \b
    sora data verify experiment=real_tiny data.source=my_clips data.cache_dir=latents sample=0.1%
    sora data verify experiment=real_tiny source=my_clips encoded=encoded sample=20
    """
    from sora_train.tools.terminal import data_verify as verify

    text, same = verify(list(arguments or []), config_dir)
    print(text)
    return 0 if same else 1

"""`sora prep`: from raw footage, or from clips that are ready, to shards."""

from pathlib import Path
from typing import Annotated

import typer

from sora_train.tools.data.command import count, source_of
from sora_train.tools.terminal import OVERRIDES, Overrides, RunArguments, command_group, counting

prep_app = command_group("Turn footage or ready clips into what training reads fastest.")


@prep_app.command("run", context_settings=OVERRIDES)
def prep_run(arguments: RunArguments = None) -> None:
    """Turn raw footage into training shards: find scenes, cut, score, filter, remove duplicates, caption, pack.

    What was computed is kept in OUTPUT/prep: the same command goes on where it was cut off, and after a change only
    what depends on it runs again. `sora prep stages` lists every setting.

    \b
    sora prep run input=my_footage output=runs/prep
    sora prep run input=my_footage output=runs/prep filter.keep="motion > 0.02 and text_area < 0.05"
    sora prep run input=films.csv output=/shared/prep engine=ray address=auto
    sora prep run input=my_footage output=/shared/prep part=3/16      (a job of a SLURM array)
    sora prep run prep.yaml output=runs/prep until=score
    """
    from data_prep.command import prepare

    print(prepare(arguments or []))


@prep_app.command("status")
def prep_status(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The output of a run.")],
) -> None:
    """Tell how far a preparation has come: for each stage the rows kept, dropped by reason, and left to do.

    \b
    sora prep status runs/prep
    """
    from data_prep.command import status

    print(status(output))


@prep_app.command("stages", context_settings=OVERRIDES)
def prep_stages(arguments: Overrides = None) -> None:
    """List the stages in their order with every setting: its default, what it takes and what it does.

    \b
    sora prep stages
    sora prep stages stages=[my_stage.py]
    """
    from data_prep.command import listed

    print(listed(arguments or []))


@prep_app.command("shards", context_settings=OVERRIDES)
def prep_shards(settings: Overrides = None) -> None:
    """Write webdataset tars and a Parquet manifest from a folder of clips and images.

    \b
    sora prep shards input=my_clips captions=my_clips/captions.jsonl output=shards
    sora prep shards input=my_clips output=shards        (a .txt beside each clip)
    """
    from data_prep.shards import write_shards
    from sora_train.config.overrides import parse_settings
    from sora_train.config.sections.settings import ShardSettings

    parsed = parse_settings(ShardSettings, settings or [])
    with counting("reading clips") as advance:
        manifest = write_shards(
            parsed.input,
            parsed.output,
            captions=parsed.captions,
            max_shard_bytes=parsed.max_shard_mb * 10**6,
            allow_empty_captions=parsed.allow_empty_captions,
            workers=parsed.workers,
            progress=advance,
        )
    print(f"{count(manifest)}\nnext: sora train experiment=real_tiny {source_of(parsed.output)}")

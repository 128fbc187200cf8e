"""`sora plan` and `sora models`: what a run needs and costs, and the shipped sizes side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sora_train.tools.terminal import ConfigDir, JsonFile, Overrides, table_of, write_json

if TYPE_CHECKING:
    from sora_train.config.job import JobConfig
    from sora_train.tools.plan.assumptions import Assumptions
    from sora_train.tools.plan.time.cluster import Cluster

DEFAULT_CLUSTER = "8xH100"
NO_CLIPS = "data.source is empty"


def plan(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE.yaml] [cluster=NxNAME] [KEY=VALUE]...")
    ] = None,
    json_file: JsonFile = "",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with charts.")
    ] = None,
    header: Annotated[
        bool,
        typer.Option(
            "--header", help="Print the lines that stand in the head of an experiment's file."
        ),
    ] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Plan a run: memory, communication, step time, MFU, days and cost, and the layout to choose.

    cluster=8xH100, or hardware=8xH100, names GPUs (H100, H200, A100-80, B200, L40S, 5090, 4090, 4080, 4070, cpu; by
    their memory 1x24GB; or 8xmy_gpu.yaml); cluster.price=2.1 and the like change its numbers, plan.gemm=0.7 and the
    like what is assumed. Nothing is read but the config: no clips, no weights. docs/plan.md tells how each number is
    made.

    \b
    sora plan experiment=quickstart cluster=2xcpu
    sora plan experiment=wan_1_3b_curriculum cluster=64xH100 --html plan.html
    sora plan experiment=wan_1_3b_lora hardware=1x24GB
    sora plan experiment=wan_14b_finetune cluster=64xH100 plan.keep_layout=true --json plan.json
    sora plan model=wan_14b text.d_model=4096 buckets=480p cluster=16xH200 cluster.price=3
    """  # fmt: skip
    from sora_train.base.console import plain_console
    from sora_train.tools.plan import text

    values = plan_with_progress(*parse_command(list(arguments or []), config_dir))
    if html is not None:
        from sora_train.base.files import write_atomically
        from sora_train.tools.plan.page import page

        write_atomically(html, page(values))
    write_json(values, json_file)
    if header:
        print("\n".join(f"# {line}" for line in text.header(values)))
    elif json_file != "-":
        console = plain_console(width=text.WIDTH)
        text.show(values, console)
        for path in filter(None, (html, json_file)):
            console.print(f"wrote {path}")


def parse_command(
    arguments: list[str], config_dir: Path | None
) -> "tuple[JobConfig, Cluster, Assumptions]":
    """The run, the machines and the assumptions of a command line.

    Raises:
        ConfigError: one of them is wrong.
    """
    from sora_train.config.overrides import parse_overrides
    from sora_train.tools.plan.assumptions import Assumptions
    from sora_train.tools.plan.time.cluster import parse_cluster, read_settings

    name = DEFAULT_CLUSTER
    settings: dict[str, dict[str, Any]] = {"cluster": {}, "plan": {}}
    rest = []
    for text in arguments:
        key, _, value = text.partition("=")
        section, _, field = key.partition(".")
        if key in ("cluster", "hardware"):
            name = value
        elif section in settings and field:
            settings[section][field] = parse_overrides([f"value={value}"])[0].value()
        else:
            rest.append(text)
    assume = read_settings("plan", Assumptions, settings["plan"])
    cluster = parse_cluster(name, settings["cluster"])
    return _job(rest, config_dir), cluster, assume


def _job(arguments: list[str], config_dir: Path | None) -> "JobConfig":
    """The job, whose clips need not be there yet."""
    from sora_train.config.job import compose_job
    from sora_train.errors import ConfigError

    try:
        return compose_job(arguments, config_dir=config_dir)
    except ConfigError as error:
        if NO_CLIPS not in str(error):
            raise
        return compose_job([*arguments, "data.source=clips_to_come"], config_dir=config_dir)


def plan_with_progress(
    job: "JobConfig", cluster: "Cluster", assume: "Assumptions"
) -> dict[str, Any]:
    """The plan as plain values, with a bar of progress on standard error."""
    import sys

    from rich.progress import Progress

    from sora_train.base.console import plain_console
    from sora_train.tools.plan.plan import plan_run

    console = plain_console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("plan", total=None)

        def progress(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        return plan_run(job.config, job.stages, cluster, assume, progress)


def models(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """List the shipped sizes of the transformer: parameters, and operations of training for each token.

    \b
    sora models
    sora models model.patch_size=[1,4,4]
    """
    from sora_train.tools.plan.model_sizes import COLUMNS, rows

    print(table_of(COLUMNS, [cells for _, cells in rows(arguments or [], config_dir)]))

"""The commands of `sora launch`: one config, composed and frozen once, started here or handed to a scheduler."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sora_train.tools.terminal import OVERRIDES, ConfigDir, ScriptArguments, command_group

if TYPE_CHECKING:
    from sora_train.tools.launch.job import Job

launch_app = command_group(
    "Start a run on this machine, or hand it to SLURM or Kubernetes; it goes on by itself when it is preempted."
)
Printed = Annotated[
    bool, typer.Option("--print", help="Print what would be run or submitted, and stop.")
]


@launch_app.command("local", context_settings=OVERRIDES)
def local(
    arguments: ScriptArguments = None, config_dir: ConfigDir = None, printed: Printed = False
) -> None:
    """Run on the GPUs of this machine, a process each.

    \b
    sora launch local experiment=quickstart
    sora launch local experiment=quickstart launch.ranks=2 run.dir=runs/two
    """
    from sora_train.tools.launch import local as launcher

    job = job_of(arguments, config_dir)
    if printed:
        print(launcher.render(job), end="")
        return
    launcher.run(job)


@launch_app.command("slurm", context_settings=OVERRIDES)
def slurm(
    arguments: ScriptArguments = None,
    config_dir: ConfigDir = None,
    printed: Printed = False,
    multirun: Annotated[
        bool,
        typer.Option("-m", "--multirun", help="An array, a task for each combination of a=1,2."),
    ] = False,
) -> None:
    """Submit a batch job: one torchrun a node, requeued with everything saved when its time is up.

    \b
    sora launch slurm experiment=quickstart launch.nodes=4 launch.ranks=8 launch.time=24:00:00 --print
    sora launch slurm my.yaml launch=my_cluster run.dir=/shared/runs/mine --config-dir my_configs
    sora launch slurm -m my.yaml optim.lr=1e-4,3e-4 seed=0,1 launch=my_cluster launch.array_limit=2
    """
    from sora_train.tools.launch import slurm as launcher

    if multirun:
        from sora_train.tools.launch.array import array_of

        job, tasks = array_of(arguments or [], config_dir)
    else:
        job, tasks = job_of(arguments, config_dir), []
    if multirun and not tasks:
        print(f"all of it is done; next: sora sweep report {shlex.quote(str(job.run_dir))}")
        return
    script = launcher.render(job, tasks)
    if printed:
        print(script, end="")
        return
    job.logs.mkdir(parents=True, exist_ok=True)
    number = launcher.submit(script)
    if tasks:
        print(
            f"array {number} of {len(tasks)} runs is in the queue; `squeue -j {number}`, its logs are "
            f"{job.logs}/slurm-{number}_N.out\nnext: sora sweep report {shlex.quote(str(job.run_dir))}"
        )
        return
    print(
        f"job {number} is in the queue; `squeue -j {number}`, its log is {job.logs}/slurm-{number}.out"
    )


@launch_app.command("k8s", context_settings=OVERRIDES)
def k8s(
    arguments: ScriptArguments = None, config_dir: ConfigDir = None, printed: Printed = False
) -> None:
    """Apply a JobSet: a pod for each node, started again until the run is done.

    \b
    sora launch k8s experiment=quickstart launch.nodes=2 launch.ranks=8 launch.image=me/sora launch.claim=work --print
    """
    from sora_train.tools.launch import k8s as launcher

    manifest = launcher.render(job_of(arguments, config_dir))
    print(manifest if printed else launcher.submit(manifest), end="" if printed else "\n")


def job_of(arguments: list[str] | None, config_dir: Path | None) -> "Job":
    """The job of a command line, its configuration checked, and frozen in its run folder."""
    from sora_train.config import LaunchConfig
    from sora_train.config.job import compose_job, freeze, frozen_values, split_script
    from sora_train.config.messages import validated
    from sora_train.tools.launch.check import check_job
    from sora_train.tools.launch.job import Job
    from sora_train.tools.launch.local import ranks_here

    script: tuple[str, ...] = ("-m", "sora_train.train")
    own, rest = split_script(arguments or [])
    if config_dir is not None:
        rest += ["--config-dir", str(config_dir)]
    if own is not None:
        # Only the file itself knows the class of its configuration.
        script = (str(own.resolve()),)
        command = [sys.executable, *script, *rest, "--freeze"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            # It has told why.
            raise typer.Exit(done.returncode)
        path = Path(done.stdout.splitlines()[-1]).resolve()
    else:
        job = compose_job(rest)
        check_job(job)
        path = freeze(job).resolve()
    values = frozen_values(path)["config"]
    cfg, run_dir = validated(LaunchConfig, values["launch"]), Path(values["run"]["dir"])
    name = values["name"] if values["name"] != "default" else run_dir.name
    return Job(name, run_dir.resolve(), path, Path.cwd(), cfg, ranks_here(cfg), script)

"""Sweeps: stable names, a process a run, what is finished is not run again; a search goes on as if never stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses, says

from sora_train.errors import ConfigError, UserError
from sora_train.tools.sweep.axes import grid, run_id, split
from sora_train.tools.sweep.folder import open_sweep, read_sweep
from sora_train.tools.sweep.local import shares
from sora_train.tools.sweep.template import Template

REPO = Path(__file__).resolve().parents[2]
OWN = """
import json, os, signal, sys, time
from pathlib import Path
from sora_train.config import Config
from sora_train.train import main

class Own:
    def __init__(self, cfg): self.cfg = cfg
    def train(self):
        cfg, folder = self.cfg, Path(self.cfg.run.dir)
        with open("started.txt", "a") as file: file.write(f"{folder.name}\\n")
        if Path("die").exists() and cfg.seed == 1: os.kill(os.getpid(), 9)
        if Path("leave").exists() and cfg.seed == 1: os._exit(75)
        if Path("slow").exists():
            signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
            Path("sleeping").touch()
            time.sleep(60)
        folder.mkdir(parents=True, exist_ok=True)
        loss = abs(cfg.optim.lr - 0.3) + cfg.seed
        (folder / "run.json").write_text("{}")
        (folder / "devices").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        row = {"step": cfg.train.steps, "time": 0.0, "val/loss": loss}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
        (folder / "summary.json").write_text(json.dumps({"steps": cfg.train.steps}))

if __name__ == "__main__":
    main(Own, Config)
"""
"""A project whose runs take no time, but for the import."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def sweep(project: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sora_train", "train", "own.py", "-m", *arguments]
    return subprocess.run(
        command,
        cwd=project,
        env=environment() | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    }


def started(project: Path) -> list[str]:
    return (project / "started.txt").read_text().split()


# --- the grammar ---


def test_a_sweep_expands_to_every_combination_under_stable_names():
    fixed, axes = split(["train.steps=5", "seed=0,1", "optim.lr=0.1,0.2"])
    jobs = grid(axes)
    assert fixed == ["train.steps=5"]
    assert [job.id for job in jobs] == [
        f"optim.lr={lr},seed={seed}" for seed in (0, 1) for lr in (0.1, 0.2)
    ]
    assert jobs[0].overrides == ["seed=0", "optim.lr=0.1"]
    again = grid(split(["optim.lr=0.2,0.1", "seed=1,0", "train.steps=5"])[1])
    assert {job.id for job in again} == {job.id for job in jobs}


def test_long_and_odd_values_get_short_distinct_names():
    values = [f'"{"x y" * 50}{i}"' for i in range(3)]
    jobs = grid(split(["name=" + ",".join(values)])[1])
    assert len({job.id for job in jobs}) == 3
    assert all(len(job.id) < 100 and "/" not in job.id and " " not in job.id for job in jobs)


VALUES = st.dictionaries(st.text(max_size=60), st.text(max_size=60), min_size=1, max_size=3)


@given(VALUES)
def test_a_name_is_a_folders_and_knows_no_order(values: dict[str, str]):
    name = run_id(values)
    assert name == run_id(dict(reversed(values.items())))
    assert 0 < len(name.encode()) <= 255 and "/" not in name and name not in (".", "..")


def test_ranges_and_choices_are_hydras():
    jobs = grid(split(["seed=range(0,3)"])[1])
    assert [job.id for job in jobs] == ["seed=0", "seed=1", "seed=2"]
    assert [job.id for job in grid(split(["seed=1,1,2"])[1])] == ["seed=1", "seed=2"]


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["optim.lr=interval(0,1)"], ("sweep.method=tpe",)),
        (["optim.lr=interval(1,0)"], ("smaller", "larger")),
        (["optim.lr=tag(log,interval(0,1))"], ("smaller positive number",)),
        (["run.dir=a,b"], ("run.dir",)),
        (["launch.nodes=1,2"], ("all runs",)),
    ],
)
def test_what_cannot_be_swept_is_a_sentence(overrides: list[str], facts: tuple[str, ...]):
    with refuses(ConfigError, *facts):
        grid(split(overrides)[1])


# --- the folder ---


def test_the_folder_grows_and_refuses_what_is_another_sweep(tmp_path: Path):
    axes = split(["optim.lr=0.1,0.2"])[1]
    open_sweep(tmp_path, [], axes).with_runs(grid(axes)).write()
    more = split(["optim.lr=0.3,0.2"])[1]
    grown = open_sweep(tmp_path, ["seed=1"], more).with_runs(grid(more))
    grown.write()
    assert grown == read_sweep(tmp_path)
    assert grown.axes == {"optim.lr": ["0.1", "0.2", "0.3"]}
    assert [job.id for job in grown.runs] == ["optim.lr=0.1", "optim.lr=0.2", "optim.lr=0.3"]
    with refuses(UserError, "optim.lr", "seed", "another run.dir"):
        open_sweep(tmp_path, [], split(["seed=1,2"])[1])
    with refuses(UserError, "another search", "method=grid"):
        open_sweep(tmp_path, [], more, {"method": "tpe", "metric": "val/loss", "trials": 3})
    (tmp_path / "sweep.json").write_text("{")
    with refuses(UserError, "sweep.json", "damaged"):
        open_sweep(tmp_path, [], axes)


def test_gpus_are_shared_out_among_runs_side_by_side(monkeypatch: pytest.MonkeyPatch):
    from sora_train.config import LaunchConfig

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    shared = [share["CUDA_VISIBLE_DEVICES"] for share in shares(2, LaunchConfig())]
    assert shared == ["4,5", "6,7"]
    assert shares(1, LaunchConfig()) == [{}]
    with refuses(ConfigError, "at_once=2", "4 rank", "5 GPU"):
        shares(2, LaunchConfig(ranks=4))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert shares(2, LaunchConfig()) == [{}, {}]


# --- runs ---


@pytest.mark.slow
def test_a_killed_run_stops_no_other_and_only_it_is_run_again(project: Path):
    (project / "die").touch()
    done = sweep(project, "seed=1,0", "optim.lr=0.1", "run.dir=out")
    assert done.returncode == 1
    assert started(project) == ["seed=1", "seed=0"]
    assert "1 of 2 runs succeeded" in done.stdout
    says(done.stderr, "failed", "seed=1", "-9")
    says(done.stderr, "not finished")
    (project / "die").unlink()
    done = sweep(project, "seed=1,0,2", "optim.lr=0.1", "run.dir=out")
    assert done.returncode == 0, done.stderr
    says(done.stdout, "1 of 3", "finished")
    assert "run 2 of 2" in done.stdout
    assert started(project) == ["seed=1", "seed=0", "seed=1", "seed=2"]
    told = json.loads((project / "out/sweep.json").read_text())
    assert told["axes"] == {"seed": ["1", "0", "2"]} and told["fixed"][0] == "optim.lr=0.1"
    assert [job["id"] for job in told["jobs"]] == ["seed=1", "seed=0", "seed=2"]
    # More steps are not finished by fewer.
    done = sweep(project, "seed=1,0", "optim.lr=0.1", "run.dir=out", "train.steps=2000")
    assert done.returncode == 0 and started(project)[4:] == ["seed=1", "seed=0"]


@pytest.mark.slow
def test_a_run_that_leaves_takes_the_sweep_along(project: Path):
    (project / "leave").touch()
    done = sweep(project, "seed=1,0", "run.dir=out")
    assert done.returncode == 75 and started(project) == ["seed=1"]
    says(done.stderr, "same command")


@pytest.mark.slow
def test_runs_side_by_side_have_logs_and_gpus_of_their_own(project: Path):
    done = sweep(project, "seed=0,1", "sweep.at_once=2", "run.dir=out", CUDA_VISIBLE_DEVICES="2,3")
    assert done.returncode == 0, done.stderr
    devices = {path.read_text() for path in (project / "out").glob("*/devices")}
    assert devices == {"2", "3"}
    assert len(list((project / "out").glob("*/sweep.log"))) == 2


def test_told_to_leave_it_tells_its_run_and_starts_no_other(project: Path):
    (project / "slow").touch()
    command = [sys.executable, "-m", "sora_train", "train", "own.py", "-m", "seed=0,1"]
    process = subprocess.Popen(command, cwd=project, env=environment(), stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while not (project / "sleeping").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert started(project) == ["seed=0"]


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["seed=0,-1"], ("seed", "at least 0", "-1")),
        (["optim.lrr=1,2"], ("optim.lr",)),
        (["model=s,huge"], ("huge", "there are")),
        (["seed=interval(1,2)"], ("sweep.method=tpe",)),
    ],
)
def test_a_mistake_is_met_before_the_first_run(
    project: Path, arguments: list[str], facts: tuple[str, ...]
):
    done = sweep(project, *arguments)
    assert done.returncode == 2 and not (project / "started.txt").exists()
    says(done.stderr, *facts)
    assert not list(project.rglob("sweep.json"))


@pytest.mark.parametrize("more", [[], ["sweep.method=tpe"]])
def test_an_axis_may_be_a_key_that_a_run_cannot_do_without(more: list[str], tmp_path: Path):
    """real_tiny asks for its clips, and is checked with a value of each axis."""
    fixed, axes = split(
        ["experiment=real_tiny", f"run.dir={tmp_path}", *more, "data.source=one,two"]
    )
    template = Template(fixed)
    assert template.base(axes).run.dir == str(tmp_path)
    sources = {config.data.source for config in template.compose_all(grid(axes), tmp_path).values()}
    assert sources == {"one", "two"}
    with refuses(ConfigError, "data.source"):
        template.base([])


@pytest.mark.parametrize(
    ("key", "first"),
    [("optim.lr=interval(0.5,2)", "0.5"), ("seed=interval(3,9)", "3"), ("a=x,y", "x")],
)
def test_the_first_point_of_an_axis_is_its_lowest_or_its_first(key: str, first: str):
    (axis,) = split([key])[1]
    assert axis.first == first


def test_a_sweep_does_not_run_under_torchrun(project: Path):
    done = sweep(project, "seed=0,1", WORLD_SIZE="2", SORA_DEBUG="0")
    assert done.returncode == 2 and "torchrun" in done.stderr


# --- searches ---

SEARCH = ["sweep.method=tpe", "sweep.trials=14", "optim.lr=tag(log,interval(0.01,1))"]


def trials(project: Path, name: str) -> list[tuple[str, dict[str, str]]]:
    told = json.loads((project / name / "sweep.json").read_text())
    return [(job["id"], job["values"]) for job in told["jobs"]]


@pytest.fixture
def in_process(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs are trained by a function instead of a process: what is looked at is what Optuna is told."""
    import shlex

    from sora_train.tools.sweep.local import Runner, Task

    monkeypatch.chdir(project)

    def train(runner: Runner, task: Task, environ: dict[str, str]) -> int:
        values = {key: value for key, value in task.run.values.items()}
        folder = Path(shlex.split(task.command[-1].removeprefix("run.dir="))[0])
        if Path("stop_at").exists() and task.run.id == Path("stop_at").read_text():
            return 75
        folder.mkdir(parents=True, exist_ok=True)
        lr, seed = float(values["optim.lr"]), int(values.get("seed", 0))
        row = {"step": 1, "time": 0.0, "val/loss": abs(math.log(lr / 0.3)) + seed}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return 3 if seed == 3 else 0

    monkeypatch.setattr(Runner, "in_process", train)
    return project


def search(*arguments: str) -> int:
    from sora_train.config import Config
    from sora_train.train import train

    return train(None, Config, ["-m", *SEARCH, *arguments])


def test_a_search_finds_what_is_best_and_goes_on_as_if_never_stopped(
    in_process: Path, capsys: pytest.CaptureFixture[str]
):
    assert search("run.dir=straight", "seed=0,1") == 0
    best = capsys.readouterr().out.strip().splitlines()[-1]
    assert "best: trial-" in best and "seed=0" in best
    found = trials(in_process, "straight")
    assert len(found) == 14 and all(0.01 <= float(values["optim.lr"]) <= 1 for _, values in found)
    errors = [abs(math.log(float(values["optim.lr"]) / 0.3)) for _, values in found]
    assert min(errors[7:]) < 0.5

    (in_process / "stop_at").write_text("trial-0011")
    assert search("run.dir=stopped", "seed=0,1") == 75
    assert len(trials(in_process, "stopped")) == 12
    (in_process / "stop_at").unlink()
    assert search("run.dir=stopped", "seed=0,1") == 0
    assert trials(in_process, "stopped") == found
    assert search("run.dir=stopped", "seed=0,1") == 0, "nothing is left to do"
    assert trials(in_process, "stopped") == found
    with pytest.raises(UserError, match="holds another search"):
        search("run.dir=stopped", "seed=0,1,2")


def test_failed_trials_are_told_and_not_learnt_from(
    in_process: Path, capsys: pytest.CaptureFixture[str]
):
    assert search("run.dir=half", "seed=0,3", "sweep.trials=6") == 1
    out = capsys.readouterr().out
    says(out, "learns nothing")
    assert "seed=0" in out.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["sweep.metric=val/los"], ("val/loss",)),
        (["validation.every=0"], ("validation.every=0",)),
        (["seed=-1,0"], ("whole number",)),
    ],
)
def test_a_search_that_cannot_learn_is_not_begun(
    in_process: Path, arguments: list[str], facts: tuple[str, ...]
):
    with refuses(ConfigError, *facts):
        search("run.dir=out", *arguments)
    assert not (in_process / "out").exists()


def test_whole_numbers_are_drawn_where_the_key_takes_no_others(in_process: Path):
    assert search("run.dir=out", "sweep.trials=3", "train.steps=interval(10,1000)") == 0
    assert all(values["train.steps"].isdigit() for _, values in trials(in_process, "out"))


def test_nothing_swept_is_nothing_to_search(in_process: Path):
    from sora_train.config import Config
    from sora_train.train import train

    with pytest.raises(ConfigError, match="nothing to search"):
        train(None, Config, ["-m", "sweep.method=random"])

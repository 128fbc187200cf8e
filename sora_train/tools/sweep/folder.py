"""A sweep's folder: `sweep.json` names the axes and the runs; the state of a run is in its own folder alone.

DIR/sweep.json                    what was swept, and the runs it made so far
DIR/optim.lr=1e-4,seed=0/         a run folder each
DIR/study.journal                 a search's trials, by Optuna
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sora_train.base.files import write_atomically
from sora_train.config import Config
from sora_train.errors import UserError
from sora_train.monitoring.status import is_run, state_of, tail_rows
from sora_train.tools.sweep.axes import Axis, SweepRun

NAME = "sweep.json"
FORMAT = 1


@dataclass(frozen=True)
class Sweep:
    folder: Path
    fixed: list[str]
    """Overrides that all runs share, as they were given last."""
    axes: dict[str, list[str]]
    """The values of each key, in the order in which they came."""
    runs: list[SweepRun] = field(default_factory=list)
    search: dict[str, Any] | None = None
    """Method, metric, goal and trials of a search; None where every combination is run."""

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {
            "format": FORMAT,
            "fixed": self.fixed,
            "axes": self.axes,
            "search": self.search,
            "jobs": [asdict(run) for run in self.runs],
        }
        write_atomically(self.folder / NAME, json.dumps(values, indent=1))

    def with_runs(self, runs: list[SweepRun]) -> "Sweep":
        """With these runs too; those it has keep their places."""
        return replace(self, runs=list({run.id: run for run in [*self.runs, *runs]}.values()))


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep of a folder, None where there is none. Raises UserError where sweep.json is damaged."""
    path = folder / NAME
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has format {values['format']}, and this version reads {FORMAT}; use the version that wrote it"
            )
        runs = [SweepRun(str(run["id"]), dict(run["values"])) for run in values["jobs"]]
        return Sweep(folder, list(values["fixed"]), dict(values["axes"]), runs, values["search"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it, and the same sweep writes it again"
        ) from error


def open_sweep(
    folder: Path, fixed: list[str], axes: list[Axis], search: dict[str, Any] | None = None
) -> Sweep:
    """The sweep of a folder with these axes: new, or the one that is there with the values that are new.

    Raises:
        UserError: the sweep that is there goes over other keys, or searches other ranges or for something else.
    """
    here, values = read_sweep(folder), {axis.key: axis.written for axis in axes}
    if here is None:
        return Sweep(folder, fixed, values, [], search)
    if set(here.axes) != set(values):
        raise UserError(
            f"{folder} holds a sweep over {', '.join(sorted(here.axes)) or 'nothing'}, not over "
            f"{', '.join(sorted(values)) or 'nothing'}; give another run.dir"
        )
    if _criteria(here.search) != _criteria(search) or (search and here.axes != values):
        raise UserError(
            f"{folder} holds another search ({_described(here)}); give another run.dir, or the same ranges, method, "
            "metric and goal"
        )
    merged = {key: list(dict.fromkeys([*here.axes[key], *values[key]])) for key in here.axes}
    return replace(here, fixed=fixed, axes=merged, search=search)


def _criteria(search: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (search or {}).items() if key != "trials"}


def _described(sweep: Sweep) -> str:
    criteria = [f"{key}={value}" for key, value in _criteria(sweep.search).items()] or [
        "method=grid"
    ]
    return ", ".join([*criteria, *(f"{key}={'|'.join(v)}" for key, v in sweep.axes.items())])


def is_done(run_dir: Path, config: Config) -> bool:
    """Whether the run in this folder has taken all the steps that `config` wants, and has ended."""
    # A stage may have steps of its own; where it ended it had them all.
    steps = {run_dir / stage.name: 0 for stage in config.stages} or {run_dir: config.train.steps}
    return all(_finished(folder, count) for folder, count in steps.items())


def _finished(run_dir: Path, steps: int) -> bool:
    if not is_run(run_dir):
        return False
    rows = tail_rows(run_dir / "metrics.jsonl")
    state, _ = state_of(run_dir, rows, steps, None, 0.0)
    return state == "finished" and (not rows or rows[-1]["step"] >= steps)

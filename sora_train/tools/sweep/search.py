"""A search: Optuna proposes each trial's values from the results so far, the trial is a run like any other.

    Bergstra et al., "Algorithms for Hyper-Parameter Optimization" (2011), is the method of `tpe`.

The study is kept by Optuna in `study.journal` of the sweep's folder. A trial that was under way when the search was
ended is run on to its end by the next call; it is neither lost nor proposed anew.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_train.config import Config
from sora_train.config.schema import keys
from sora_train.errors import ConfigError, UserError
from sora_train.monitoring.metrics import METRICS, read_metrics
from sora_train.tools.sweep.axes import Axis, Job
from sora_train.tools.sweep.folder import Sweep, opened
from sora_train.tools.sweep.local import Runner, Task
from sora_train.tools.sweep.run import begun, told
from sora_train.tools.sweep.template import Template

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"


def run_search(template: Template, base: Config, axes: Sequence[Axis]) -> int:
    """Run trials until there are `sweep.trials` of them; returns the exit code as `run_sweep`.

    Raises:
        ConfigError: nothing is swept, the metric is never logged, or a value does not compose.
        UserError: Optuna is missing, or the folder holds another search.
    """
    check(base, axes)
    axes = [whole_if_the_key_is(axis, type(base)) for axis in axes]
    # Both ends and all values of every axis, with the first of the others.
    template.composed(corners(axes), Path(base.run.dir))
    wanted = base.sweep
    search = wanted.model_dump(include={"method", "metric", "goal", "trials"})
    sweep = opened(Path(base.run.dir), template.fixed, list(axes), search)
    sweep.write()
    return Search(template, base, axes, sweep).run()


class Search:
    def __init__(self, template: Template, base: Config, axes: Sequence[Axis], sweep: Sweep):
        self.template, self.base, self.axes, self.sweep = template, base, axes, sweep
        self.study = open_study(sweep.folder, base)
        self.trials: dict[str, int] = {}
        """Numbers of the trials under way, by their runs."""

    def run(self) -> int:
        outcome = {}
        with Runner(self.base.sweep.at_once, self.base.launch) as runner:
            for task, code in runner.results(self.tasks()):
                outcome[task.job.id] = code
                # A trial that was told to leave is under way still.
                if not (runner.stopping and code):
                    self.tell(task.job, code)
        code = told(self.sweep, outcome, stopped=runner.stopping)
        self.say_best()
        return code

    def tasks(self) -> Iterator[Task]:
        """First the trials that an earlier call left under way, then new ones, each proposed when there is room."""
        from optuna.trial import TrialState

        for left in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            yield self.begin(left.number, left.params)
        while len(self.study.get_trials(deepcopy=False)) < self.base.sweep.trials:
            number = len(self.study.get_trials(deepcopy=False))
            # One for each trial: after an interruption it proposes what it would have proposed without.
            self.study.sampler = sampler(self.base, number)
            trial = self.study.ask({axis.key: distribution(axis) for axis in self.axes})
            yield self.begin(trial.number, trial.params)

    def begin(self, number: int, params: dict[str, Any]) -> Task:
        values = {axis.key: str(params[axis.key]) for axis in self.axes}
        job = Job(f"trial-{number:04d}", values)
        self.trials[job.id] = number
        self.sweep = self.sweep.with_jobs([job])
        self.sweep.write()
        print(", ".join(job.overrides))
        config = self.template.compose(self.template.of(job, self.sweep.folder))
        place = f"{number + 1} of {self.base.sweep.trials}"
        return begun(self.template, self.sweep, job, config, self.base.sweep.at_once, place)

    def tell(self, job: Job, code: int) -> None:
        from optuna.trial import TrialState

        value = (
            None
            if code
            else final(self.sweep.folder / job.id / "metrics.jsonl", self.base.sweep.metric)
        )
        if value is None:
            self.study.tell(self.trials[job.id], state=TrialState.FAIL)
            print(f"{job.id}: no {self.base.sweep.metric}, so the search learns nothing from it")
            return
        self.study.tell(self.trials[job.id], value)
        print(f"{job.id}: {self.base.sweep.metric} {value:.6g}", flush=True)

    def say_best(self) -> None:
        from optuna.trial import TrialState

        if self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            best = self.study.best_trial
            words = " ".join(f"{key}={value}" for key, value in best.params.items())
            print(
                f"best: trial-{best.number:04d}, {self.base.sweep.metric} {best.value:.6g}, {words}"
            )


def check(base: Config, axes: Sequence[Axis]) -> None:
    wanted = base.sweep
    if not axes:
        raise ConfigError(
            f"sweep.method={wanted.method} has nothing to search; give keys several values, or an interval: "
            "'optim.lr=tag(log,interval(1e-5,1e-3))'"
        )
    families = [name.partition("*")[0] for name in METRICS if "*" in name]
    if wanted.metric not in METRICS and not wanted.metric.startswith(tuple(families)):
        near = difflib.get_close_matches(wanted.metric, METRICS, 1)
        raise ConfigError(
            f"sweep.metric={wanted.metric} is no metric; {f'did you mean {near[0]}? ' if near else ''}docs/metrics.md "
            "lists them"
        )
    if wanted.metric.startswith("val/") and not base.validation.every:
        raise ConfigError(
            f"sweep.metric={wanted.metric} is never logged with validation.every=0; set validation.every, or search "
            "by sweep.metric=train/loss"
        )


def whole_if_the_key_is(axis: Axis, config_cls: type[Config]) -> Axis:
    """The axis with whole numbers where its key takes no others; Hydra's intervals are of fractions."""
    from dataclasses import replace

    key = keys(config_cls).get(axis.key)
    if axis.interval is None or key is None or key.field.annotation is not int:
        return axis
    return replace(axis, interval=replace(axis.interval, whole=True))


def corners(axes: Sequence[Axis]) -> list[Job]:
    """Runs in which every value of every axis occurs, and both ends of every interval."""
    values = {axis.key: ends(axis) for axis in axes}
    first = {key: found[0] for key, found in values.items()}
    return [
        Job(f"{key}={value}", first | {key: value})
        for key, found in values.items()
        for value in found
    ]


def ends(axis: Axis) -> list[str]:
    if axis.interval is None:
        return list(axis.values)
    cast = int if axis.interval.whole else float
    return [str(cast(axis.interval.low)), str(cast(axis.interval.high))]


def distribution(axis: Axis) -> "optuna.distributions.BaseDistribution":
    from optuna import distributions

    found = axis.interval
    if found is None:
        return distributions.CategoricalDistribution(list(axis.values))
    if found.whole:
        return distributions.IntDistribution(int(found.low), int(found.high), log=found.log)
    return distributions.FloatDistribution(found.low, found.high, log=found.log)


def sampler(base: Config, number: int) -> "optuna.samplers.BaseSampler":
    from optuna import samplers

    seed = (base.sweep.seed * 1_000_003 + number) % 2**32
    if base.sweep.method == "random":
        return samplers.RandomSampler(seed=seed)
    # Trials under way count as poor ones, so that several at once are not the same.
    return samplers.TPESampler(seed=seed, constant_liar=base.sweep.at_once > 1)


def open_study(folder: Path, base: Config) -> "optuna.Study":
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UserError(
            f"sweep.method={base.sweep.method} searches with Optuna, which is not installed; "
            "pip install 'sora_train[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    return optuna.create_study(
        study_name="sweep",
        storage=storage,
        direction=base.sweep.goal,
        load_if_exists=True,
    )


def final(metrics: Path, name: str) -> float | None:
    """The last value of a metric, None where there is none or it is not finite."""
    if not metrics.is_file():
        return None
    values = [row[name] for row in read_metrics(metrics) if name in row]
    return values[-1] if values and math.isfinite(values[-1]) else None

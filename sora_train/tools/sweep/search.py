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
from sora_train.tools.sweep.axes import Axis, SweepRun
from sora_train.tools.sweep.folder import Sweep, open_sweep
from sora_train.tools.sweep.local import Runner, Task, report_outcome, started_task
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
    template.compose_all(corners(axes), Path(base.run.dir))
    settings = base.sweep
    search = settings.model_dump(include={"method", "metric", "goal", "trials"})
    sweep = open_sweep(Path(base.run.dir), template.fixed, list(axes), search)
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
                outcome[task.run.id] = code
                # A trial that was asked to leave is still under way.
                if not (runner.stopping and code):
                    self.tell(task.run, code)
        code = report_outcome(self.sweep, outcome, stopped=runner.stopping)
        self.print_best()
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
        run = SweepRun(f"trial-{number:04d}", values)
        self.trials[run.id] = number
        self.sweep = self.sweep.with_runs([run])
        self.sweep.write()
        print(", ".join(run.overrides))
        config = self.template.compose(self.template.overrides_of(run, self.sweep.folder))
        place = f"{number + 1} of {self.base.sweep.trials}"
        return started_task(self.template, self.sweep, run, config, self.base.sweep.at_once, place)

    def tell(self, run: SweepRun, code: int) -> None:
        from optuna.trial import TrialState

        value = (
            None
            if code
            else final(self.sweep.folder / run.id / "metrics.jsonl", self.base.sweep.metric)
        )
        if value is None:
            self.study.tell(self.trials[run.id], state=TrialState.FAIL)
            print(f"{run.id}: no {self.base.sweep.metric}, so the search learns nothing from it")
            return
        self.study.tell(self.trials[run.id], value)
        print(f"{run.id}: {self.base.sweep.metric} {value:.6g}", flush=True)

    def print_best(self) -> None:
        from optuna.trial import TrialState

        if self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            best = self.study.best_trial
            words = " ".join(f"{key}={value}" for key, value in best.params.items())
            print(
                f"best: trial-{best.number:04d}, {self.base.sweep.metric} {best.value:.6g}, {words}"
            )


def check(base: Config, axes: Sequence[Axis]) -> None:
    settings = base.sweep
    if not axes:
        raise ConfigError(
            f"sweep.method={settings.method} has nothing to search; give keys several values, or an interval: "
            "'optim.lr=tag(log,interval(1e-5,1e-3))'"
        )
    families = [name.partition("*")[0] for name in METRICS if "*" in name]
    if settings.metric not in METRICS and not settings.metric.startswith(tuple(families)):
        near = difflib.get_close_matches(settings.metric, METRICS, 1)
        raise ConfigError(
            f"sweep.metric={settings.metric} is no metric; {f'did you mean {near[0]}? ' if near else ''}"
            "docs/metrics.md lists them"
        )
    if settings.metric.startswith("val/") and not base.validation.every:
        raise ConfigError(
            f"sweep.metric={settings.metric} is never logged with validation.every=0; set validation.every, or search "
            "by sweep.metric=train/loss"
        )


def whole_if_the_key_is(axis: Axis, config_cls: type[Config]) -> Axis:
    """The axis with whole numbers where its key takes no others; Hydra's intervals are of fractions."""
    from dataclasses import replace

    key = keys(config_cls).get(axis.key)
    if axis.interval is None or key is None or key.field.annotation is not int:
        return axis
    return replace(axis, interval=replace(axis.interval, whole=True))


def corners(axes: Sequence[Axis]) -> list[SweepRun]:
    """Runs in which every value of every axis occurs, and both ends of every interval."""
    values = {axis.key: ends(axis) for axis in axes}
    first = {key: options[0] for key, options in values.items()}
    return [
        SweepRun(f"{key}={value}", first | {key: value})
        for key, options in values.items()
        for value in options
    ]


def ends(axis: Axis) -> list[str]:
    if axis.interval is None:
        return list(axis.values)
    cast = int if axis.interval.whole else float
    return [str(cast(axis.interval.low)), str(cast(axis.interval.high))]


def distribution(axis: Axis) -> "optuna.distributions.BaseDistribution":
    from optuna import distributions

    interval = axis.interval
    if interval is None:
        return distributions.CategoricalDistribution(list(axis.values))
    if interval.whole:
        return distributions.IntDistribution(
            int(interval.low), int(interval.high), log=interval.log
        )
    return distributions.FloatDistribution(interval.low, interval.high, log=interval.log)


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

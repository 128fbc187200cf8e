"""Both sides trained, and ended as soon as it is clear which is better."""

import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sora_train.errors import EXIT_FAULT, EXIT_REQUEUE
from sora_train.evaluation.sequential import SequentialInterval, block_means, sequential_interval
from sora_train.tools.sweep.ab.sides import LOG, Pair
from sora_train.tools.sweep.local import LEFT, Runner, Task, failure_reason

LOSS = "train/loss"
SKIPPED = 0.1
"""Share of the steps at the beginning that do not count: who leads there often does not in the end."""
BLOCKS, LEAST_STEPS = 100, 8
"""A run has about so many blocks of steps, each of so many steps at least: neighbouring steps are alike."""
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Difference:
    """What the pair's training losses say so far: a minus b."""

    interval: SequentialInterval
    first: int
    """The first step that counts."""
    last: int
    """The last step of the last whole block."""
    block: int
    """Steps of a block."""
    confidence: float


def difference(pair: Pair, confidence: float) -> Difference:
    """Of the runs as far as they are."""
    block = max(LEAST_STEPS, math.ceil(pair.steps / BLOCKS))
    first = 1 + math.ceil(SKIPPED * pair.steps)
    curves = [losses(pair.folder / name / "metrics.jsonl") for name in "ab"]
    values = block_means(curves[0], curves[1], block, first)
    interval = sequential_interval(values, confidence)
    return Difference(interval, first, first - 1 + block * len(values), block, confidence)


def losses(path: Path) -> dict[int, float]:
    """The training loss of each step; a line that is being written is left out, and so is all that follows it."""
    curve: dict[int, float] = {}
    try:
        text = path.read_text()
    except FileNotFoundError:
        return curve
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if LOSS in row:
            curve[int(row["step"])] = row[LOSS]
    return curve


def train_pair(pair: Pair, confidence: float) -> int:
    """Train both, and end them when the interval of their difference leaves out 0.

    Returns the exit code: 0, 1 where one failed, 75 where the comparison was asked to leave.
    """
    codes: dict[str, int] = {}
    with (
        Runner(pair.at_once, pair.a.config.launch) as runner,
        Watch(pair, confidence, runner) as watch,
    ):
        for task, code in runner.results(_tasks(pair)):
            codes[task.run.id] = code
            if code and code not in LEFT:
                runner.stop()
    for name, code in codes.items():
        if code and code not in LEFT:
            why = failure_reason(pair.folder / name)
            log = f"; its output is in {pair.folder / name / LOG}" if pair.at_once > 1 else ""
            print(f"{name} failed (exit code {code}){why}{log}", flush=True)
            return EXIT_FAULT
    return 0 if watch.decided or not runner.stopping else EXIT_REQUEUE


def _tasks(pair: Pair) -> Iterator[Task]:
    for side in (pair.a, pair.b):
        log = f"; its output: {pair.folder / side.name / LOG}" if pair.at_once > 1 else ""
        print(f"{side.name}: {side.asked}{log}", flush=True)
        yield side.task(pair.folder, log=pair.at_once > 1)


class Watch:
    """Looks at both runs' losses while they train, shows how far they are, and stops them when they tell enough."""

    def __init__(self, pair: Pair, confidence: float, runner: Runner):
        self.pair, self.confidence, self.runner = pair, confidence, runner
        self.decided = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        shown, pause = 0, LOOK_SECONDS
        while not self._end.wait(pause):
            began = time.perf_counter()
            now = difference(self.pair, self.confidence)
            # Long files take a while to read: a twentieth of the time at most goes into looking.
            pause = max(LOOK_SECONDS, 20 * (time.perf_counter() - began))
            if now.interval.blocks > shown:
                shown = now.interval.blocks
                print(f"step {now.last} of {self.pair.steps}: {said(now)}", flush=True)
            if now.interval.sure:
                self.decided = True
                self.runner.stop()
                return


def said(now: Difference) -> str:
    """The difference in words."""
    interval = now.interval
    text = f"{LOSS} of a minus that of b is {interval.mean:+.4g}"
    if math.isnan(interval.low):
        return f"{text}, too early to tell"
    return f"{text} ({interval.low:+.4g} to {interval.high:+.4g})"


def as_json(now: Difference) -> dict[str, object]:
    values = asdict(now)
    return {**values.pop("interval"), **values, "sure": now.interval.sure}

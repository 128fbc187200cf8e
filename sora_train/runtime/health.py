"""The health of a run: phases with deadlines, flags that all ranks share, and which rank is slow.

One rank's failure, signal or time limit concerns all ranks. It is announced in an exchange that every rank
takes part in, so all ranks take the same branch. The watchdog handles a rank that does not come to the exchange.
"""

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from sora_train.config.sections.health import HealthConfig
from sora_train.errors import Fault, Preempted
from sora_train.monitoring.gauges import Gauges, by_rank, over_ranks
from sora_train.runtime import watchdog
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.preemption import PreemptionNotice
from sora_train.runtime.watchdog import Watchdog

TIMED = ("data", "exchange", "compute", "update")
"""The parts of a step."""
MEDIAN_OF = 64
# Until so many steps are done a step may compile and warm caches.
FIRST_STEPS = 3


class Health:
    """This rank's phase and step, and what all ranks have agreed on."""

    def __init__(
        self,
        cfg: HealthConfig,
        control: ControlPlane,
        run_dir: Path,
        children: Callable[[], str] = lambda: "",
        place_of: Callable[[int], str] = lambda rank: "",
        watched: bool = True,
    ):
        """Unless it is `watched`, nothing is written into the run folder and no phase is cut short."""
        self.cfg, self.control = cfg, control
        self.step = 0
        self.seconds = dict.fromkeys(TIMED, 0.0)
        """What each part of a step has taken since the last report."""
        self.spent: dict[str, float] = {}
        """Seconds in each phase since the process began, by its name."""
        self.gauges: Gauges | None = None
        """Readings of this rank's machine, reported together with the slowest rank."""
        self.leaving = ""
        """Why all ranks leave after this step, an empty string while they do not."""
        self._run_dir = run_dir
        self._preemption = PreemptionNotice(cfg.time_limit_minutes, cfg.leave_seconds)
        self._steps: deque[float] = deque(maxlen=MEDIAN_OF)
        self._done = self._since = 0
        self._phases: list[str] = []
        self._samples: list[int] = []
        world = control.world
        if world.is_main and watched:
            watchdog.clear(run_dir)
        control.barrier()
        self.watchdog = Watchdog(
            run_dir, world.rank, world.size, cfg.heartbeat_seconds, children, place_of
        )
        if watched:
            self.watchdog.start()

    # -- phases -------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str, samples: Sequence[int] = ()) -> Iterator[None]:
        """A part of the run with its own deadline. Phases nest: the outer one goes on afterwards.

        `samples` are the manifest rows this phase works on.
        """
        self._phases.append(name)
        kept, self._samples = self._samples, list(samples) or self._samples
        self._enter()
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self.spent[name] = self.spent.get(name, 0.0) + seconds
            if name in self.seconds:
                self.seconds[name] += seconds
            self._phases.pop()
            self._samples = kept
            self._enter()

    def _enter(self) -> None:
        name = self._phases[-1] if self._phases else "idle"
        self.watchdog.enter(name, self.deadline(name), self.step, self._samples)

    def deadline(self, phase: str) -> float | None:
        """Seconds that a phase may take; None if it has no limit."""
        cfg = self.cfg
        if phase in (*TIMED, "loop"):
            if self._done < FIRST_STEPS:
                return max(cfg.init_seconds, cfg.step_seconds)
            return max(cfg.step_seconds, cfg.step_factor * statistics.median(self._steps))
        limits = {
            "init": cfg.init_seconds,
            "compile": cfg.compile_seconds,
            "self-test": cfg.init_seconds,
            "validation": cfg.validation_seconds,
            "probe": cfg.validation_seconds,
            "samples": cfg.sample_seconds,
            "finish": cfg.sample_seconds,
            "closing": cfg.step_seconds,
            "save": cfg.save_seconds,
        }
        return limits.get(phase)

    def stepped(self, seconds: float, step: int) -> None:
        """Record that a step is done and how long it took."""
        self._steps.append(seconds)
        self._done += 1
        self._since += 1
        self.step = step

    @contextmanager
    def building(self) -> Iterator[None]:
        """The phase before the first step. If it fails here, the other ranks are told and the watchdog stops."""
        try:
            with self.phase("init"):
                yield
        except BaseException as error:
            self.failed(error)
            self.stop()
            raise

    # -- what all ranks agree on --------------------------------------------------------------

    def exchange(
        self,
        values: Sequence[float],
        error: Exception | None = None,
        *,
        slots: int = 0,
        own: Sequence[float] = (),
    ) -> list[float]:
        """Sums over all ranks of `values` and of `own`. Sets `leaving` if any rank saw a signal or a time limit.

        Args:
            values: counted once for ranks that share their micro-batches, which all hold the same values.
            error: what kept this rank from its part. Then all ranks raise, this one `error` itself.
            slots: micro-batches of this rank; the same on every rank.
            own: counted on every rank.

        Raises:
            Fault: another rank failed, or the ranks are not at the same place.
        """
        with self.phase("exchange"):
            flags = [
                float(error is not None),
                float(bool(self._preemption.signalled)),
                float(self._preemption.late),
                float(self.step),
                float(slots),
            ]
            mine = values if self.control.world.cp_rank == 0 else [0.0] * len(values)
            *sums, failed, signalled, late, steps, held = self.control.sum([*mine, *own, *flags])
        if error is not None:
            raise error
        if failed:
            raise Fault(f"{int(failed)} other rank(s) failed; their messages are in their own logs")
        size = self.control.world.size
        if steps != self.step * size or held != slots * size:
            raise Fault(
                f"rank {self.control.world.rank} is at step {self.step} with {slots} micro-batch(es), the mean of all "
                f"ranks is step {steps / size:g} with {held / size:g}: they do not run the same job; start all of them "
                "anew, from the same code and config"
            )
        if signalled:
            self.leaving = self._preemption.signalled or "a signal to another rank"
        elif late:
            self.leaving = "the time limit"
        return sums

    def check_preemption(self) -> None:
        """Ask all ranks whether the run must end. A collective, for every loop that may take long.

        Raises:
            Preempted: it must; let it through to the training loop, which saves a checkpoint.
        """
        self.exchange([])
        self.leave_if_preempted()

    def leave_if_preempted(self) -> None:
        """Raises Preempted if a rank was told to leave before the last exchange. Not a collective."""
        if self.leaving:
            raise Preempted(f"{self.leaving} ends the run here, the same command goes on")

    # -- who is slow --------------------------------------------------------------------------

    def report_due(self, step: int) -> bool:
        return self.cfg.report_every > 0 and step % self.cfg.report_every == 0

    def stragglers(self, step: int) -> dict[str, float]:
        """Gather every rank's times since the last report; metrics on all ranks, and a file on rank 0.

        The slowest rank waits least for the others in the exchange. Times are seconds a step.
        """
        steps, self._since = max(1, self._since), 0
        mine = [self.seconds[name] / steps for name in TIMED]
        self.seconds = dict.fromkeys(TIMED, 0.0)
        columns = self.gauges.take() if self.gauges else []
        gathered = self.control.gather([*mine, *columns])
        ranks = [of_rank[: len(TIMED)] for of_rank in gathered]
        gauged = [of_rank[len(TIMED) :] for of_rank in gathered] if columns else []
        own = [sum(times) - times[TIMED.index("exchange")] for times in ranks]
        mean = sum(own) / len(own)
        slowest = max(range(len(own)), key=own.__getitem__)
        if self.control.world.is_main:
            row = {
                "step": step,
                "slowest_rank": slowest,
                **{name: [times[i] for times in ranks] for i, name in enumerate(TIMED)},
                **by_rank(gauged),
            }
            with (self._run_dir / watchdog.FOLDER / "ranks.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        return {
            "health/slowest_rank": float(slowest),
            "health/slowest_over_mean": own[slowest] / mean if mean else 1.0,
            **over_ranks(gauged),
        }

    # -- the end ------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks, which may be waiting for this one."""
        self.watchdog.failed(error)

    def stop(self) -> None:
        self.watchdog.stop()


def longest_wait(cfg: HealthConfig) -> timedelta:
    """How long a collective may take: a little longer than any phase, so that the watchdog speaks first."""
    phases = (
        cfg.init_seconds,
        cfg.compile_seconds,
        cfg.step_seconds,
        cfg.validation_seconds,
        cfg.sample_seconds,
        cfg.save_seconds,
    )
    return timedelta(seconds=max(phases) + 120)


def record_collectives(run_dir: str) -> None:
    """Have NCCL remember its last collectives and write them down when one is late; before the first group."""
    folder = Path(run_dir).absolute() / watchdog.FOLDER
    defaults = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / "nccl-rank-"),
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / "nccl-rank-"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

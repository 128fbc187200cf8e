"""Kills a small run again and again, starts it again each time, and compares it with one that nobody disturbed.

    python -m benchmarks.chaos --kills 200 --world 2 --out DIR

Ranks are forks of one process that has imported everything, so a restart costs a second. They are killed
at a moment drawn at random, one of them or all, and the rest must end by themselves. At the end losses,
the rows that every step read and the weights must be those of the straight run, to the last bit.
"""

import argparse
import faulthandler
import hashlib
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_train import checkpoint as checkpoints
from sora_train.config.compose import compose
from sora_train.data.sample import ClipBatch
from sora_train.errors import Fault, run_command
from sora_train.monitoring.metrics import is_clocked, read_metrics
from sora_train.parallel.shards import full
from sora_train.runtime.preemption import listening
from sora_train.tools.doctor.parity.worker import import_everything
from sora_train.training.trainer import Callback, Trainer

SMALL_RUN = (
    "experiment=parity_tiny", "optim=adamw", "optim.warmup_steps=2", "train.steps=40", "checkpoint.every=4",
    "validation.every=5", "sample.every=8", "sample.prompts=[a red circle]", "objective.num_steps=2",
    # Without a launcher, one that is killed before the ranks have met leaves the others waiting for it.
    "health.meeting_seconds=20",
)  # fmt: skip
# Beyond this an attempt counts as hung.
HUNG_SECONDS = 180.0
# So does one whose other ranks go on for so long after the first has failed: longer than ranks wait to meet,
# and connecting may take up to twice as long as that.
OTHERS_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """What one rank does to itself, once: `action` at a `place` of a step."""

    action: str
    """`kill`, `stop`, `term` (signals), `raise`, `sleep`, `spin` (in native code, holding the interpreter lock)."""
    place: str
    """`data`, `compute`, `step`, `validation`, `samples`, `save`."""
    step: int
    rank: int = 0


@dataclass
class Attempt:
    """How the ranks of one start ended: exit codes (negative: the signal), seconds, what they said."""

    codes: list[int]
    seconds: float
    said: list[str]
    hung: bool = False


@dataclass
class Tally:
    """A disturbed run, in numbers."""

    attempts: int = 0
    kills: int = 0
    hangs: int = 0
    lost_commits: int = 0
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list)


class FaultyTrainer(Trainer):
    """Keeps to its plan, notes which rows each step reads, and the digest of its tensors at the end."""

    plan: Plan | None = None

    def read(self) -> tuple[list[ClipBatch], list[dict[str, float]], Exception | None]:
        with self.health.phase("data"):
            self.strike("data")
        found = super().read()
        row = {"step": self.step, "rows": [list(batch.micro_batch.rows) for batch in found[0]]}
        path = self.folder.path / f"rows-{self.world.size}-{self.world.rank}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return found

    def measure(self, *args: Any) -> dict[str, float]:
        self.strike("compute")
        return super().measure(*args)

    def callbacks(self) -> list[Callback]:
        return [lambda trainer, row: self.strike("step")]

    def validate(self) -> dict[str, float]:
        return self._struck_inside("validation", super().validate)

    def write_samples(self) -> None:
        self._struck_inside("samples", super().write_samples)

    def save(self) -> None:
        self.strike("save")
        super().save()

    def close(self) -> None:
        if self.step == self.cfg.train.steps:
            digest = {
                name: hashlib.sha256(full(tensor).contiguous().numpy().tobytes()).hexdigest()
                for name, tensor in self.tensors().items()
            }
            if self.world.is_main:
                (self.folder.path / "digests.json").write_text(json.dumps(digest))
        super().close()

    def _struck_inside(self, place: str, work: Any) -> Any:
        """`work()`, struck when it asks for the second time whether to leave."""
        check_preemption, asked = self.health.check_preemption, 0

        def struck() -> None:
            nonlocal asked
            asked += 1
            if asked == 2:
                self.strike(place)
            check_preemption()

        self.health.check_preemption = struck  # type: ignore[method-assign]
        try:
            return work()
        finally:
            self.health.check_preemption = check_preemption  # type: ignore[method-assign]

    def strike(self, place: str) -> None:
        plan = self.plan
        if (
            plan is None
            or (plan.place, plan.rank) != (place, self.world.rank)
            or plan.step > self.step
        ):
            return
        type(self).plan = None
        numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
        if plan.action in numbers:
            os.kill(os.getpid(), numbers[plan.action])
        elif plan.action == "raise":
            raise Fault("this rank was told to fail")
        elif plan.action == "sleep":
            time.sleep(10_000)
        elif plan.action == "spin":
            re.match(r"(a|a)+$", "a" * 64 + "b")


def train_once(overrides: Sequence[str], plan: Plan | None) -> int:
    """Train in this process, which is one rank; returns its exit code."""

    def work() -> None:
        FaultyTrainer.plan = plan
        with listening():
            FaultyTrainer(compose(list(overrides)).config).train()

    return run_command(work)


def start(
    world: int,
    overrides: Sequence[str],
    log: Path,
    plan: Plan | None = None,
    environ: dict[str, str] | None = None,
) -> list[int]:
    """Fork the ranks of one attempt; returns their process ids. `log` gets `.RANK` appended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    sys.stdout.flush()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 70
        try:
            output = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            faulthandler.enable()
            if world > 1:
                names = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": world,
                    "LOCAL_WORLD_SIZE": world,
                }
                os.environ.update({name: str(value) for name, value in names.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ.update(environ or {})
            code = train_once(overrides, plan)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pids


def wait(
    pids: list[int],
    log: Path,
    began: float,
    hung_seconds: float = HUNG_SECONDS,
    others_seconds: float = OTHERS_SECONDS,
) -> Attempt:
    """Until all ranks have ended; those that do not are killed, and the attempt counts as hung."""
    codes: dict[int, int] = {}
    hung, failed = False, 0.0
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        failed = failed or (now if any(codes.values()) else 0.0)
        alone = failed and now - failed > others_seconds
        if not hung and (alone or now - began > hung_seconds):
            hung = True
            _end([pid for pid in pids if pid not in codes])
        time.sleep(0.02)
    said = [Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(len(pids))]
    return Attempt([codes[pid] for pid in pids], time.monotonic() - began, said, hung)


def _end(pids: list[int]) -> None:
    """Kill processes that hang, once their logs show where they do; one that is stopped cannot say."""
    for number, pause in ((signal.SIGABRT, 2.0), (signal.SIGKILL, 0.0)):
        for pid in pids:
            # One that has ended since is a zombie until it is waited for, so its number is still its own.
            os.kill(pid, number)
        time.sleep(pause)


def attempt(
    world: int, overrides: Sequence[str], log: Path, plan: Plan | None = None, **how: Any
) -> Attempt:
    """Start the ranks and wait for them."""
    began = time.monotonic()
    environ = how.pop("environ", None)
    return wait(start(world, overrides, log, plan, environ), log, began, **how)


def outcome(run_dir: Path, world: int) -> dict[str, Any]:
    """What must be equal: every step's numbers, the rows that each step read on each rank, and all tensors."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    numbers = [{k: v for k, v in row.items() if not is_clocked(k)} for row in rows]
    read: dict[str, dict[int, set[str]]] = {}
    for rank in range(world):
        found: dict[int, set[str]] = {}
        for line in (run_dir / f"rows-{world}-{rank}.jsonl").read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], set()).add(json.dumps(row["rows"]))
        read[str(rank)] = found
    return {
        "numbers": numbers,
        "rows": read,
        "tensors": json.loads((run_dir / "digests.json").read_text()),
    }


def differences(straight: dict[str, Any], disturbed: dict[str, Any]) -> list[str]:
    """In words, where two outcomes differ."""
    found = []
    for a, b in zip(straight["numbers"], disturbed["numbers"], strict=False):
        found += [
            f"step {a['step']}: {key} {a.get(key)} / {b.get(key)}"
            for key in a | b
            if a.get(key) != b.get(key)
        ]
    if len(straight["numbers"]) != len(disturbed["numbers"]):
        found.append(f"{len(straight['numbers'])} rows of metrics / {len(disturbed['numbers'])}")
    if straight["rows"] != disturbed["rows"]:
        found.append("the rows that were read")
    found += [
        f"tensor {name}"
        for name in straight["tensors"] | disturbed["tensors"]
        if straight["tensors"].get(name) != disturbed["tensors"].get(name)
    ]
    return found


def newest(run_dir: Path) -> int:
    found = checkpoints.list_checkpoints(run_dir / "checkpoints")
    return found[-1].step if found else -1


def disturb(
    world: int, run_dir: Path, overrides: Sequence[str], kills: int, seed: int, seconds: float
) -> Tally:
    """Kill within so many seconds until `kills` kills were made, restarting; then let the run finish."""
    draw, tally = random.Random(seed), Tally()
    log = run_dir.with_suffix(".log")
    settings = [*overrides, f"run.dir={run_dir}"]
    before = -1
    while True:
        began = time.monotonic()
        pids = start(world, settings, log)
        last = tally.kills >= kills
        moment = began + draw.uniform(0.3, seconds)
        while not last and time.monotonic() < moment:
            time.sleep(0.01)
        killed = [] if last else draw.sample(pids, draw.choice([1, world]))
        for pid in killed:
            # One that has ended already is a zombie until it is waited for, so its number is still its own.
            os.kill(pid, signal.SIGKILL)
        found = wait(pids, log, began)
        tally.attempts += 1
        tally.kills += bool(killed) and any(code == -signal.SIGKILL for code in found.codes)
        tally.hangs += found.hung
        if found.hung:
            for rank, said in enumerate(found.said):
                Path(f"{log}.{rank}.hung-{tally.attempts}").write_text(said)
        after = newest(run_dir)
        tally.lost_commits += after < before
        before = after
        tally.seconds += found.seconds
        if all(code == 0 for code in found.codes):
            if last:
                return tally
            # It was done before the kill: the next life of it begins anew.
            return tally
        if last and tally.attempts > kills + 10:
            tally.differences.append(f"does not finish: {found.said[0][-300:]}")
            return tally


def chaos(world: int, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Disturbed runs until `kills` kills were made in all, each compared with the straight one."""
    import_everything()
    folder.mkdir(parents=True, exist_ok=True)
    straight = folder / "straight"
    done = attempt(world, [*SMALL_RUN, f"run.dir={straight}"], folder / "straight.log")
    if any(done.codes):
        raise Fault(f"the undisturbed run fails: {done.said[0][-500:]}")
    expected, total, lives = outcome(straight, world), Tally(), 0
    while total.kills < kills and lives < kills:
        run_dir = folder / f"life-{lives:03d}"
        tally = disturb(
            world, run_dir, SMALL_RUN, kills - total.kills, seed + lives, max(2.0, done.seconds / 2)
        )
        if not tally.differences:
            tally.differences += differences(expected, outcome(run_dir, world))
        lives += 1
        total.attempts += tally.attempts
        total.kills += tally.kills
        total.hangs += tally.hangs
        total.lost_commits += tally.lost_commits
        total.seconds += tally.seconds
        total.differences += tally.differences
        print(
            f"world {world}: {total.kills}/{kills} kills, {lives} finished run(s), {total.hangs} hangs, "
            f"{total.lost_commits} lost commits, {len(total.differences)} differences",
            flush=True,
        )
    return {"world": world, "runs": lives, **total.__dict__, "straight_seconds": done.seconds}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    found = chaos(options.world, options.out, options.kills, options.seed)
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["differences"] or found["hangs"] or found["lost_commits"] else 0)


if __name__ == "__main__":
    main()

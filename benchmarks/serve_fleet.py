"""A whole service of real processes, any of which can be killed and started again: gateways, workers, a database."""

import contextlib
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from sora_train.errors import Fault

REPO = Path(__file__).resolve().parent.parent
READY_SECONDS = 180.0
"""Until a gateway answers on a machine that is at other work."""
LEAVE_SECONDS = 60.0


class Process:
    """One command, which is started again with the same words."""

    def __init__(self, words: Sequence[str], log: Path):
        self.words, self.log = [sys.executable, "-m", "sora_train", "serve", *words], log
        self.running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=REPO
            )

    @property
    def pid(self) -> int:
        assert self.running is not None
        return self.running.pid

    def kill(self) -> None:
        assert self.running is not None
        self.running.kill()
        self.running.wait()

    def leave(self) -> int:
        """Told to stop; its exit code. One that does not leave is killed."""
        assert self.running is not None
        self.running.terminate()
        try:
            return self.running.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


class Fleet:
    """`with Fleet(...) as fleet:` runs it."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        gateways: Sequence[int] = (1,),
        workers: int = 0,
        postgres: Any = None,
    ):
        """
        Args:
            settings: of `sora serve`; data, database and ports are added.
            gateways: the workers that each of them starts.
            workers: those beside them.
            postgres: a server as `postgres()` gives it, which then holds the jobs.
        """
        self.folder, self.postgres = folder, postgres
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings | {"data": str(folder / "data")}
        if postgres is not None:
            self.settings["database"] = postgres.new_database()
        self.addresses, self.gateways = [], []
        for number, count in enumerate(gateways):
            port = free_port()
            config = self._config(f"gateway-{number}", port=port, workers=count)
            self.gateways.append(Process(["--config", str(config)], config.with_suffix(".log")))
            self.addresses.append(f"http://127.0.0.1:{port}")
        self.workers = []
        for number in range(workers):
            config = self._config(f"worker-{number}")
            words = ["worker", "--config", str(config)]
            self.workers.append(Process(words, config.with_suffix(".log")))

    def _config(self, name: str, **settings: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.settings | settings))
        return path

    def __enter__(self) -> "Fleet":
        try:
            for process in (*self.gateways, *self.workers):
                process.start()
            for number in range(len(self.gateways)):
                self.wait_ready(number)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in (*self.gateways, *self.workers):
            if process.running is not None:
                process.leave()

    def wait_ready(self, number: int) -> None:
        """Until a gateway answers that database and files are there. Raises Fault if it does not come."""
        process, end = self.gateways[number], time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            assert process.running is not None
            if process.running.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, OSError):
                address = f"{self.addresses[number]}/readyz"
                with urllib.request.urlopen(address, timeout=5):
                    return
            time.sleep(0.1)
        raise Fault(f"a gateway did not come up: {process.log.read_text()[-2000:]}")

    # --- kills ---

    def gateway_workers(self) -> list[int]:
        """Process ids of the workers that gateways started."""
        return [child for gateway in self.gateways for child in children(gateway.pid)]

    def kill_gateway(self, draw: random.Random, pause: float) -> str:
        number = draw.randrange(len(self.gateways))
        self.gateways[number].kill()
        time.sleep(pause)
        self.gateways[number].start()
        return f"gateway {number}"

    def kill_worker(self, draw: random.Random, pause: float) -> str:
        """One of those beside the gateways, or of a gateway's, which starts another by itself."""
        theirs: list[Process | int] = [*self.workers, *self.gateway_workers()]
        chosen = draw.choice(theirs)
        if isinstance(chosen, int):
            with contextlib.suppress(ProcessLookupError):
                os.kill(chosen, signal.SIGKILL)
            return "a gateway's worker"
        chosen.kill()
        time.sleep(pause)
        chosen.start()
        return "a worker"

    def kill_database(self, draw: random.Random, pause: float) -> str:
        """The server; where the database is a file, every process that has it open."""
        if self.postgres is not None:
            self.postgres.shoot()
            time.sleep(pause)
            self.postgres.start()
            return "database"
        for pid in self.gateway_workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in (*self.gateways, *self.workers):
            process.kill()
        time.sleep(pause)
        for process in (*self.gateways, *self.workers):
            process.start()
        return "every process"


def children(pid: int) -> list[int]:
    """Those of every thread."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of our own. Raises Fault where none can be started."""
    path = REPO / "tests/serve/databases.py"
    spec = importlib.util.spec_from_file_location("databases", path)
    assert spec is not None and spec.loader is not None
    databases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(databases)
    if told := databases.missing():
        raise Fault(told)
    server = databases.Postgres()
    try:
        yield server
    finally:
        server.close()


def tiny_run(folder: Path) -> Path:
    """A run of two steps of the smallest model, made by `sora train` where it is not there yet."""
    run = folder / "tiny"
    if not (run / "checkpoints").is_dir():
        words = ["experiment=parity_tiny", f"run.dir={run}", "train.steps=2", "checkpoint.every=2"]
        words += ["validation.every=0"]
        command = [sys.executable, "-m", "sora_train", "train", *words]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Fault(f"the run of the tiny model failed: {done.stderr[-2000:]}")
    return run

"""The process of `sora serve`: the HTTP server, and the workers that it starts and looks after."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import yaml

from sora_train.errors import UserError
from sora_train.serving.access.keys import Keys
from sora_train.serving.api.app import build_app
from sora_train.serving.parts import open_backend, open_policy
from sora_train.serving.service import Service, open_store
from sora_train.serving.settings import Settings

log = logging.getLogger(__name__)
LEAVE_SECONDS = 30.0
"""How long workers get to give their jobs back."""
_PAUSES = (1.0, 60.0)
"""First and longest pause before a worker that died is started again."""


def run(settings: Settings) -> None:
    """Serve until the process is told to stop. Raises UserError for what cannot start."""
    import uvicorn

    require_keys(settings)
    listener = _listener(settings)
    with listener, Service.open(settings, open_backend(settings)) as service:
        app = build_app(replace(service, policy=open_policy(settings, service.audit)))
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=int(LEAVE_SECONDS),
        )
        server = uvicorn.Server(config)

        def told(*_: object) -> None:
            # The server stops by itself, and raises the signal again when it has: the workers are still to be ended.
            if not server.started:
                raise KeyboardInterrupt

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, told)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(
            f"sora serve: http://{shown}:{port}/v1 (playground: http://{shown}:{port}/, "
            f"reference: http://{shown}:{port}/docs)",
            flush=True,
        )
        with Workers(settings):
            server.run(sockets=[listener])


def require_keys(settings: Settings) -> None:
    """Raise UserError for an address that others reach while there is no key."""
    if settings.is_loopback:
        return
    database = open_store(settings).database
    has_one = Keys(database).any()
    database.close()
    if not has_one:
        raise UserError(
            f"host {settings.host} is reached from elsewhere and there is no API key; add one with "
            f"`sora serve keys add NAME{_where(settings)}`, or listen on 127.0.0.1"
        )


def _where(settings: Settings) -> str:
    """The flag by which another command finds the same keys; an address of a database may hold a password."""
    return " --database URL" if settings.database else f" --data {settings.data}"


def _listener(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host.strip("[]"), settings.port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; choose another --port"
        ) from None


def worker_command(config: Path) -> list[str]:
    """The command line of a worker of this gateway."""
    words = ["serve", "worker", "--config", str(config), "--with-parent"]
    return [sys.executable, "-m", "sora_train", *words]


class Workers:
    """Worker processes, started again when they die; they end with this process, however it ends."""

    def __init__(self, settings: Settings):
        self.settings, self._ends = settings, threading.Event()
        self._threads: list[threading.Thread] = []
        self._running: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> "Workers":
        if self.settings.workers:
            config = self._config()
            for number in range(self.settings.workers):
                thread = threading.Thread(
                    target=self._look_after, args=(config,), daemon=True, name=f"worker {number}"
                )
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.set()
        for process in list(self._running):
            process.terminate()
        for thread in self._threads:
            thread.join(LEAVE_SECONDS + 5)

    def _config(self) -> Path:
        """The settings for the workers; nobody else reads them, since they may hold secrets."""
        path = self.settings.folder / "workers.yaml"
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            yaml.safe_dump(self.settings.model_dump(mode="json"), file)
        return path

    def _look_after(self, config: Path) -> None:
        command = worker_command(config)
        pause = _PAUSES[0]
        while not self._ends.is_set():
            begin = time.monotonic()
            # The worker leaves when this pipe closes, which it does even if this process is killed.
            process = subprocess.Popen(command, stdin=subprocess.PIPE)
            self._running.add(process)
            if self._ends.is_set():
                process.terminate()
            code = self._waited(process)
            self._running.discard(process)
            if self._ends.is_set():
                return
            pause = (
                _PAUSES[0] if time.monotonic() - begin > _PAUSES[1] else min(2 * pause, _PAUSES[1])
            )
            log.error("a worker ended with exit code %s; another starts in %.0f s", code, pause)
            self._ends.wait(pause)

    def _waited(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return process.wait(1.0)
            except subprocess.TimeoutExpired:
                if self._ends.is_set():
                    try:
                        return process.wait(LEAVE_SECONDS)
                    except subprocess.TimeoutExpired:
                        process.kill()

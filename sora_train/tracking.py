"""Feeds W&B from the run folder, off the hot path.

A separate process follows metrics.jsonl and the samples folder and logs what appears. The run
never waits for it: it may hang, crash or be absent, and the files in the run folder stay complete.
The same process, run by hand with `--once`, sends a finished run folder later:

    python -m sora_train.tracking RUN_DIR --project NAME --mode online --once
"""

import argparse
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from sora_train.config.run import TrackerConfig
from sora_train.errors import SoraError, UserError

STOP_FILE = "tracking.stop"
ID_FILE = "wandb_run_id"
STATE_FILE = "wandb_logged.json"
LOG_FILE = "tracker.log"
POLL_SECONDS = 1.0


class Tracker(Protocol):
    def finish(self, timeout: float = 30.0) -> None:
        """Let the tracker send what is left; returns within `timeout` seconds or little more."""


class NullTracker:
    def finish(self, timeout: float = 30.0) -> None:
        pass


class ProcessTracker:
    """The feeding process as the run sees it: started, watched by a thread, ended with a deadline."""

    def __init__(self, command: list[str], run_dir: Path, sync_command: str):
        self._stop_file = run_dir / STOP_FILE
        self._stop_file.unlink(missing_ok=True)
        self._log = run_dir / LOG_FILE
        self._sync_command = sync_command
        self._said = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with self._log.open("ab") as log:
                # Its own session: Ctrl-C at the terminal reaches the run alone, which then ends it.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._say(f"could not start ({error})")
            return
        threading.Thread(target=self._watch, name="tracker-watch", daemon=True).start()

    def _watch(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        if code != 0:
            self._say(f"stopped (exit code {code}, see {self._log})")

    def _say(self, what: str) -> None:
        if self._said.acquire(blocking=False):  # once a run
            print(
                f"The W&B tracker {what}: the run is not affected, metrics.jsonl is complete, and "
                f"`{self._sync_command}` sends it later.",
                file=sys.stderr,
                flush=True,
            )

    def finish(self, timeout: float = 30.0) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        try:
            self._stop_file.touch()
            if self._process.wait(timeout) == 0:
                self._say_offline()
        except (subprocess.TimeoutExpired, OSError) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            self._say(f"did not finish in {timeout:g} s" if late else f"could not end ({error})")
            self._kill()
        finally:
            self._stop_file.unlink(missing_ok=True)

    def _say_offline(self) -> None:
        runs = self._log.parent / "wandb"
        if any(runs.glob("offline-run-*")):
            print(
                f"W&B is offline; `wandb sync {shlex.quote(str(runs))}/offline-run-*` uploads the run.",
                file=sys.stderr,
                flush=True,
            )

    def _kill(self) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it ended by itself in between
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            # Unkillable while in the kernel (a dead network mount); the run has said so already.
            return


def start_tracker(cfg: TrackerConfig, run_dir: Path) -> Tracker:
    """Start the process that feeds `run_dir` to the tracker of `cfg`; never fails for the tracker's sake."""
    if cfg.kind == "none":
        return NullTracker()
    run_dir = Path(run_dir).absolute()
    later = [
        "python",
        "-m",
        "sora_train.tracking",
        str(run_dir),
        "--project",
        cfg.project,
        "--once",
    ]
    sync = shlex.join([*later, "--mode", "online"])
    return ProcessTracker(tracker_command(cfg, run_dir), run_dir, sync)


def tracker_command(cfg: TrackerConfig, run_dir: Path) -> list[str]:
    """What feeds `run_dir`, as a command that ends with this process."""
    module = [sys.executable, "-m", "sora_train.tracking", str(run_dir)]
    options = ["--project", cfg.project, "--mode", cfg.mode, "--parent", str(os.getpid())]
    return [*module, *options]


class Tail:
    """The whole new lines of a growing file; starts over when the file was replaced by a shorter one."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0

    def rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:
            self._offset = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class Feed:
    """What of a run folder has been logged, and the logging of the rest.

    Remembers, by metric, the last step logged, so that a resumed run, which repeats rows, sends each
    once. After a tracker that was killed rows are sent again rather than lost.
    """

    def __init__(self, run: Any, run_dir: Path):
        self._run = run
        self._run_dir = run_dir
        self._tail = Tail(run_dir / "metrics.jsonl")
        self._config_sent = False
        self._state_path = run_dir / STATE_FILE
        self._last_step: dict[str, int] = {}
        self._samples: list[str] = []
        if self._state_path.exists():
            state = json.loads(self._state_path.read_text())
            self._last_step, self._samples = state["last_step"], state["samples"]

    def push(self, *, final: bool = False) -> None:
        """Log everything that is new; a samples folder once it is whole, or as it is at the end."""
        if not self._config_sent and (self._run_dir / "config.yaml").exists():
            import yaml

            config = yaml.safe_load((self._run_dir / "config.yaml").read_text()) or {}
            self._run.config.update(config, allow_val_change=True)
            self._config_sent = True
        for row in self._tail.rows():
            self._log_row(row)
        for folder in self._new_samples(final):
            self._log_samples(folder)

    def save(self) -> None:
        """Remember what was logged; called only once W&B has confirmed all of it."""
        temporary = self._state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"last_step": self._last_step, "samples": self._samples}))
        os.replace(temporary, self._state_path)

    def _log_row(self, row: dict[str, Any]) -> None:
        step = row["step"]
        new = {
            name: value
            for name, value in row.items()
            if name not in ("step", "time") and step > self._last_step.get(name, -1)
        }
        if new:
            self._run.log({"step": step, "time": row["time"], **new})
            self._last_step.update(dict.fromkeys(new, step))

    def _new_samples(self, final: bool) -> list[Path]:
        found = [path.parent for path in sorted(self._run_dir.glob("samples/step-*/prompts.json"))]
        return [
            folder
            for folder in found
            if folder.name not in self._samples
            and (final or (folder / "contact_sheet.png").exists())
        ]

    def _log_samples(self, folder: Path) -> None:
        import wandb

        media: dict[str, Any] = {}
        for number, entry in enumerate(json.loads((folder / "prompts.json").read_text())):
            clip = folder / entry["file"]
            if clip.exists():
                video = wandb.Video(str(clip), caption=entry["prompt"], format="mp4")
                media[f"samples/{number:03d}"] = video
        sheet = folder / "contact_sheet.png"
        if sheet.exists():
            media["samples/contact_sheet"] = wandb.Image(str(sheet))
        self._run.log({"step": int(folder.name.removeprefix("step-")), **media})
        self._samples.append(folder.name)


def feed(run_dir: Path, *, project: str, mode: str, once: bool, parent: int | None) -> None:
    """Log `run_dir` to W&B until told to stop, until `parent` is gone, or just once.

    mode: `auto` is $WANDB_MODE if set, else online with a W&B key and offline without.
    """
    wandb = _import_wandb()
    run = wandb.init(
        project=project,
        name=run_dir.name,
        id=_run_id(run_dir),
        resume="allow",
        mode=_mode(wandb, mode),
        dir=str(run_dir),
        settings=wandb.Settings(console="off", silent=True, disable_git=True),
    )
    run.define_metric("*", step_metric="step")
    feed = Feed(run, run_dir)
    stop_file = run_dir / STOP_FILE
    while True:
        # Read the signs before the last push: what was written before them is then logged.
        over = once or stop_file.exists() or (parent is not None and os.getppid() != parent)
        feed.push(final=over)
        if over:
            break
        time.sleep(POLL_SECONDS)
    run.finish()
    feed.save()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "tracker=wandb needs the package wandb, which is not installed: "
            "run `pip install sora_train[wandb]` or set tracker=none."
        ) from error
    return wandb


def _mode(wandb: Any, mode: str) -> str:
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")


def _run_id(run_dir: Path) -> str:
    """The id kept in the run folder, so that a resumed run goes on in the same W&B run."""
    path = run_dir / ID_FILE
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(secrets.token_hex(4))
        os.replace(temporary, path)
    return path.read_text().strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sora_train.tracking", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--project", default="sora_train")
    parser.add_argument("--mode", choices=["auto", "online", "offline"], default="auto")
    parser.add_argument("--once", action="store_true", help="send what is there and end")
    parser.add_argument("--parent", type=int, help="end when this process is gone")
    given = parser.parse_args(arguments)
    try:
        if not (given.run_dir / "metrics.jsonl").exists() and given.once:
            raise UserError(f"{given.run_dir} has no metrics.jsonl; give the folder of a run.")
        feed(
            given.run_dir.absolute(),
            project=given.project,
            mode=given.mode,
            once=given.once,
            parent=given.parent,
        )
    except SoraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

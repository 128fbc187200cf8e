"""One run, one folder: its lock, its resolved config, its fingerprint, and where things lie in it.

config.yaml     the resolved configuration        metrics.jsonl   one row a step
run.json        seed, threads, library versions   checkpoints/    step-N folders and `latest`
samples/        step-N folders                    report.html, summary.json   written at the end
"""

import fcntl
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from sora_train.config import Config
from sora_train.errors import ConfigError, Fault, UserError

# Other values here would make a resumed run another experiment under the old name.
FIXED_SECTIONS = ("task", "seed", "model", "vae", "text", "objective", "vae_objective")
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "av", "pyarrow")


class RunFolder:
    """The folder of a live run. Only rank 0 locks and writes it."""

    def __init__(self, cfg: Config, *, is_main: bool):
        self.path = Path(cfg.run.dir)
        self.is_main = is_main
        self._lock: IO[str] | None = None
        if is_main:
            self._open(cfg)

    def _open(self, cfg: Config) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run.dir={self.path} cannot be made: {error.strerror}; choose another folder"
            ) from error
        self._take_lock()
        self._refuse_another_experiment(cfg)
        write_atomically(
            self.path / "config.yaml", yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
        )
        write_atomically(self.path / "run.json", json.dumps(fingerprint(cfg), indent=1))

    def _take_lock(self) -> None:
        # The kernel drops this lock when the process dies, however it dies.
        self._lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            raise UserError(
                f"run.dir={self.path} is in use by a live run (process {owner}); wait for it or choose another run.dir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def _refuse_another_experiment(self, cfg: Config) -> None:
        saved_path = self.path / "config.yaml"
        if not saved_path.exists() or not (self.path / "checkpoints" / "latest").exists():
            return
        saved, now = yaml.safe_load(saved_path.read_text()), cfg.model_dump(mode="json")
        # A key that came after the run was begun had its default's meaning.
        for section, values in Config().model_dump(mode="json").items():
            if isinstance(values, dict) and isinstance(saved.get(section), dict):
                saved[section] = values | saved[section]
        changed = [
            f"{key} was {old!r}, is {new!r}"
            for section in FIXED_SECTIONS
            for key, old, new in differences(saved.get(section), now.get(section), section)
        ]
        if changed:
            raise ConfigError(
                f"run.dir={self.path} holds another experiment: {'; '.join(changed[:5])}; "
                "use the old values to go on, or another run.dir to start anew"
            )

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:06d}"

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def differences(old: Any, new: Any, path: str) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            row for key in keys for row in differences(old.get(key), new.get(key), f"{path}.{key}")
        ]
    return [] if old == new else [(path, old, new)]


def fingerprint(cfg: Config) -> dict[str, Any]:
    """What must be equal for two runs to be bit-equal."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "absent"
    return {
        "seed": cfg.seed,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": versions,
    }


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Raises:
        Fault: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Fault(
            f"cannot write {path}: {error.strerror}; free space or choose another run.dir"
        ) from error

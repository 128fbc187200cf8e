"""One run, one folder: its lock, its resolved config, its fingerprint, and where things lie in it.

config.yaml     the resolved configuration        metrics.jsonl   one row a step
run.json        seed, threads, versions, parts, kernels    checkpoints/    step-N folders and `latest`
samples/        step-N folders                    report.html, summary.json   written at the end
changes.jsonl   keys that changed when the run went on, with the step from which they count
"""

import fcntl
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from sora_train.base.files import write_atomically
from sora_train.config import Config
from sora_train.errors import UserError

CHANGES = "changes.jsonl"
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "av", "pyarrow")


@dataclass(frozen=True)
class Part:
    """What was trained in one go: from `step` on, on `ranks` ranks, with the config in the file `config` of the run."""

    step: int
    ranks: int
    config: str


def parts_of(run_dir: Path) -> list[Part]:
    """The parts of a run in order, as `run.json` has them; none where it was written before they were kept.

    Raises UserError where `run.json` is damaged.
    """
    path = run_dir / "run.json"
    if not path.exists():
        return []
    try:
        return [Part(**part) for part in json.loads(path.read_text()).get("parts", [])]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, a run writes it anew") from error


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
        self._lock = take_lock(self.path)

    def record(self, cfg: Config, world_size: int, forked_from: str = "") -> None:
        """Write config.yaml and run.json; called only once it is clear that the run may start."""
        if not self.is_main:
            return
        write_atomically(
            self.path / "config.yaml", yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
        )
        facts = fingerprint(cfg) | {"parts": [asdict(part) for part in parts_of(self.path)]}
        facts |= {"forked_from": forked_from} if forked_from else {}
        kernels = self.noted("kernels")
        facts |= {"kernels": kernels} if kernels else {}
        write_atomically(self.path / "run.json", json.dumps(facts, indent=1))

    def noted(self, name: str) -> Any:
        """What run.json says under a name; None where it does not."""
        path = self.path / "run.json"
        return json.loads(path.read_text()).get(name) if path.exists() else None

    def note(self, **facts: Any) -> None:
        """Add facts to run.json, or replace them."""
        known = json.loads((self.path / "run.json").read_text())
        write_atomically(self.path / "run.json", json.dumps(known | facts, indent=1))

    def record_part(self, cfg: Config, step: int, ranks: int) -> None:
        """Note that the run goes on from `step` on so many ranks with this config; parts that trained steps after
        it are void. Raises Fault where the folder cannot be written."""
        kept = [part for part in parts_of(self.path) if part.step < step]
        text = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
        config = kept[-1].config if kept else ""
        if not config or (self.path / config).read_text() != text:
            config = f"configs/step-{step:06d}.yaml"
            (self.path / "configs").mkdir(exist_ok=True)
            write_atomically(self.path / config, text)
        parts = [asdict(part) for part in [*kept, Part(step, ranks, config)]]
        self.note(parts=parts)

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


def take_lock(folder: Path) -> IO[str]:
    """The lock of a run folder, held until it is closed. Raises UserError when a live run holds it."""
    # The kernel drops this lock when the process dies, however it dies.
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise UserError(
            f"run.dir={folder} is in use by a live run (process {owner}); wait for it or choose another run.dir"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


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

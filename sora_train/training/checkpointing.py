"""How the trainer saves: the room for it, what a checkpoint tells beside the training's state, a trial."""

from __future__ import annotations

import hashlib
import json
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_train.checkpoint.layout import list_checkpoints
from sora_train.checkpoint.reading import damaged
from sora_train.checkpoint.remote import Remote
from sora_train.checkpoint.saver import Saver
from sora_train.checkpoint.space import Space, require_space, space_for
from sora_train.config import Config
from sora_train.data.storage.remote import filesystem, is_remote
from sora_train.errors import ConfigError
from sora_train.monitoring.run_folder import RunFolder
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.health import longest_wait

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer

# Where a tracker keeps the id of the run it feeds.
RUN_ID = ("wandb_run_id", "trackers/wandb_run_id")


def make_saver(cfg: Config, folder: RunFolder, control: ControlPlane) -> Saver:
    """The run's saver; where an object store has a newer checkpoint than the run folder, that is fetched.

    Raises:
        UserError: the folder cannot be written, or a package for the store is missing.
        Fault: the store does not answer.
    """
    remote = control.together(lambda: open_remote(cfg))
    saver = control.together(
        lambda: Saver(
            folder.checkpoints, cfg.checkpoint, control.world, longest_wait(cfg.health), remote
        )
    )
    if remote is not None and cfg.checkpoint.resume == "auto" and not cfg.dry_run:
        control.together(
            lambda: bring_together(remote, folder.checkpoints) if control.world.is_main else None
        )
    return saver


def open_remote(cfg: Config) -> Remote | None:
    """The object store of `checkpoint.remote`. Raises ConfigError where that is no address."""
    url = cfg.checkpoint.remote
    if not url:
        return None
    if not is_remote(url):
        raise ConfigError(
            f"checkpoint.remote={url} is no address; write s3://bucket/folder, or leave it empty to "
            "keep checkpoints in run.dir alone"
        )
    return Remote(filesystem(url), url, cfg.checkpoint.remote_seconds)


def bring_together(remote: Remote, folder: Path) -> None:
    """Download the store's newest checkpoint if it is newer than all that are here, or upload ours if it lacks that."""
    steps, here = remote.steps(), list_checkpoints(folder)
    if steps and (not here or steps[-1] > here[-1].step):
        remote.fetch(steps[-1], folder)
    elif here and here[-1].step not in steps and not damaged(here[-1]):
        remote.upload_whole(here[-1])


def measure_space(trainer: Trainer) -> Space:
    """Room for this run's checkpoints. Raises UserError, on all ranks, where there is not enough."""
    cfg, folder = trainer.cfg, trainer.folder.checkpoints
    tensors = trainer.tensors()
    space = space_for(folder, tensors, cfg.checkpoint, trainer.step, cfg.train.steps)
    trainer.control.together(
        lambda: require_space(folder, space, cfg.checkpoint) if trainer.world.is_main else None
    )
    return space


def prepare(trainer: Trainer) -> None:
    """Before the first step: the memory of the saves, and one save on trial where the run has none yet."""
    with trainer.health.phase("save"):
        tensors = trainer.tensors()
        trainer.saver.prepare(tensors)
        if trainer.cfg.checkpoint.rehearse and trainer.saved is None:
            trainer.saver.rehearse(tensors, trainer.state())


def record(trainer: Trainer) -> dict[str, Any]:
    """What made a checkpoint, for whoever looks at it later: digests, code, the tracker's run, the key of all draws."""
    cfg, spec = trainer.cfg, trainer.spec
    return {
        "digests": {
            "vae": spec.vae_digest if spec else "",
            "text_encoder": spec.text_digest if spec else "",
            "manifest": trainer.data.sources.digest(),
            "config": config_digest(cfg),
        },
        "code": code_version(),
        "rng_key": cfg.seed,
        "wandb_run_id": run_id(trainer.folder.path),
    }


def config_digest(cfg: Config) -> str:
    """SHA-256 of the resolved configuration."""
    text = json.dumps(cfg.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_version() -> dict[str, str]:
    """The package's version, and the commit of the checkout it runs from, `-dirty` if it was changed since."""
    try:
        package = version("sora_train")
    except PackageNotFoundError:
        package = ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        commit = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {"package": package, "commit": commit}


def run_id(run_dir: Path) -> str:
    """The id under which a tracker knows this run, an empty string where none does."""
    for name in RUN_ID:
        if (run_dir / name).is_file():
            return (run_dir / name).read_text().strip()
    return ""

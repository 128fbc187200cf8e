"""How a run saves: where its checkpoints go, and what a checkpoint tells of the run for people."""

import hashlib
import json
from pathlib import Path

from sora_train.checkpoint.layout import list_checkpoints
from sora_train.checkpoint.reading import damaged
from sora_train.checkpoint.remote import Remote
from sora_train.checkpoint.saver import Saver
from sora_train.config import Config
from sora_train.data.storage.remote import filesystem, is_remote
from sora_train.errors import ConfigError
from sora_train.runtime.health import longest_wait
from sora_train.training.run import RunContext

# Where a tracker keeps the id of the run it feeds.
RUN_ID = ("wandb_run_id", "trackers/wandb_run_id")


def make_saver(run: RunContext) -> Saver:
    """The run's saver; where an object store has a newer checkpoint than the run folder, that is fetched.

    Raises:
        UserError: the folder cannot be written, or a package for the store is missing.
        Fault: the store does not answer.
    """
    cfg, folder, control = run.cfg, run.folder.checkpoints, run.control
    remote = control.together(lambda: open_remote(cfg))
    saver = control.together(
        lambda: Saver(folder, cfg.checkpoint, run.world, longest_wait(cfg.health), remote)
    )
    if remote is not None and cfg.checkpoint.resume == "auto" and not cfg.dry_run:
        control.together(lambda: bring_together(remote, folder) if run.is_main else None)
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


def config_digest(cfg: Config) -> str:
    """SHA-256 of the resolved configuration."""
    text = json.dumps(cfg.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tracker_run_id(run_dir: Path) -> str:
    """The id under which a tracker knows this run, an empty string where none does."""
    for name in RUN_ID:
        if (run_dir / name).is_file():
            return (run_dir / name).read_text().strip()
    return ""

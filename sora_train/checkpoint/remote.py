"""Checkpoints in an object store: there is no rename there, so the manifest, written last, is the commit.

A save goes to the local disk first and is uploaded behind it, each rank its own files. Whatever lies in
the store without a manifest is no checkpoint.
"""

import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sora_train.checkpoint.commit import commit_fetched
from sora_train.checkpoint.layout import (
    MANIFEST,
    REHEARSAL,
    STATE,
    TEMPORARY,
    Checkpoint,
    listed_files,
    name_of,
    step_of,
)
from sora_train.checkpoint.reading import damaged
from sora_train.checkpoint.retention import METRIC, Retention
from sora_train.config.sections.outputs import CheckpointConfig
from sora_train.errors import Fault

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0

Done = TypeVar("Done")


class Remote:
    """The folder `url` of a file system as fsspec has them."""

    def __init__(self, system: Any, url: str, seconds: float):
        self.system, self.url, self.seconds = system, url.rstrip("/"), seconds

    def deadline(self) -> float:
        """Until when, of `time.monotonic`, what begins now is tried again."""
        return time.monotonic() + self.seconds

    # -- up ---------------------------------------------------------------------------------------

    def upload_part(self, checkpoint: Checkpoint, part: int, parts: int, ends: float) -> None:
        """Upload the files that rank `part` of `parts` has written, rank 0 those that are nobody's too.

        Raises:
            Fault: the store did not take a file in time.
        """
        names = listed_files(checkpoint.path)
        for name in names:
            # `__RANK_N.distcp` is DCP's name of a rank's file.
            owner = name.split("_")[2] if name.startswith("__") else ""
            mine = int(owner) == part if owner.isdigit() else part == 0
            if mine:
                self._put(checkpoint.path / name, f"{name_of(checkpoint.step)}/{name}", ends)

    def upload_commit(self, checkpoint: Checkpoint, ends: float) -> None:
        """Upload the manifest, when all ranks' files are there."""
        self._put(checkpoint.path / MANIFEST, f"{name_of(checkpoint.step)}/{MANIFEST}", ends)

    def upload_whole(self, checkpoint: Checkpoint) -> None:
        """Upload a checkpoint from one process, the manifest last: one that an earlier attempt could not."""
        ends = self.deadline()
        for name in listed_files(checkpoint.path):
            self._put(checkpoint.path / name, f"{name_of(checkpoint.step)}/{name}", ends)
        self.upload_commit(checkpoint, ends)

    def rehearse(self, checkpoint: Checkpoint) -> None:
        """Write a small file and remove it. Raises Fault where that may not be."""
        name, ends = f"{REHEARSAL}/{MANIFEST}", self.deadline()
        self._put(checkpoint.path / MANIFEST, name, ends)
        self._again(f"remove {name}", lambda: self.system.rm_file(f"{self.url}/{name}"), ends)

    def _put(self, path: Path, name: str, ends: float) -> None:
        self._again(
            f"upload {name}", lambda: self.system.put_file(str(path), f"{self.url}/{name}"), ends
        )

    # -- down -------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints there, in order; none where the folder is not there."""

        def ask() -> list[int]:
            self.system.invalidate_cache()
            try:
                folders = self.system.ls(self.url, detail=False)
            except FileNotFoundError:
                return []
            steps = [step_of(str(folder).rstrip("/").rpartition("/")[2]) for folder in folders]
            named = sorted(step for step in steps if step is not None)
            return [s for s in named if self.system.exists(f"{self.url}/{name_of(s)}/{MANIFEST}")]

        return self._again("list its checkpoints", ask, self.deadline())

    def fetch(self, step: int, folder: Path) -> Checkpoint:
        """Download a checkpoint into `folder`: verified, then renamed. One process calls this.

        Raises:
            Fault: the store did not give it in time, or gave something else than the manifest says.
        """
        name, ends = name_of(step), self.deadline()
        temporary = folder / (name + TEMPORARY)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._get(f"{name}/{MANIFEST}", temporary / MANIFEST, ends)
            for file in listed_files(temporary):
                self._get(f"{name}/{file}", temporary / file, ends)
            why = damaged(Checkpoint(temporary, step))
            if why:
                raise Fault(
                    f"{self.url}/{name}: {why}; remove it there to go on from the one before"
                )
            commit_fetched(temporary, folder / name)
        except OSError as error:
            raise Fault(
                f"cannot write {folder / name}: {error.strerror}; free space or set run.dir"
            ) from error
        return Checkpoint(folder / name, step)

    def _get(self, name: str, path: Path, ends: float) -> None:
        self._again(
            f"download {name}", lambda: self.system.get_file(f"{self.url}/{name}", str(path)), ends
        )

    # -- retention --------------------------------------------------------------------------------

    def prune(self, cfg: CheckpointConfig, newest: int) -> None:
        """Keep there what is kept here, and nothing beyond the step of the newest, which a run that went back has
        left; a checkpoint loses its manifest first.
        """
        stored = self.steps()
        steps = [step for step in stored if step <= newest]
        losses = {step: self._loss(step) if cfg.keep_best else None for step in steps}
        kept = Retention(cfg.keep_last, cfg.keep_every, cfg.keep_best).kept(losses)
        ends = self.deadline()
        for step in stored:
            if step not in kept:
                self._again(f"remove {name_of(step)}", partial(self._remove, step), ends)

    def _loss(self, step: int) -> float | None:
        path = f"{self.url}/{name_of(step)}/{STATE}"
        text = self._again(f"read {path}", lambda: self.system.cat_file(path), self.deadline())
        return (json.loads(text).get("row") or {}).get(METRIC)

    def _remove(self, step: int) -> None:
        folder = f"{self.url}/{name_of(step)}"
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{folder}/{MANIFEST}")
        self.system.invalidate_cache()
        for path in self.system.find(folder):
            self.system.rm_file(path)

    def _again(self, doing: str, work: Callable[[], Done], ends: float) -> Done:
        """`work()`, tried again until `ends`. Raises Fault, one sentence."""
        attempts, pause = 0, FIRST_PAUSE_SECONDS
        while True:
            attempts += 1
            try:
                return work()
            except (FileNotFoundError, PermissionError) as error:
                message, final = f"{type(error).__name__}: {error}", True
            # Each store's client has failures of its own kind, and all of them may pass.
            except Exception as error:
                message, final = f"{type(error).__name__}: {error}", False
            if final or time.monotonic() + pause > ends:
                raise Fault(
                    f"checkpoint.remote={self.url} cannot {doing}: {' '.join(message.split())[:200]} ({attempts} "
                    f"attempt(s), checkpoint.remote_seconds={self.seconds:g}); checkpoints on the local disk are "
                    "whole, look after the bucket or leave checkpoint.remote empty, then run the same command again"
                )
            time.sleep(pause * random.uniform(0.75, 1.25))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

"""The saves of a run: at once, or copied in a moment and written behind the training by one thread a rank.

The thread's collectives go over a group of its own, so they never meet those of the training. At most
one save is on its way; the next one waits for it. Its failure is returned by `poll` and raised by
`wait`, on all ranks.
"""

import json
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_train.checkpoint.layout import REHEARSAL, Checkpoint, recover
from sora_train.checkpoint.points import reach
from sora_train.checkpoint.reading import damaged
from sora_train.checkpoint.remote import Remote
from sora_train.checkpoint.retention import prune
from sora_train.checkpoint.saving import write
from sora_train.checkpoint.staging import Staging
from sora_train.config.sections.outputs import CheckpointConfig
from sora_train.errors import Fault
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World

# How long a run that has failed waits for a save that is on its way; another rank may be gone.
ABANDON_SECONDS = 20.0


class Saver:
    """Every rank makes one and calls its methods in the same order."""

    def __init__(
        self,
        folder: Path,
        cfg: CheckpointConfig,
        world: World,
        timeout: timedelta,
        remote: Remote | None = None,
    ):
        self.folder, self.cfg, self.remote = folder, cfg, remote
        longest = timeout + timedelta(seconds=cfg.remote_seconds if remote else 0)
        self.control = ControlPlane(world, longest)
        self.staging: Staging | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._seconds = 0.0
        if world.is_main:
            recover(folder)

    @property
    def is_async(self) -> bool:
        return self.cfg.mode == "async"

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Allocate what later saves of tensors like these need; the others do it when they are first met."""
        if self.is_async and (self.staging is None or not self.staging.fits(tensors)):
            self.staging = Staging(tensors)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Save `tensors` as they are now.

        Raises:
            Fault: this save, or where saves are written behind the one before it, could not be written.
        """
        self.wait()
        text = json.dumps(state, indent=1) if self.control.world.is_main else ""
        if not self.is_async:
            reach("after_copy", self.folder, self.control.world.rank)
            self._write(step, tensors, text, None)
            return
        self.prepare(tensors)
        staging = self.staging
        assert staging is not None
        staging.copy(tensors)
        reach("after_copy", self.folder, self.control.world.rank)
        self._thread = threading.Thread(
            target=self._behind, args=(step, tensors, text, staging), name="save", daemon=True
        )
        self._thread.start()

    def let_write(self) -> None:
        """Called before anything changes the tensors: until then a save may still be copying them."""
        if self.staging is not None:
            self.staging.let_write()

    @property
    def is_busy(self) -> bool:
        """Whether a save is on its way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def take_seconds(self) -> float:
        """How long the last save took from its first byte to its commit, since it was asked last; else 0."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def poll(self) -> Exception | None:
        """What went wrong in the save that was on its way, None while nothing has."""
        return self._error

    def wait(self) -> None:
        """Until no save is on its way.

        Raises:
            Fault: it could not be written; on all ranks.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        self.control.raise_together(error)

    def close(self) -> None:
        """Let go of a save that is still on its way when a run has failed: it may wait for a rank that is gone."""
        if self._thread is not None:
            self._thread.join(ABANDON_SECONDS)

    def rehearse(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Save into a folder of its own as a run does: write, commit, read back, remove.

        Raises:
            Fault: it could not be written, or what is on the disk is something else.
        """
        folder, world = self.folder / REHEARSAL, self.control.world
        text = json.dumps(state, indent=1) if world.is_main else ""
        self.prepare(tensors)
        try:
            self._try_out(folder, tensors, text)
        finally:
            if world.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _try_out(self, folder: Path, tensors: dict[str, Tensor], text: str) -> None:
        world, staging = self.control.world, self.staging
        if staging is not None:
            staging.copy(tensors)
            staging.wait()
        checkpoint = write(
            folder, 0, tensors, text, self.control, staging.read if staging else None
        )
        damage = damaged(checkpoint, part=world.rank, parts=world.size)
        message = f"{damage} as soon as it is written: the storage does not keep what it is given"
        self.control.raise_together(Fault(message) if damage else None)
        if staging is not None:
            staging.read_back(checkpoint, tensors, self.control)
        self.control.raise_together(self._probe_remote(checkpoint) if world.is_main else None)

    def _probe_remote(self, checkpoint: Checkpoint) -> Exception | None:
        """What is wrong with the object store, met before the first step rather than at the first save."""
        if self.remote is None:
            return None
        try:
            self.remote.rehearse(checkpoint)
        except Fault as error:
            return error
        return None

    def _behind(self, step: int, tensors: dict[str, Tensor], text: str, staging: Staging) -> None:
        """The thread's work; its failures are for `poll` and `wait`."""
        try:
            if self.control.world.device.type == "cuda":
                torch.cuda.set_device(self.control.world.device)
            staging.wait()
            self._write(step, tensors, text, staging)
        except Exception as error:
            self._error = error

    def _write(
        self, step: int, tensors: dict[str, Tensor], text: str, staging: Staging | None
    ) -> None:
        read = staging.read if staging else None
        began = time.monotonic()
        checkpoint = write(self.folder, step, tensors, text, self.control, read)
        self._seconds = time.monotonic() - began
        self.control.raise_together(self._pruned() if self.control.world.is_main else None)
        if self.remote is not None:
            self._upload(self.remote, checkpoint)

    def _pruned(self) -> Exception | None:
        cfg = self.cfg
        try:
            prune(self.folder, cfg.keep_last, cfg.keep_every, cfg.keep_best)
        except Fault as error:
            return error
        return None

    def _upload(self, remote: Remote, checkpoint: Checkpoint) -> None:
        """Each rank its own files; the manifest, written last, is the commit there."""
        world = self.control.world
        ends = remote.deadline()
        self.control.together(lambda: remote.upload_part(checkpoint, world.rank, world.size, ends))
        self.control.together(
            lambda: remote.upload_commit(checkpoint, ends) if world.is_main else None
        )
        self.control.together(
            lambda: remote.prune(self.cfg, checkpoint.step) if world.is_main else None
        )

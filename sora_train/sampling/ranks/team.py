"""The processes of one `sora sample`: how they meet, what each makes, who writes it, and how they end together."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sora_train.config.sections.model import ModelConfig
from sora_train.errors import EXIT_FAULT, Fault, SoraError, UserError
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.parallel.context.context import apply_context_parallel, make_context_groups
from sora_train.parallel.parallelize import transformers_of
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World, lost_peer, start, stop
from sora_train.sampling.ranks.frames import FramesInTurn
from sora_train.sampling.ranks.layout import Layout, check_context
from sora_train.sampling.ranks.rows import SharedRows

Made = TypeVar("Made")

COLLECTING = timedelta(hours=12)
"""How long the first process waits for what the others make: teams may have unequally many clips."""


class Team:
    """This process and those it makes clips with, among all that sample.

    Attributes:
        world: facts about this process.
        number: of this team; team i makes clips i, i + prompts, ...
    """

    def __init__(self, world: World, layout: Layout, cfg: ModelConfig):
        """A collective: all processes make all groups, in one order."""
        check_context(layout, cfg)
        self.world, self.layout = world, layout
        self.number = world.rank // layout.team
        self.control = ControlPlane(world, COLLECTING)
        self._degrees = layout.degrees(cfg.num_heads)
        self._context = make_context_groups(self._degrees, world)
        self._rows = self._group(
            [
                [first + place for place in range(0, layout.team, layout.context)]
                for team in range(0, world.size, layout.team)
                for first in range(team, team + layout.context)
            ]
        )
        self._whole = self._group(
            [list(range(team, team + layout.team)) for team in range(0, world.size, layout.team)]
        )

    def _group(self, groups: list[list[int]]) -> Any:
        """This process's group, or None where it is alone in it."""
        own = None
        for ranks in groups if len(groups[0]) > 1 else []:
            group = dist.new_group(ranks, timeout=self.world.timeout)
            own = group if self.world.rank in ranks else own
        return own

    def share(self, model: nn.Module, vae: VideoVAE) -> None:
        """Have the team compute each call of the model and decode each clip together, in place; neither knows.

        Raises:
            UserError: the model has no tokens that can be cut.
        """
        for part in transformers_of(model):
            if self.layout.context > 1 and not isinstance(part, VideoDiT):
                raise UserError(
                    f"--parallel context={self.layout.context} cuts the tokens of VideoDiT, and this run's model is "
                    f"{type(part).__name__}; take context=1"
                )
        apply_context_parallel(model, self._degrees, self._context)
        if self._rows is not None:
            for part in transformers_of(model):
                part.forward = SharedRows(part.forward, self._rows)
        if self._whole is not None:
            vae.stream = FramesInTurn(self._whole)

    @property
    def leads(self) -> bool:
        """Whether this process writes what its team makes."""
        return self.world.rank % self.layout.team == 0

    def wait(self) -> None:
        """Until all teams are here. A collective."""
        self.control.gather_objects(None)

    def numbers(self, count: int) -> Sequence[int]:
        """Which of `count` clips this team makes."""
        return range(self.number, count, self.layout.prompts)

    def collect(self, clips: list[np.ndarray], count: int) -> list[np.ndarray]:
        """All `count` clips on the first process, in their order; none on the others.

        Args:
            clips: of this team, in the order of its `numbers`.
        """
        shapes = self.control.gather_objects([clip.shape for clip in clips])
        group, found = self.control.group, dict(zip(self.numbers(count), clips, strict=True))
        for number in range(count if self.layout.prompts > 1 else 0):
            team, place = number % self.layout.prompts, number // self.layout.prompts
            giver = team * self.layout.team
            if team == 0:
                continue
            if self.world.rank == giver:
                dist.send(torch.from_numpy(np.ascontiguousarray(found[number])), 0, group)
            elif self.world.is_main:
                of_rank: Any = shapes[giver]
                coming = torch.empty(of_rank[place], dtype=torch.uint8)
                dist.recv(coming, giver, group)
                found[number] = coming.numpy()
        return [found[number] for number in range(count)] if self.world.is_main else []


def processes() -> int:
    """How many were started together, by torchrun or its like."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def with_one_voice(work: Callable[[World | None], Made]) -> Made:
    """`work(world)` in all processes, None for one that is alone. Of several the first that fails tells why; the
    others end with its exit code or 1, without a word."""
    if processes() == 1:
        return work(None)
    world = start("auto", 0)
    try:
        made = work(world)
    except Exception as error:
        if not _is_first_to_fail():
            code = error.exit_code if isinstance(error, SoraError) else EXIT_FAULT
            raise SystemExit(code) from None
        if lost_peer(error) is None:
            raise
        raise Fault(
            "the connection to another process broke, so it failed or was killed; its own output says why"
        ) from error
    stop(world)
    return made


def _is_first_to_fail() -> bool:
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except Exception:
        # Whoever kept the store is gone without having told.
        return True

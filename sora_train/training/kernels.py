"""The kernels of bfloat16 on a CPU: decided once in a run, alike on all ranks, and kept when it goes on."""

from dataclasses import asdict
from typing import Any

import torch

from sora_train.models.transformer.cpu_kernels import (
    DEFAULT,
    Kernels,
    ShapeClass,
    choose,
    circumstances,
    use,
)
from sora_train.models.transformer.cpu_trials import step_of
from sora_train.training.pipeline.data import TrainingData, mean_step
from sora_train.training.run import RunContext


def settle_kernels(run: RunContext, data: TrainingData) -> Kernels:
    """Decide the kernels of this process and of all ranks, and note them in run.json; a collective.

    A run that goes on in its folder takes those that it began with, as long as machine and libraries are the same.
    PyTorch's own are taken without a trial where `run.deterministic` is true or `model.attention` names a kernel, and
    where nothing computes in bfloat16 on a CPU.
    """
    kernels = DEFAULT
    if is_open(run):
        decided = run.control.together(lambda: decide(run, data) if run.is_main else None)
        broadcast = run.control.broadcast(decided)
        assert isinstance(broadcast, Kernels)
        kernels = broadcast
    use(kernels)
    return kernels


def is_open(run: RunContext) -> bool:
    """Whether there is something to choose."""
    cfg = run.cfg
    return (
        cfg.task == "text_to_video"
        and run.world.device.type == "cpu"
        and run.layout.param_dtype == torch.bfloat16
        and cfg.model.attention == "auto"
        and cfg.run.deterministic is not True
    )


def decide(run: RunContext, data: TrainingData) -> Kernels:
    """The kernels that the run folder names, or the fastest for an average micro-batch."""
    noted = recorded(run)
    if noted is not None:
        return noted
    model = run.cfg.model
    clips, tokens, _ = mean_step(data, 0)
    shape = ShapeClass.of(
        clips / data.micro_batches,
        tokens / max(clips, 1),
        model.num_heads,
        model.head_dim,
        model.ffn_dim,
    )
    kernels = choose(shape, step_of)
    run.folder.note(kernels=asdict(kernels) | {"found on": circumstances()})
    return kernels


def recorded(run: RunContext) -> Kernels | None:
    """What run.json says, if it was found under these circumstances."""
    noted: dict[str, Any] = run.folder.noted("kernels") or {}
    if noted.pop("found on", None) != circumstances():
        return None
    return Kernels(**noted)

"""One rank's training step on fake tensors, by the engine that trains, and what it holds at its height.

The process group is a fake one of any size, in which nothing is sent; the rank is the first, which has
the largest part of what does not divide. Runs in a process of its own (memory_worker.py).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from sora_train.config import Config
from sora_train.models.adapters.inject import add_adapter
from sora_train.models.quantised.linear import quantise_base
from sora_train.models.text_to_video import TextToVideo
from sora_train.objectives import FlowBatch
from sora_train.objectives.flow_batch import blank_inputs
from sora_train.parallel import fsdp
from sora_train.parallel.context.context import ContextGroups, neighbours
from sora_train.parallel.deepspeed.engine import rank_checks
from sora_train.parallel.degrees import Degrees, resolve_degrees
from sora_train.parallel.engine import build_engine
from sora_train.parallel.layout import Layout
from sora_train.parallel.memory import host_optimizer, masters, offload, swap
from sora_train.parallel.protocol import Engine, resolve_param_dtype
from sora_train.runtime.world import World
from sora_train.tools.plan.memory.count import Held
from sora_train.training.optim.ema import Ema
from sora_train.training.optim.optim import build_optimizer

Peaks = dict[str, dict[str, int]]
KINDS = ("weights", "gradients", "optimizer", "ema", "activations", "buffers")


def step_peaks(
    cfg: Config, world_size: int, shape: tuple[int, int, int, int], clips: int, caption: int
) -> Peaks:
    """Bytes by kind at the height of each moment of a step over `clips` clips of latents of this shape (C, T, H, W)
    with captions of `caption` tokens."""
    degrees = resolve_degrees(cfg.parallel, world_size)
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        world = World(0, world_size, 0, 1, torch.device("cpu"), cp=degrees.cp)
        dtype = resolve_param_dtype(cfg.parallel.param_dtype, world.device)
        layout = Layout(degrees, dtype, own_groups(degrees))
        batches = -(-cfg.train.micro_batches // world.dp_size)
        held = Held()
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(mesh_of_real_tensors())
            if not made_empty(cfg, world_size):
                stack.enter_context(replaced(nn.Module, "_apply", converted))
            if cfg.parallel.engine == "zero3":
                # It compares lists with the first rank's, which is this one; nothing is sent here.
                checks = rank_checks()
                for name in ("get_lst_from_rank0", "assert_lst_len_same_as_other_ranks"):
                    stack.enter_context(replaced(checks, name, lambda numbers: numbers))
            stack.enter_context(held)
            stack.enter_context(engine_kinds(held))
            run = FakeRun(cfg, world, layout, held)
            # ZeRO-3 keeps and fetches weights by the order that it has seen in the first step.
            for step in range(2 if cfg.parallel.engine == "zero3" else 1):
                held.forget()
                # One backward pass that keeps and one that reduces show all that accumulation holds.
                run.step(step, min(2, batches), shape, clips, caption)
            run.engine.close()
        return held.peaks
    finally:
        dist.destroy_process_group()


class FakeRun:
    """What the trainer builds, on fake tensors, and its step."""

    def __init__(self, cfg: Config, world: World, layout: Layout, held: Held):
        self.cfg, self.held = cfg, held
        with held.making("buffers"):
            self.model = model_of(cfg, world.size)
            if cfg.adapter.on:
                add_adapter(self.model, cfg.adapter, layout.param_dtype)
                quantise_base(self.model, cfg.memory.base)
            self.engine: Engine = build_engine(
                self.model, cfg, world, layout, partial(build_optimizer, cfg.optim)
            )
        held.mark(self.model.parameters(), "weights")
        held.mark((weight for _, weight in self.engine.weights.named_parameters()), "weights")
        held.mark(swapped_out(self.engine), "host")
        if not cfg.text.trainable:
            # A stand-in; the frozen networks are counted apart.
            held.mark(self.model.frozen_encoder.parameters(), "host")
        with held.making("optimizer"):
            moments = self.engine.optimizer_state()
        on_host = cfg.parallel.offload_optimizer or cfg.parallel.offload_params
        held.mark(moments.values(), "host" if on_host else "optimizer")
        with held.making("ema"):
            self.ema = Ema(self.engine.weights, cfg.ema.decay, cfg.ema.more, cfg.ema.post_hoc)
        for parameter in self.model.parameters():
            # With masters a gradient is theirs before it is looked at here.
            if parameter.requires_grad and not getattr(self.engine, "masters", None):
                parameter.register_post_accumulate_grad_hook(
                    lambda p: held.mark([p.grad], "gradients")
                )

    def step(
        self, number: int, batches: int, shape: tuple[int, int, int, int], clips: int, caption: int
    ) -> None:
        held, cfg = self.held, self.cfg
        held.kind = "activations"
        for place in range(batches):
            held.during("forward")
            flow = batch_of(cfg, shape, clips, caption)
            losses = flow.losses(self.engine.model)
            del flow
            loss = (losses.sum() * 1.0) / 4.0
            held.during("backward")
            self.engine.backward(torch.stack([loss]).sum(), last=place == batches - 1)
        held.during("step")
        held.kind = "buffers"
        norm = self.engine.gradient_norm()
        self.engine.step(1e-4, norm, torch.zeros_like(norm, dtype=torch.bool))
        self.ema.update(number)
        held.during("")


def swapped_out(engine: Engine) -> list[Tensor]:
    """Frozen matrices that wait on the host for a first pass."""
    swapper = getattr(engine, "swapper", None)
    return [host for block in swapper.swapped for host in block.hosts] if swapper else []


def made_empty(cfg: Config, world_size: int) -> bool:
    """Whether weights are given memory only once they are sharded. With an adapter a run does that too, but fake
    parameters whose dtype was changed change no places; all that lasts is the same in the end."""
    return cfg.parallel.engine == "fsdp" and world_size > 1 and not cfg.adapter.on


def model_of(cfg: Config, world_size: int) -> TextToVideo:
    """The model without memory for weights where the engine gives them some; a frozen text encoder stays outside."""
    text = cfg.text
    if not text.trainable:
        # Only its width is met: captions come embedded.
        small = {"path": "", "num_layers": 1, "num_heads": 1, "d_kv": 1, "d_ff": 1}
        text = text.model_copy(update=small)
    if made_empty(cfg, world_size):
        with torch.device("meta"):
            return TextToVideo(cfg.model, text, empty=True)
    with replaced(TextToVideo, "init_weights", lambda *_: None):
        return TextToVideo(cfg.model, text)


def batch_of(cfg: Config, shape: tuple[int, int, int, int], clips: int, caption: int) -> FlowBatch:
    """Clips of latents of this shape, as the objective gives them to the model."""
    size, frames = (clips, *shape), shape[1]
    text: tuple[Tensor, ...] = ()
    if not cfg.text.trainable:
        one = torch.empty(caption, cfg.text.d_model, dtype=getattr(torch, cfg.text.dtype))
        text = (one,) * clips
    return FlowBatch(
        x=torch.empty(size),
        noise=torch.empty(size),
        t_B=torch.empty(clips),
        mask_BT=torch.empty(clips, frames),
        prompts=["x" * (caption - 1)] * clips,
        fps_B=torch.empty(clips),
        text=text,
        t_cond_B=torch.empty(clips),
        time_weight=torch.empty(clips),
        **blank_inputs(cfg.model, clips, shape[1:]),
    )


def own_groups(degrees: Degrees) -> ContextGroups | None:
    """The first rank's groups of context parallelism and no other's, which at 10,000 ranks take minutes to make."""
    if degrees.cp == 1:
        return None
    return ContextGroups.of(
        {
            name: dist.new_group(next(ranks for ranks in groups if 0 in ranks))
            for name, groups in neighbours(degrees.cp, degrees).items()
        }
    )


def converted(
    module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`Module._apply` that changes parameters in place: fake ones would change places with others, which what holds
    them forbids."""
    for own in module.modules() if recurse else (module,):
        for parameter in own._parameters.values():
            if parameter is not None:
                parameter.data = function(parameter.data)
    return module


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def mesh_of_real_tensors() -> Iterator[None]:
    """A mesh reads its own tensor of ranks, which therefore cannot be a fake one."""
    build = fsdp.build_mesh

    def build_real(*args: Any) -> Any:
        with unset_fake_temporarily():
            return build(*args)

    with replaced(fsdp, "build_mesh", build_real):
        yield


@contextmanager
def engine_kinds(held: Held) -> Iterator[None]:
    """What FSDP2 gathers is buffers, what it reduces gradients, what is offloaded on the host."""

    def counted_as(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with held.making(kind):
                return function(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for owner, name, kind in (
            (FSDPParamGroup, "unshard", "buffers"),
            (FSDPParamGroup, "wait_for_unshard", "buffers"),
            (masters.Masters, "_hand_over", "gradients"),
            (FSDPParamGroup, "post_backward", "gradients"),
            (FSDPParamGroup, "finalize_backward", "gradients"),
            (host_optimizer, "_on_host", "host"),
            (swap.Swapped, "to_device", "weights"),
            (offload.Offloader, "_to_host", "host"),
        ):
            stack.enter_context(replaced(owner, name, counted_as(kind, getattr(owner, name))))
        yield

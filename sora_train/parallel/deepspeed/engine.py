"""DeepSpeed's ZeRO-1, 2 and 3 behind the engine's protocol; the only file that imports it, when it is asked for.

Its data-parallel group is the whole world. It divides gradients by the world's size, and ours are sums
over the ranks of a loss divided by `cp`, so the loss is multiplied by world / cp, here and nowhere else.
Norm, clipping and learning rate are ours. A rank holds float32 masters and moments as flat runs of a
parameter's values, which are named, saved, loaded and averaged as FlatShards, with nothing gathered.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_train.config import Config
from sora_train.errors import ConfigError, Fault
from sora_train.parallel.deepspeed.settings import STAGES, deepspeed_config
from sora_train.parallel.layout import Layout
from sora_train.parallel.memory.activations import prepare_blocks
from sora_train.parallel.memory.moments import moments_of
from sora_train.parallel.parallelize import sharding_units
from sora_train.parallel.protocol import NamedWeights, OptimizerBuilder, kept_parameters
from sora_train.parallel.shards import FlatShard
from sora_train.runtime.world import World, set_timeout

LINEAR = nn.functional.linear


@dataclass(frozen=True)
class FlatRun:
    """Where this rank's run of a parameter's values lies."""

    flat: int
    """Number of DeepSpeed's flat float32 tensor."""
    offset: int
    """Of the run in the flat tensor."""
    start: int
    """Of the run in the parameter."""
    values: int
    shape: torch.Size

    def of(self, flat: Tensor) -> FlatShard:
        """The run of a tensor that is laid out as the flat one is."""
        return FlatShard(
            flat.detach()[self.offset : self.offset + self.values], self.shape, self.start
        )


class ZeroEngine:
    """ZeRO-1, 2 or 3 over all ranks."""

    def __init__(
        self,
        model: nn.Module,
        cfg: Config,
        world: World,
        layout: Layout,
        build_optimizer: OptimizerBuilder,
    ):
        self.stage = STAGES[cfg.parallel.engine]
        self.grad_clip = cfg.optim.grad_clip
        self.param_dtype = layout.param_dtype
        self.world = world
        self.offloaded = cfg.parallel.offload_optimizer or cfg.parallel.offload_params
        self.loss_scale = world.size / layout.degrees.cp
        # ZeRO-3 gathers weights inside a block, which is no one graph then.
        wanted = "off" if self.stage == 3 else cfg.model.compile
        self._recompiles, _ = prepare_blocks(model, cfg, world.device, wanted)
        parameters = kept_parameters(model, cfg)
        require_trainable(cfg.parallel.engine, parameters)
        # DeepSpeed makes masters of the weights as they compute, which would lose what bfloat16 cannot hold.
        first = {name: parameter.detach() for name, parameter in parameters.items()}
        told = deepspeed_config(
            cfg,
            layout.degrees,
            layout.param_dtype,
            pin_memory=world.device.type == "cuda",
        )
        # Said of every gather of ZeRO-3, wherever the model is called.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated")
        with quiet():
            self.engine = initialised(model, build_optimizer(parameters, parameters), told, world)
        self.model = model
        self.zero = self.engine.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        self.flats: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )
        trained = kept_parameters(model, cfg)
        self.places = (self._places_by_parameter if self.stage == 3 else self._places_by_group)(
            trained
        )
        masters = {name: place.of(self.flats[place.flat]) for name, place in self.places.items()}
        self.weights = NamedWeights(masters)
        for name, master in masters.items():
            master.part.copy_(local_run(first[name], self.places[name]))
        self.weights_changed()

    # --- a step ---

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with quiet():
            # What DeepSpeed does around its own call of the model, which is called directly here.
            self.zero.clear_backward_seen_flag()
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine._backward_prologue()
            self.engine.backward(loss * self.loss_scale, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        if self.stage < 3 and zero_offloads(self.zero):
            # Gradients may still be on their way to the host.
            self.zero._wait_for_offload_copies()
        norms = torch.stack(torch._foreach_norm(self._gradients()))
        square = norms.square().sum().to(self.world.device)
        # Each rank holds its own run of every gradient.
        dist.all_reduce(square)
        return square.sqrt()

    def step(self, lr: float, norm: Tensor, bad: Tensor) -> None:
        # DeepSpeed's own step waits for the device too.
        if bad:
            self.skip()
            return
        if self.grad_clip:
            scale = (self.grad_clip / norm).clamp(max=1.0)
            torch._foreach_mul_(self._gradients(), scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        with quiet():
            self.engine.step()
        if self.zero.overflow:
            raise Fault(
                f"DeepSpeed left out a step whose gradient norm is {float(norm)!r}; go on from the last checkpoint"
            )

    def skip(self) -> None:
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        if self.stage == 3:
            zero._pre_step()
            zero.averaged_gradients = {}
        else:
            zero.micro_step_id = -1
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        if zero_offloads(zero):
            zero.reset_cpu_buffers()

    def recompiles(self) -> int | None:
        return None if self._recompiles is None else self._recompiles.count

    def _gradients(self) -> list[Tensor]:
        """This rank's runs of the step's gradients, averaged over the world, padding included, which is 0."""
        if zero_offloads(self.zero):
            return [flat.grad for flat in self.flats if flat.grad is not None]
        return [part for parts in self.zero.averaged_gradients.values() for part in parts or ()]

    # --- state ---

    def model_state(self) -> dict[str, Tensor]:
        return dict(self.weights.named_parameters())

    def optimizer_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        moments = [moments_of(self.optimizer, flat) for flat in self.flats]
        for name, place in self.places.items():
            for key, kept in moments[place.flat].items():
                state[f"{name}.{key}"] = place.of(kept) if kept.ndim else kept
        return state

    @torch.no_grad()
    def weights_changed(self) -> None:
        with quiet():
            if self.stage < 3:
                self.zero.update_lp_params()
                return
            # Weights that are still gathered would be computed with as they were.
            self.zero._partition_all_parameters()
            for number in range(len(self.flats)):
                self.zero._reassign_or_swap_out_partitioned_parameters(number)
            whole = self.zero.persistent_parameters
            if whole:
                whole[0].all_gather(whole)

    def close(self) -> None:
        with quiet():
            self.engine.destroy()
            # ZeRO-3 puts another in its place for the whole process.
            nn.functional.linear = LINEAR
            # A process alone makes a group anew for each run; that of a launcher is there to the end.
            if self.world.owns_group and self.world.size == 1:
                forget_groups()

    def _places_by_group(self, trained: dict[str, nn.Parameter]) -> dict[str, FlatRun]:
        """ZeRO-1 and 2: the parameters of a group lie end to end, cut into as many runs as there are ranks."""
        found: dict[int, FlatRun] = {}
        for flat, parameters in enumerate(self.zero.bit16_groups):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                place = FlatRun(flat, 0, 0, 0, parameter.shape)
                if mapping is not None:
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    place = FlatRun(flat, here.start, there.start, here.numel, parameter.shape)
                found[id(parameter)] = place
        return {name: found[id(value)] for name, value in trained.items()}

    def _places_by_parameter(self, trained: dict[str, nn.Parameter]) -> dict[str, FlatRun]:
        """ZeRO-3: each parameter is cut into as many runs as there are ranks, the last ones padded."""
        found: dict[str, FlatRun] = {}
        for name, parameter in trained.items():
            flat, offset, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(self.world.rank * int(padded), parameter.ds_numel)
            values = min(int(padded), parameter.ds_numel - start)
            found[name] = FlatRun(flat, int(offset), start, values, torch.Size(parameter.ds_shape))
        return found


def local_run(whole: Tensor, place: FlatRun) -> Tensor:
    return whole.reshape(-1)[place.start : place.start + place.values]


def zero_offloads(zero: Any) -> bool:
    """Whether gradients lie in host memory, as the gradients of the flat tensors."""
    return bool(getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False))


def require_trainable(engine: str, kept: dict[str, nn.Parameter]) -> None:
    """Raises ConfigError where a parameter is kept and not trained: ZeRO has no master of it that could be saved."""
    frozen = [name for name, value in kept.items() if not value.requires_grad]
    if frozen:
        raise ConfigError(
            f"parallel.engine={engine} saves trained weights only, and {frozen[0]} is not trained; set "
            "parallel.engine=fsdp, which can"
        )


# --- the package ---


def require_deepspeed(engine: str) -> None:
    """Raises ConfigError where the package is missing; does not import it, which takes seconds."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"parallel.engine={engine} needs DeepSpeed: pip install 'sora_train[deepspeed]', or set "
            "parallel.engine=fsdp, which needs nothing more"
        )


def initialised(
    model: nn.Module, optimizer: torch.optim.Optimizer, told: dict[str, Any], world: World
) -> Any:
    """DeepSpeed's engine around `model`, on the process group that is there."""
    # Read at import; without it DeepSpeed guesses from what is installed.
    os.environ["DS_ACCELERATOR"] = world.device.type
    # It asks for what a launcher sets; a single process has none.
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
    from deepspeed.utils import groups, set_z3_leaf_module

    for unit in sharding_units(model):
        # ZeRO-3 gathers a block's weights before it and not inside, where a checkpoint would meet it.
        set_z3_leaf_module(unit, True)

    class Engine(DeepSpeedEngine):
        """For ZeRO-1 in bfloat16 the original takes another optimizer, which lays its masters out otherwise."""

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            return ZERO_OPTIMIZATION

    chosen = get_accelerator().device_name()
    if chosen != world.device.type:
        raise Fault(
            f"DeepSpeed was imported for {chosen} in this process already, and run.device is {world.device.type}; "
            "start a process of its own"
        )
    # Else a CPU's all-reduce is compiled with the machine's C++ compiler, which takes minutes and leaves files.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        verbose=False,
    )
    engine = Engine(
        args=None,
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config=told,
        config_class=DeepSpeedConfig(told),
    )
    set_timeout(world.timeout, groups._clone_world_group())
    return engine


def rank_checks() -> ModuleType:
    """DeepSpeed's functions that compare a list with the first rank's; a plan on fake ranks replaces them."""
    import deepspeed.runtime.zero.utils

    return deepspeed.runtime.zero.utils


def forget_groups() -> None:
    """DeepSpeed keeps the process groups it has made, which are gone with the one they were made of."""
    import deepspeed.comm
    from deepspeed.utils import groups

    groups._release_process_group_references(group=None)
    deepspeed.comm.comm.cdb = None


@contextmanager
def quiet() -> Iterator[None]:
    """Without DeepSpeed's own lines on stdout; what it does wrong it raises."""
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before

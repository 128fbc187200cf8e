"""Facts about this rank, and the start and end of its process group."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from sora_train.errors import Fault, UserError

TIMEOUT = timedelta(minutes=10)
MEETING = timedelta(minutes=5)
"""How long ranks wait for each other where a group is made."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where the settings of PyTorch's allocator are: its name since 2.9, and the one before."""


@dataclass(frozen=True)
class World:
    """Facts about this rank, collected once and passed around."""

    rank: int
    size: int
    local_rank: int
    ranks_per_node: int
    device: torch.device
    owns_group: bool = True
    """Whether `start` made the process group; one that was there before is left to whoever made it."""
    cp: int = 1
    """Neighbouring ranks that work on one micro-batch together, each on a part of its tokens."""
    timeout: timedelta = TIMEOUT
    """How long a collective of this job may take."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cp_rank(self) -> int:
        """This rank among those that share its micro-batches; 0 speaks for them where things are counted."""
        return self.rank % self.cp

    @property
    def dp_rank(self) -> int:
        """The number of the group that this rank shares its micro-batches with: which samples it reads."""
        return self.rank // self.cp

    @property
    def dp_size(self) -> int:
        """Into how many parts a step's samples are divided."""
        return self.size // self.cp


def pick_device(setting: str, local_rank: int = 0) -> torch.device:
    """The torch device for `run.device`; asking for a GPU that is not there is an error."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device=cuda, but torch sees no GPU here; set run.device=cpu or auto")
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def start(
    wanted_device: str, threads: int, timeout: timedelta = TIMEOUT, meeting: timedelta = MEETING
) -> World:
    """Join the process group described by torchrun's environment, or make one of a single rank.

    Tensors on a GPU travel over NCCL, the control plane over gloo: both live in one group. `timeout` is
    that of its collectives.

    Raises:
        Fault: not all ranks came within `meeting`.
    """
    grow_segments()
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = pick_device(wanted_device, local_rank)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // ranks_per_node))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    owns_group = not dist.is_initialized()
    if owns_group:
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            _meet(backend, meeting)
            set_timeout(timeout)
    return World(rank, size, local_rank, ranks_per_node, device, owns_group, timeout=timeout)


def _meet(backend: str, meeting: timedelta) -> None:
    """Make the default group of all ranks. Raises Fault, with those that are missing, when its time is over."""
    arrived, store, size = "", None, int(os.environ["WORLD_SIZE"])
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=meeting)))
        store.set(f"arrived/{rank}", "")
        store.wait([f"arrived/{other}" for other in range(size)], meeting)
        arrived = "; all had arrived, so one has failed since"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=meeting)
    except dist.DistError as error:
        if store is not None and not arrived:
            missing = [str(other) for other in range(size) if not store.check([f"arrived/{other}"])]
            arrived = f"; missing: rank(s) {', '.join(missing)}"
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise Fault(
            f"the {size} ranks of this job did not meet at {address} within health.meeting_seconds="
            f"{meeting.total_seconds():g}{arrived} ({' '.join(str(error).split())[:160]}); look at the logs of those "
            "that are missing, and whether every node reaches that address"
        ) from error


def set_determinism(setting: bool | str, device: torch.device) -> None:
    """Take kernels that give the same bits each time: always, never, or with `auto` on a CPU."""
    if setting is True:
        # cuBLAS refuses to work deterministically without workspaces of fixed sizes; it reads this when CUDA begins.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(
        setting is True or (setting == "auto" and device.type == "cpu")
    )
    # Filling every fresh tensor with NaN is a hunt for bugs, not determinism, and costs a tenth of a small step.
    torch.utils.deterministic.fill_uninitialized_memory = False


def set_timeout(timeout: timedelta, group: dist.ProcessGroup | None = None) -> None:
    """How long the collectives of a group may take, from now on."""
    _set_pg_timeout(timeout, group)


def grow_segments() -> None:
    """Let the GPU's allocator grow its segments, which clips of many sizes would break into pieces, unless the
    environment says otherwise; before CUDA is initialised."""
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def allocator() -> str:
    """The allocator's settings, as the environment has them."""
    return " ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ)


def stop(world: World) -> None:
    if world.owns_group and dist.is_initialized():
        dist.destroy_process_group()


def lost_peer(error: BaseException) -> Fault | None:
    """What it means that a collective broke off, or None where `error` is something else."""
    text = " ".join(str(error).split())
    signs = ("gloo/transport", "NCCL", "Connection reset by peer", "Connection closed by peer")
    if not isinstance(error, RuntimeError) or not any(word in text for word in signs):
        return None
    return Fault(
        f"the connection to another rank broke, so that rank failed or was killed ({text[:160]}); its own log says "
        "why, and the same command goes on from the last checkpoint"
    )

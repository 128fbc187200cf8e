"""Run as a process of its own by test_self_test: the ranks of every world size are forks of it, so that torch is
imported once.

Argument: a folder. Rank 0 of each world size writes FOLDER/found-SIZE.json, from the name of a layout to how far it is
from one process, or why its self-test failed; what the ranks print goes to FOLDER/log-SIZE.RANK.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sora_train.config.compose import compose
from sora_train.errors import Fault
from sora_train.parallel.checks.self_test import self_test
from sora_train.parallel.engine import resolve_layout
from sora_train.runtime import world as distributed
from sora_train.runtime.control_plane import ControlPlane
from sora_train.tools.doctor.parity.layouts import LAYOUTS, ParityLayout

FURTHER = ParityLayout("ring 4", 4, ("parallel.ring=4",), 4)
"""In a ring of two both neighbours are the same rank."""
CHOSEN = {
    size: [one for one in (*LAYOUTS.values(), FURTHER) if one.world == size and not one.zero]
    for size in (2, 4)
}


def run_rank(rank: int, size: int, folder: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    with (folder / f"log-{size}.{rank}").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    found = {}
    for layout in CHOSEN[size]:
        dtype = "parallel.param_dtype=float64"
        cfg = compose(["experiment=parity_tiny", dtype, *layout.overrides]).config
        world, resolved = resolve_layout(cfg, distributed.start("cpu", 1))
        try:
            found[layout.name] = self_test(cfg, resolved, ControlPlane(world)).largest
        except Fault as error:
            found[layout.name] = str(error)
    if rank == 0:
        (folder / f"found-{size}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    for size in CHOSEN:
        torch.multiprocessing.start_processes(
            run_rank, (size, Path(sys.argv[1])), nprocs=size, start_method="fork"
        )


if __name__ == "__main__":
    main()

"""Promises 1 and 3 for the optimizers: on unevenly sharded weights they are those of one process, through save, kill,
load and reshard from 3 ranks to 2 to 1; a run that goes on from a save is the run that never stopped, bit for bit.

What was broken on purpose, and is seen: tests/mutants/areas/optimizers.yaml.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optimizer_worker
import pytest
import torch
from optimizer_worker import ENDS, OPTIMIZERS, RANKS, Run, apart, world_of

from sora_train import checkpoint as checkpoints
from sora_train.runtime import world as distributed

ELEMENTWISE = ("schedule_free", "int8", "fp8")
"""Of these every layout gives the same bits; Muon's products of matrices may add up in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("optimizers")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", optimizer_worker.__file__, str(made)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (made / "found-2.pt").is_file(), done.stderr[-3000:]
    world = distributed.start("cpu", 1)
    yield made
    distributed.stop(world)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_uneven_shards_are_one_process(folder: Path, optimizer: str) -> None:
    allowed = 0.0 if optimizer in ELEMENTWISE else 1e-11
    straight, trained = Run(optimizer, world_of(0, 1)), {}
    before = straight.whole()
    for ranks, first, end in ((RANKS, 0, ENDS[0]), (2, ENDS[0], ENDS[1])):
        found = torch.load(folder / f"found-{ranks}.pt")[optimizer]
        # What was saved by 3 ranks is what 2 have read.
        assert not apart(found["loaded"], trained or before)
        straight.train(first, end)
        assert max(apart(found["trained"], straight.whole()).values(), default=0.0) <= allowed
        assert not apart(found["resumed"], found["trained"])
        trained = found["trained"]
    # The ranks have killed themselves; this process goes on alone from what they have committed.
    alone = Run(optimizer, world_of(0, 1))
    newest = checkpoints.list_checkpoints(folder / optimizer)[-1]
    checkpoints.load_part(newest, alone.tensors(), "")
    assert not apart(alone.whole(), trained)
    alone.train(*ENDS[1:])
    straight.train(*ENDS[1:])
    assert max(apart(alone.whole(), straight.whole()).values(), default=0.0) <= allowed


def test_the_comparison_sees_a_step_more(folder: Path) -> None:
    """It could not fail if weights and state hardly moved."""
    for optimizer in OPTIMIZERS:
        run = Run(optimizer, world_of(0, 1))
        run.train(0, 2)
        before = run.whole()
        run.train(2, 3)
        moved = apart(run.whole(), before)
        assert len(moved) == len(before) and min(moved.values()) > 1e-4, optimizer

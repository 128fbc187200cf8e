"""Running out of memory is told with what was being computed, in what layout, and what memory held."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentences import refuses

from sora_train.config import Config
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.errors import Fault
from sora_train.runtime.world import World
from sora_train.training.resilience.out_of_memory import (
    Work,
    explained,
    is_out_of_memory,
    memory_now,
)

WORLD = World(3, 8, 3, 8, torch.device("cpu"))


def work() -> Work:
    clips = [Clip(row, 0, None, None, 8.0, "", "") for row in (7, 9)]
    entry = MicroBatch(5, Bucket(17, 32, 48), 0, (7, 8, 9), (0, 0, 0))
    return Work(12, "forward and backward", ClipBatch(entry, clips, [], 2.0), tokens=30)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_counts_as_running_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_real_allocation_that_fails_is_one() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**46)
    assert is_out_of_memory(failed.value)


def test_the_sentence_and_the_file(parity_config: Callable) -> None:
    cfg = parity_config("data.memory_gb=40", "parallel.dp_shard=8")
    place = ("step 12", "rank 3 of 8", "2 clip", "17x32x48", "60 tokens", "dp_shard=8")
    remedy = ("resident", "lower data.memory_gb", "40", "rank-3.json")
    with refuses(Fault, *place, *remedy) as told, explained(work(), cfg, WORLD):
        torch.empty(2**46)
    assert isinstance(told.value.__cause__, RuntimeError), "the allocator's own words are kept"
    report = json.loads((Path(cfg.run.dir) / "oom" / "rank-3.json").read_text())
    assert report["shape"] == {"clips": 2, "frames": 17, "height": 32, "width": 48}
    assert report["rows"] == [7, 8, 9] and report["micro_batch"] == 5 and report["tokens"] == 60
    assert report["layout"]["dp_shard"] == 8 and report["layout"]["data.memory_gb"] == 40
    assert report["memory"]["resident"] > 1e7 and report["memory"]["free in the machine"] > 0


def test_without_a_cap_the_remedy_is_one(parity_config: Callable) -> None:
    with refuses(Fault, "set data.memory_gb"), explained(work(), parity_config(), WORLD):
        raise MemoryError


def test_what_is_not_memory_passes_through(parity_config: Callable) -> None:
    with pytest.raises(RuntimeError, match="shapes") as failed, explained(work(), parity_config(), WORLD):  # fmt: skip
        raise RuntimeError("shapes differ")
    assert not isinstance(failed.value, Fault)


def test_a_folder_that_cannot_be_written_does_not_hide_it(tmp_path: Path) -> None:
    (tmp_path / "oom").write_text("a file where the folder should be")
    cfg = Config.model_validate({"run": {"dir": str(tmp_path)}})
    with (
        refuses(Fault, "out of memory", "oom", "File exists"),
        explained(work(), cfg, WORLD),
    ):
        raise MemoryError


def test_memory_is_counted_in_bytes() -> None:
    before = memory_now(torch.device("cpu"))["resident"]
    held = torch.ones(2**25)
    assert 0.9 < (memory_now(torch.device("cpu"))["resident"] - before) / held.nbytes < 1.2

"""Locked host memory: exact sizes, given back and used again, unlocked with its owner. The driver is recorded."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.device import page_locked
from sora_train.device.page_locked import LockedPool, locked
from sora_train.errors import Fault

MIB = 1 << 20


class Driver:
    """What the driver is told."""

    def __init__(self, code: int = 0):
        self.code = code
        self.held: dict[int, int] = {}
        self.locks = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address not in self.held
        self.held[address] = size
        self.locks += 1
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.held[address]
        return 0


class Holder:
    pass


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


def test_exactly_what_was_asked_for_is_locked_as_long_as_its_owner_lives(driver: Driver) -> None:
    owner = Holder()
    tensor = locked(owner, (3, MIB), torch.float32)
    # Rounded up to a power of two it would be 16 MiB.
    assert driver.held == {tensor.data_ptr(): 12 * MIB}
    assert not tensor.any()
    del owner
    gc.collect()
    assert driver.held == {}


def test_a_machine_that_does_not_lock_so_much_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(code=2))
    with refuses(Fault, "0.00293 GiB", "CUDA error 2", "ulimit -l"):
        locked(Holder(), (3, MIB), torch.uint8)


def test_a_step_that_is_repeated_locks_nothing_anew(driver: Driver) -> None:
    pool, sizes = LockedPool(), [5 * MIB, 3 * MIB, 5 * MIB, 2 * MIB]
    for _ in range(3):
        holders = [Holder() for _ in sizes]
        taken = [pool.take(size, h) for size, h in zip(sizes, holders, strict=True)]
        assert [buffer.numel() for buffer in taken] == sizes
        assert len({buffer.data_ptr() for buffer in taken}) == len(sizes)
        del holders
        gc.collect()
    assert driver.locks == len(sizes) and pool.used == 0
    assert pool.total == pool.most_used == sum(sizes) == sum(driver.held.values())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=8))
def test_the_pool_stays_near_its_height_and_no_two_hold_one_buffer(steps: list) -> None:
    driver = Driver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "cudart", lambda: driver)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(page_locked, "SMALLEST", 1)
        pool = LockedPool()
        for sizes in steps:
            holders = [Holder() for _ in sizes]
            taken = [pool.take(n * 4096, h) for n, h in zip(sizes, holders, strict=True)]
            assert len({buffer.data_ptr() for buffer in taken}) == len(sizes)
            assert [buffer.numel() for buffer in taken] == [n * 4096 for n in sizes]
            assert pool.total == sum(driver.held.values())
            assert pool.total <= LockedPool.SLACK * pool.most_used + 9 * 4096
            del holders
        del pool
        gc.collect()
        assert driver.held == {}

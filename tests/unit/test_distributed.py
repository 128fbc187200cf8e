"""Ranks meet, or those that are missing are named in time."""

import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from sentences import refuses

from sora_train.errors import Fault
from sora_train.runtime import world as distributed


def a_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(autouse=True)
def alone() -> None:
    """A group that an earlier test of this process left behind would be joined, and nobody waited for."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_told_of(monkeypatch: pytest.MonkeyPatch, rank: int):
    port = a_port()
    here = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in here.items():
        monkeypatch.setenv(name, str(value))
    began = time.monotonic()
    with pytest.raises(Fault, match=rf"2 ranks .* 127.0.0.1:{port} within .*meeting_seconds=1\b"):
        distributed.start("cpu", 1, meeting=timedelta(seconds=1))
    assert time.monotonic() - began < 30 and not dist.is_initialized()


def test_those_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch):
    """With a store that is there whoever comes, as torchrun's is."""
    port = a_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    here = {
        "RANK": 2, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    for name, value in here.items():
        monkeypatch.setenv(name, str(value))
    store.set("arrived/0", "")
    with pytest.raises(Fault, match=r"missing: rank\(s\) 1, 3 \("):
        distributed.start("cpu", 1, meeting=timedelta(seconds=1))
    for rank in (1, 3):
        store.set(f"arrived/{rank}", "")
    with refuses(Fault, "arrived", "failed"):
        distributed.start("cpu", 1, meeting=timedelta(seconds=1))

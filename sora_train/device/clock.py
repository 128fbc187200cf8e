"""Seconds that a device spends on a part of the work, without waiting for it: between two events in its queue."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class DeviceClock:
    """Sums up the parts that run inside `with clock.running():`; parts do not nest."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._parts: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        began = self._mark()
        yield
        self._parts.append((began, self._mark()))

    def take(self) -> float:
        """Seconds since it was asked last; on a GPU all of them must have been waited for by other means."""
        parts, self._parts = self._parts, []
        if self._on_gpu:
            return sum(began.elapsed_time(ended) for began, ended in parts) / 1000
        return sum(ended - began for began, ended in parts)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

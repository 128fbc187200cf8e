"""Counts the bytes of tensors that are alive, by what they are for, and keeps the highest moments.

Works on real tensors and on fake ones, which have sizes and no memory: what is planned and what is
measured are counted alike. A storage counts from the operator that made it to its end; storages that
are emptied in place and filled again, as engines do with gathered weights, count as they are.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sora_train.parallel.shards import local

Resize = Callable[[torch.UntypedStorage, int], torch.UntypedStorage]
APART = ("host",)
"""Kinds that are alive and not in the device's memory."""


class Held(TorchDispatchMode):
    """Bytes by kind, now and at the height of each moment.

    Attributes:
        kind: what storages that are made from now on are for.
        moment: the part of a step that the peak is kept of; "" keeps none.
        peaks: moment -> kind -> bytes, at its highest sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.moment = "buffers", ""
        self.now: dict[str, int] = {}
        self.total = 0
        self.peaks: dict[str, dict[str, int]] = {}
        self._highest: dict[str, int] = {}
        self._alive: dict[int, list[Any]] = {}
        self._resize: Resize | None = None

    def __enter__(self) -> "Held":
        held, before = self, torch.UntypedStorage.resize_
        self._resize = before

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resized = before(storage, size)
            entry = held._alive.get(storage._cdata)
            if entry is not None:
                held._add(entry[1], size - entry[0])
                entry[0] = size
            return resized

        torch.UntypedStorage.resize_ = resize
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and is_fake(args[0]):
            # A number that nobody has computed: any that lets the step be taken.
            return False if args[0].dtype == torch.bool else 1.0
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.device.type != "meta":
                self.count(made)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count a tensor that was made elsewhere, unless it is counted."""
        storage = local(tensor).untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        entry: list[Any] = [storage.nbytes(), self.kind, None]

        def gone(_: object) -> None:
            if self._alive.get(address) is entry:
                del self._alive[address]
                self._add(entry[1], -entry[0])

        entry[2] = weakref.ref(storage, gone)
        self._alive[address] = entry
        self._add(self.kind, entry[0])

    def mark(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Say what the storages of these tensors are for."""
        for tensor in tensors:
            if tensor is None:
                continue
            self.count(tensor)
            entry = self._alive[local(tensor).untyped_storage()._cdata]
            if entry[1] != kind:
                size, entry_kind = entry[0], entry[1]
                entry[1] = kind
                self.now[entry_kind] -= size
                self.now[kind] = self.now.get(kind, 0) + size
                self.total += size * ((kind not in APART) - (entry_kind not in APART))

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def during(self, moment: str) -> None:
        """The peak of `moment` is kept from now on."""
        self.moment = moment
        self._keep()

    def _add(self, kind: str, size: int) -> None:
        self.now[kind] = self.now.get(kind, 0) + size
        if kind not in APART:
            self.total += size
            if size > 0:
                self._keep()

    def _keep(self) -> None:
        if self.moment and self.total > self._highest.get(self.moment, -1):
            self._highest[self.moment] = self.total
            self.peaks[self.moment] = {k: v for k, v in self.now.items() if k not in APART}

    def forget(self) -> None:
        """Forget the peaks so far."""
        self.peaks, self._highest = {}, {}


def is_fake(tensor: Tensor) -> bool:
    return type(local(tensor)).__name__ == "FakeTensor"

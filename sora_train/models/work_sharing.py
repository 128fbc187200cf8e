"""Work on frozen networks that may be shared: whoever does a part of it, everybody has the results."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

Item = TypeVar("Item")


class WorkSharing(Protocol):
    """`work` on every item, in their order; all who share it call with the same items."""

    parts: int
    """Among how many the items are dealt out."""

    def __call__(self, items: Sequence[Item], work: Callable[[Item], Tensor]) -> list[Tensor]: ...


class NoSharing:
    """Does everything itself."""

    parts = 1

    def __call__(self, items: Sequence[Item], work: Callable[[Item], Tensor]) -> list[Tensor]:
        return [work(item) for item in items]


NO_SHARING = NoSharing()

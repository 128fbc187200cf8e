"""Journals of the calls of a model and its blocks, for ranks to compare: hooks from outside that go off
before the engine's own, so a difference is told before the collective that would wait for ever.

They are placed where `parallel.debug_every` asks for it alone, and rest outside the steps of training.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from sora_train.parallel.checks.agreement import Agreement, digest_of
from sora_train.parallel.parallelize import sharding_units


class BlockCalls:
    """Notes every forward and backward of the model and of its blocks.

    While `live`, ranks compare journals at each of them, what the model is given included.
    """

    def __init__(self, model: nn.Module, agreement: Agreement):
        self.agreement = agreement
        self.watching = self.live = False
        self.where = self.about = ""
        """Which micro-batch of which step, and its clips."""
        names = {module: name for name, module in model.named_modules()}
        for block in sharding_units(model):
            name = names[block]
            # First of all hooks: the engine's own, placed before, begin to gather weights.
            block.register_forward_pre_hook(partial(self._block, name), prepend=True)
            block.register_forward_hook(partial(self._done, name), prepend=True)
        model.register_forward_pre_hook(self._model, prepend=True, with_kwargs=True)
        model.register_forward_hook(partial(self._done, "the model"), prepend=True)

    def at(self, what: str) -> None:
        """This rank goes on with `what`. A collective while `live`; raises Fault where others do not."""
        if not self.watching:
            return
        self.agreement.note("calls", self.where, what, self.about)
        if self.live:
            self.agreement.require()

    def _model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.watching and self.live and self.agreement.compares("batch"):
            given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
            for name, value in leaves("", given):
                shape = f"{tuple(value.shape)} " if isinstance(value, Tensor) else ""
                what = f"{shape}{digest_of(value)} for {name}"
                self.agreement.note("batch", f"the forward of {self.where}", what, self.about)
        self.at("the model")

    def _block(self, name: str, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.at(name)

    def _done(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward is over; its backward begins when a gradient arrives at what it returned."""
        if not self.watching:
            return
        for _, value in leaves("", {"output": output}):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self.at(f"{name} backward"))
                return


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and plain values within nested containers, by name; functions and the like are left out."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for number, part in enumerate(value):
            yield from leaves(f"{name}.{number}", part)
    elif isinstance(value, Tensor | str | bytes | int | float | None):
        yield name, value

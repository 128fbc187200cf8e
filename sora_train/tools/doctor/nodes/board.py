"""A board on which ranks post values for each other: keys in the job's store, every wait with a deadline.

Whoever does not answer is missing from what is read; nobody waits for all.
"""

import json
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from sora_train.errors import Fault
from sora_train.tools.doctor.nodes.deadline import LateError, within

ASKED = 5.0
"""Seconds that the store may take to answer."""


class Board:
    """Connects to the store, for at most `seconds`.

    Raises:
        Fault: it does not answer.
    """

    def __init__(self, seconds: float):
        import torch.distributed as dist

        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        patience = timedelta(seconds=seconds)
        # Under torchrun the store is its own. It must not wait for all ranks: whoever is missing is to be named.
        here = (
            os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        )
        try:
            store = within(
                seconds + ASKED,
                lambda: dist.TCPStore(
                    address, int(port), is_master=here, timeout=patience, wait_for_workers=False
                ),
            )
        except (LateError, dist.DistError, ValueError) as error:
            raise Fault(
                f"the store at {address}:{port} does not answer within {seconds:g} s "
                f"({' '.join(str(error).split())[:120]}): is rank 0 there, does MASTER_ADDR name its node (no loopback "
                "address), is the port open?"
            ) from error
        self._store = dist.PrefixStore(f"doctor/board/{attempt()}", store)
        self._error = dist.DistError

    def post(self, key: str, value: object) -> None:
        """Set a key. Raises Fault where the store does not accept it."""
        try:
            within(ASKED, lambda: self._store.set(key, json.dumps(value)))
        except (LateError, self._error) as error:
            raise Fault(
                "the store of this job does not answer any more: rank 0's node is lost"
            ) from error

    def read(self, keys: Iterable[str], seconds: float) -> dict[str, Any]:
        """The values of those keys that are there in time."""
        requested, patience = list(keys), max(0.1, seconds)
        if not requested:
            return {}
        try:
            within(patience + 1, lambda: self._store.wait(requested, timedelta(seconds=patience)))
            there = requested
        except self._error:
            there = self._present(requested)
        except LateError:
            return {}
        try:
            values = within(ASKED, lambda: self._store.multi_get(there)) if there else []
        except (LateError, self._error):
            return {}
        return {key: json.loads(value) for key, value in zip(there, values, strict=True)}

    def _present(self, keys: list[str]) -> list[str]:
        try:
            return within(ASKED, lambda: [key for key in keys if self._store.check([key])])
        except (LateError, self._error):
            return []


def attempt() -> str:
    """The number of this start of the ranks: torchrun may start them again beside the same store."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

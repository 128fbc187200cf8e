"""What ranks have to do alike, compared while they do it (`parallel.debug_every`): a rank that goes astray
is named with its block and its clips before the others wait for it in a collective for ever.

Each rank keeps a journal a topic; in an exchange over gloo, which waits for no kernel, digests of the
journals meet. Where they differ, one rank of each party sends its journal, and all ranks raise the same
sentence about the first entry that is not the same.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.errors import Fault
from sora_train.runtime.world import World

Entry = tuple[str, str, str]
"""Where, what, and about which clips; ranks have to agree on the first two."""
Party = tuple[list[int], list[Entry]]
"""Ranks with the same journal, and that journal."""

PATIENCE_SECONDS = 4.0
"""How long a rank waits for the others before it says for whom."""
MOST_PARTIES = 8
MOST_RANKS = 8


@dataclass(frozen=True)
class Topic:
    """Something that ranks agree on: all of them, those that share a clip's tokens (`peers`), or the `replicas` of
    the same piece of the weights."""

    circle: str
    opening: str
    remedy: str


TOPICS = {
    "held": Topic(
        "all",
        "weights that every rank holds whole are not the same",
        "give all nodes the same files (vae.path, text.path) and the same packages",
    ),
    "weights": Topic(
        "replicas",
        "replicas of the weights are not the same",
        "something changes them outside the engine, or a device computes wrongly: go on from the last checkpoint, and "
        "without that node if it happens again",
    ),
    "batch": Topic(
        "peers",
        "ranks that share a clip's tokens are not given the same",
        "clips and draws have to follow from config, seed and step alone: look at what build_data or the objective "
        "does with the rank",
    ),
    "calls": Topic(
        "all",
        "ranks do not call the same blocks",
        "every rank has to run the same blocks in the same order whatever its clips are: look at what the model's "
        "forward or the objective makes depend on them",
    ),
}
"""In the order in which one explains the other."""


class Journal:
    """Entries in order, and a digest of them."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.entries: list[Entry] = []
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, where: str, what: str, about: str = "") -> None:
        self.entries.append((where, what, about))
        self._hash.update(f"{where}\x1f{what}\x1e".encode())

    @property
    def digest(self) -> int:
        return int.from_bytes(self._hash.digest(), "big", signed=True)


def circles(kind: str, size: int, cp: int, shards: int) -> list[list[int]]:
    """The ranks that have to agree with each other. `shards`: ranks over which one replica's weights are split."""
    if kind == "peers":
        return [list(range(first, first + cp)) for first in range(0, size, cp)]
    if kind == "replicas":
        return [list(range(first, size, shards)) for first in range(shards)]
    return [list(range(size))]


def parted(digests: Sequence[int], ranks: Sequence[int]) -> list[list[int]]:
    """These ranks by what they hold, the larger parties first; one party where they agree."""
    parties: dict[int, list[int]] = {}
    for rank in ranks:
        parties.setdefault(digests[rank], []).append(rank)
    return sorted(parties.values(), key=lambda party: (-len(party), party))


def first_difference(parties: Sequence[Party]) -> int:
    """The first place at which journals are not the same; one that ends there differs from one that goes on."""
    journals = [[entry[:2] for entry in entries] for _, entries in parties]
    shortest = min(map(len, journals))
    for place in range(shortest):
        if any(journal[place] != journals[0][place] for journal in journals):
            return place
    return shortest


def sentence(topic: Topic, parties: Sequence[Party], place_of: Callable[[int], str]) -> str:
    """What differs first, by whom and at which clips."""
    place = first_difference(parties)
    differences: dict[tuple[str, str], tuple[list[int], str]] = {}
    for ranks, entries in parties:
        where, what, about = entries[place] if place < len(entries) else ("", "nothing more", "")
        known, _ = differences.setdefault((where, what), ([], about))
        known += ranks
    longest = max((entries for _, entries in parties), key=len)
    last = f" after {longest[place - 1][1]}" if topic is TOPICS["calls"] and place else ""
    sentences = []
    for (where, what), (ranks, about) in differences.items():
        at = f" in {where}" if where else ""
        sentences.append(
            f"{named(sorted(ranks), place_of)}: {what}{at}{f' [{about}]' if about else ''}"
        )
    return f"{topic.opening}{last}: {'; '.join(sentences)}. {topic.remedy[0].upper()}{topic.remedy[1:]}"


def named(ranks: Sequence[int], place_of: Callable[[int], str]) -> str:
    """`rank 3 (dp_shard 1, ulysses 1)`; of many, the first few."""
    if len(ranks) == 1:
        place = place_of(ranks[0])
        return f"rank {ranks[0]}" + (f" ({place})" if place else "")
    more = f" and {len(ranks) - MOST_RANKS} others" if len(ranks) > MOST_RANKS else ""
    return f"ranks {', '.join(map(str, ranks[:MOST_RANKS]))}{more}"


def digest_of(value: Any) -> str:
    """16 hex digits for the bits of a tensor or an array, its shape and type, or for what a plain value reads as."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        value = value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
    else:
        value = np.frombuffer(repr(value).encode(), np.uint8)
    digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


class Agreement:
    """This rank's journals, and the exchange in which they meet those of the others.

    Args:
        shards: ranks over which one replica's weights are split, those next to each other.
        timeout: after which an exchange that nobody else has ended breaks off.
        place_of: a rank's place in the mesh, in words.
    """

    def __init__(
        self, world: World, shards: int, timeout: timedelta, place_of: Callable[[int], str]
    ):
        self.world, self.place_of = world, place_of
        self.journals = {name: Journal() for name in TOPICS}
        self.circles = {
            name: circles(topic.circle, world.size, world.cp, shards)
            for name, topic in TOPICS.items()
        }
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        # Where a rank stands is read only by one that has waited in vain, so it costs no collective.
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("agreement", store)
        self._exchanges = 0

    def compares(self, topic: str) -> bool:
        """Whether more than one rank has to agree on it."""
        return any(len(circle) > 1 for circle in self.circles[topic])

    def note(self, topic: str, where: str, what: str, about: str = "") -> None:
        if self.compares(topic):
            self.journals[topic].add(where, what, about)

    def require(self) -> None:
        """Compare all journals. A collective.

        Raises:
            Fault: they differ; on every rank, with the same sentence.
        """
        mine = torch.tensor([journal.digest for journal in self.journals.values()])
        gathered = [torch.empty_like(mine) for _ in range(self.world.size)]
        with self._absent_are_told():
            dist.all_gather(gathered, mine, group=self._group)
        ranks = [values.tolist() for values in gathered]
        for number, name in enumerate(self.journals):
            for circle in self.circles[name]:
                parties = parted([values[number] for values in ranks], circle)
                if len(parties) > 1:
                    raise Fault(self._told(name, parties[:MOST_PARTIES]))

    def settle(self) -> None:
        """`require`, and what was agreed on is forgotten."""
        self.require()
        for journal in self.journals.values():
            journal.clear()

    def _told(self, topic: str, parties: list[list[int]]) -> str:
        is_first = any(self.world.rank == party[0] for party in parties)
        mine = self.journals[topic].entries if is_first else None
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, mine, group=self._group)
        journals = [(party, gathered[party[0]]) for party in parties]
        return sentence(TOPICS[topic], journals, self.place_of)

    # -- who does not come ----------------------------------------------------------------------

    @contextmanager
    def _absent_are_told(self) -> Iterator[None]:
        self._exchanges += 1
        entries = self.journals["calls"].entries
        where, what, about = entries[-1] if entries else ("", "the start", "")
        at = f"{what} in {where}" if where else what
        state = json.dumps([self._exchanges, at, about])
        self._store.set(str(self.world.rank), state)
        timer = threading.Timer(PATIENCE_SECONDS, self._tell_absent)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _tell_absent(self) -> None:
        """Say who is waited for, and where that rank was last; one of those that wait does."""
        states = [self._state_of(rank) for rank in range(self.world.size)]
        absent = [rank for rank, (number, _, _) in enumerate(states) if number < self._exchanges]
        waiting = [rank for rank in range(self.world.size) if rank not in absent]
        if not absent or waiting[0] != self.world.rank:
            return
        _, last, about = states[absent[0]]
        clips = f" [{about}]" if about else ""
        print(
            f"rank {self.world.rank} has waited {PATIENCE_SECONDS:g} s at {states[self.world.rank][1]} for "
            f"{named(absent, self.place_of)}, which was last at {last}{clips}",
            file=sys.stderr,
            flush=True,
        )

    def _state_of(self, rank: int) -> tuple[int, str, str]:
        if not self._store.check([str(rank)]):
            return 0, "no exchange yet", ""
        number, at, about = json.loads(self._store.get(str(rank)))
        return number, at, about

"""Which packets of a clip have to be decoded to show its frames at some times; the others are read and left.

The frame shown at a time is the last that begins by then. Decoding begins at the last keyframe by then,
so that frames spread over a clip do not cost those between. Of the packets from there on, those whose own
frame is not asked for may be left out by the decoder where no other frame refers to them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

# Packets looked at beyond the first that says that no later one can be shown in time.
_SPARE = 4


class Packet(Protocol):
    """What is asked of libav's packets; `pts` and `dts` are ticks, None where unknown."""

    @property
    def pts(self) -> int | None: ...
    @property
    def dts(self) -> int | None: ...
    @property
    def size(self) -> int: ...
    @property
    def is_keyframe(self) -> bool: ...
    @property
    def is_discard(self) -> bool: ...


class Unordered(Exception):
    """The packets do not say in which order they are shown."""


@dataclass(frozen=True)
class Step:
    """A packet to decode. Before one that `jumps` the decoder starts afresh; one that is `droppable` is not shown."""

    packet: Packet
    jumps: bool
    droppable: bool


class PacketChoice:
    """The steps to the frames shown at `limits`, rising times of `clock(ticks)`, from packets in decoding order.

    `shown` are the ticks of these frames, as far as the steps have come.
    """

    def __init__(
        self, packets: Iterator[Packet], limits: Sequence[float], clock: Callable[[int], float]
    ):
        self.shown: list[int] = []
        self._ended = False
        self._packets, self._limits, self._clock = packets, limits, clock
        self._waiting: deque[Packet] = deque()
        # Those read that are shown after the limit so far.
        self._later: list[Packet] = []

    @property
    def holds_more(self) -> bool:
        """Whether a frame begins after the last limit, so that the one before it lasts until then."""
        return any(not packet.is_discard for packet in self._later)

    def steps(self) -> Iterator[Step]:
        """Raises Unordered where a packet has no times, or they contradict what was chosen before."""
        best: Packet | None = None
        begun = False
        for limit in self._limits:
            best = self._best(best, limit)
            self.shown.append(_known(best.pts))
            if best not in self._waiting:
                continue
            place = self._waiting.index(best)
            begin = self._last_keyframe(place, limit)
            for number in range(place + 1):
                packet = self._waiting.popleft()
                if number >= begin:
                    is_over = packet is not best and self._time(packet) <= limit
                    yield Step(packet, begun and number == begin > 0, is_over)
                    begun = True

    def _best(self, before: Packet | None, limit: float) -> Packet:
        """The packet shown at a limit, `before` that of the last one."""
        self._read_beyond(limit)
        best = before
        for packet in self._later:
            is_shown = not packet.is_discard and self._time(packet) <= limit
            if is_shown and (best is None or self._time(packet) > self._time(best)):
                best = packet
        self._later = [packet for packet in self._later if self._time(packet) > limit]
        if best is None:
            raise Unordered("no frame begins in time")
        return best

    def _read_beyond(self, limit: float) -> None:
        """Read until no later packet can be shown by the limit."""
        while not self._ended and not self._is_beyond(limit):
            packet = next(self._packets, None)
            # An empty one asks the decoder for what it still holds, at the end.
            if packet is None or not packet.size:
                self._ended = True
                return
            if len(self.shown) and self._time(packet) <= self._limits[len(self.shown) - 1]:
                raise Unordered("a packet comes later than its time of decoding allows")
            self._waiting.append(packet)
            self._later.append(packet)

    def _is_beyond(self, limit: float) -> bool:
        """Whether the last packets are all decoded after the limit; none is shown before it is decoded."""
        if len(self._waiting) < _SPARE:
            return False
        last = [self._waiting[-place] for place in range(1, _SPARE + 1)]
        return all(one.dts is not None and self._clock(one.dts) > limit for one in last)

    def _last_keyframe(self, place: int, limit: float) -> int:
        """The place of the last waiting keyframe that is decoded up to `place` and shown by the limit; 0 for none."""
        for number in range(place, 0, -1):
            packet = self._waiting[number]
            if packet.is_keyframe and self._time(packet) <= limit:
                return number
        return 0

    def _time(self, packet: Packet) -> float:
        return self._clock(_known(packet.pts))


def _known(ticks: int | None) -> int:
    if ticks is None:
        raise Unordered("a packet has no time")
    return ticks

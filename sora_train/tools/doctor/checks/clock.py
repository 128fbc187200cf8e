"""How far two clocks are apart, from messages that go there and back.

Cristian, "Probabilistic clock synchronization" (1989), with both of the other's times as in NTP (RFC 5905,
section 8): offset = ((t1 - t0) + (t2 - t3)) / 2, whose error is at most half the time on the way.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sora_train.tools.doctor.findings import WARN, Finding, judged

WRONG_BY = 1.0


@dataclass(frozen=True)
class Exchange:
    """Seconds: sent and answered by our clock, received and sent back by the other's."""

    sent: float
    received: float
    returned: float
    answered: float

    @property
    def offset(self) -> float:
        """The other's clock minus ours."""
        return ((self.received - self.sent) + (self.returned - self.answered)) / 2

    @property
    def on_the_way(self) -> float:
        return (self.answered - self.sent) - (self.returned - self.received)


@dataclass(frozen=True)
class Offset:
    """The other's clock minus ours, and how far that may be off."""

    seconds: float
    error: float


def estimate(exchanges: Iterable[Exchange]) -> Offset:
    """The offset of the exchange that took the shortest time. Raises ValueError where there is none."""
    best = min(exchanges, key=lambda exchange: exchange.on_the_way)
    return Offset(best.offset, max(best.on_the_way, 0.0) / 2)


def judge(offset: Offset) -> Finding:
    """Warns where the offset is larger than its error explains."""
    value = f"{offset.seconds * 1e3:+,.1f} ms from node 0 (within {offset.error * 1e3:,.1f} ms)"
    remedy = (
        "chronyc tracking or timedatectl: start time synchronisation on this node; time limits, file times and "
        "signed requests to object stores go wrong"
    )
    return judged("clock", value, (abs(offset.seconds) - offset.error > WRONG_BY, WARN, remedy))

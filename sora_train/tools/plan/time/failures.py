"""How often to save, and what failures cost: Young (1974), Daly (2006) and the expected share of useful time.

A run that fails at rate 1 / M saves every T seconds of work, a save holds it up for C, and it is back after R. With
exponential failures the expected wall-clock time of a segment of T + C is (Daly 2006, eq. 20)

    E(T) = M e^(R / M) (e^((T + C) / M) - 1)

and T / E(T) is the goodput. Its best T solves (1 - T / M) e^((T + C) / M) = 1. Young's first order is sqrt(2 C M),
Daly's higher order is sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + C / 18 M) - C for C < 2 M, else M.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Seconds throughout."""

    mtbf: float
    stall: float
    """What a save holds up the training for."""
    write: float
    """What a save takes until it is on storage; a later one cannot begin before."""
    restart: float
    interval: float
    """The one to choose: Daly's, and never shorter than a save takes to be written."""
    young: float
    daly: float
    goodput: float
    sync_interval: float
    """Daly's where the training waits until a save is written (checkpoint.mode=sync)."""
    sync_goodput: float


def young(cost: float, mtbf: float) -> float:
    """Seconds of work between saves, first order (Young 1974)."""
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Seconds of work between saves, higher order (Daly 2006, eq. 37)."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return young(cost, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def goodput(interval: float, cost: float, mtbf: float, restart: float, late: float = 0.0) -> float:
    """Expected share of time that is work that counts. `late` seconds of work more are lost in a failure, where a
    save counts only once it is written behind the training."""
    segment = (interval + cost) / mtbf
    if segment > 500 or interval <= 0:
        return 0.0
    expected = mtbf * math.exp((restart + late) / mtbf) * math.expm1(segment)
    return interval / expected


def schedule(mtbf: float, stall: float, write: float, restart: float) -> Schedule:
    """Choose the interval for saves that stall the training `stall` seconds and are written in `write`."""
    interval = max(daly(stall, mtbf), write)
    both = daly(write, mtbf)
    return Schedule(
        mtbf,
        stall,
        write,
        restart,
        interval,
        young(stall, mtbf),
        daly(stall, mtbf),
        goodput(interval, stall, mtbf, restart, late=write),
        both,
        goodput(both, write, mtbf, restart),
    )

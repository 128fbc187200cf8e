"""Which kernels multiply bfloat16 on this CPU: found by measuring, said from outside the model, the same for all of it.

A CPU may multiply bfloat16 in units of its own, in vectors, or only imitate it, and what its flags say need not be
what libraries do: `ONEDNN_MAX_CPU_ISA` and its like take units away. So each candidate computes forward and backward
on the shapes at hand. The result decides the last digits of a run, so it is taken once, before the first step
(`sora_train/training/kernels.py`), and kept in a file of the user's cache under everything that it
depends on. Other dtypes have no choice: in float32 PyTorch's kernels were the fastest wherever they were measured.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sora_train.base.code_version import cpu_model
from sora_train.base.files import write_atomically
from sora_train.errors import Fault

ISA_LIMITS = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Environment variables that take instructions away from libraries."""
MOST_TOKENS, MOST_HEADS, MOST_CLIPS = 4096, 2, 8
"""Limits of what is measured. Tiles of attention win from 2,048 tokens on, so a trial has to be as long; fewer heads
than the model's say as much."""
ROUNDS, LEAST_ROUNDS, LONGEST = 7, 2, 1.5
"""Turns of each candidate, and how many there are at least when they take more than so many seconds together."""
WORTH = 0.95
"""What takes the place of an earlier candidate needs less than this share of its time: noise changes no kernel."""


@dataclass(frozen=True)
class Kernels:
    """What computes where values are bfloat16 on a CPU. The defaults are PyTorch's own."""

    attention: str = "sdpa"
    """What `model.attention=auto` stands for: `sdpa` or `gemm`."""
    attention_in_float32: bool = False
    linear_in_float32: bool = False
    """Whether linear layers widen what they multiply; results are narrow again."""

    def __str__(self) -> str:
        attention = f"{self.attention} in {'float32' if self.attention_in_float32 else 'bfloat16'}"
        return f"attention {attention}, products in {'float32' if self.linear_in_float32 else 'bfloat16'}"


DEFAULT = Kernels()
ATTENTION = (DEFAULT, Kernels("gemm"), Kernels(attention_in_float32=True))
LINEAR = (DEFAULT, Kernels(linear_in_float32=True))
"""Candidates, each in the order of preference."""


@dataclass(frozen=True)
class ShapeClass:
    """Sizes that a choice is made for. Tokens and clips are powers of 2, so that it does not hang on a few of them."""

    clips: int
    tokens: int
    num_heads: int
    head_dim: int
    ffn_dim: int

    @classmethod
    def of(
        cls, clips: float, tokens: float, num_heads: int, head_dim: int, ffn_dim: int
    ) -> "ShapeClass":
        """The class of micro-batches of so many clips of so many tokens each, cut to what is measured."""
        return cls(
            clips=min(_power(clips), MOST_CLIPS),
            tokens=min(_power(tokens), MOST_TOKENS),
            num_heads=min(num_heads, MOST_HEADS),
            head_dim=head_dim,
            ffn_dim=ffn_dim,
        )


def _power(x: float) -> int:
    return 1 << max(0, round(x) - 1).bit_length()


_chosen = [DEFAULT]


def in_use() -> Kernels:
    """What this process computes with. A graph that is compiled reads it as a constant."""
    return _chosen[0]


def use(kernels: Kernels) -> None:
    """Compute with these from now on."""
    _chosen[0] = kernels


@contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    before = in_use()
    use(kernels)
    try:
        yield
    finally:
        use(before)


def circumstances() -> dict[str, Any]:
    """The machine and the libraries that a choice holds for."""
    limits = {name: os.environ[name] for name in ISA_LIMITS if name in os.environ}
    return {
        "cpu": cpu_model(),
        "limits": limits,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def choose(
    shape: ShapeClass, step_of: Callable[[str, ShapeClass], Callable[[], object]]
) -> Kernels:
    """The fastest kernels for bfloat16 in this shape, from the user's cache or measured now.

    Args:
        step_of: given "attention" or "linear", forward and backward of it in that shape, with the kernels in use.
    """
    key = {**circumstances(), "shape": asdict(shape), "dtype": "bfloat16"}
    path = (
        cache_folder()
        / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    )
    with suppress(OSError, ValueError, TypeError, KeyError):
        return Kernels(**json.loads(path.read_text())["kernels"])
    attention, slow = fastest(ATTENTION, step_of("attention", shape), clock())
    linear, slower = fastest(LINEAR, step_of("linear", shape), clock())
    chosen = replace(attention, linear_in_float32=linear.linear_in_float32)
    found = {
        "kernels": asdict(chosen),
        "key": key,
        "milliseconds": {"attention": slow, "linear": slower},
    }
    # A cache that cannot be written costs the next run a trial and nothing else.
    with suppress(OSError, Fault):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found, indent=1))
    return chosen


def cache_folder() -> Path:
    """`kernels` in the user's cache of this package."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sora_train" / "kernels"


def clock() -> Callable[[], float]:
    """Seconds as they pass; of a single thread those that it computed, to which other programs add little."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def fastest(
    candidates: tuple[Kernels, ...],
    step: Callable[[], object],
    clock: Callable[[], float],
) -> tuple[Kernels, dict[str, float]]:
    """The first candidate that no other beats by more than `WORTH`, and each one's milliseconds.

    They take turns, and the least of ROUNDS counts, after one that does not: what else runs on the machine can
    only add to it.
    """
    least = dict.fromkeys(candidates, float("inf"))
    start = clock()
    for turn in range(ROUNDS + 1):
        if turn > LEAST_ROUNDS and clock() - start > LONGEST:
            break
        for kernels in candidates:
            with using(kernels):
                began = clock()
                step()
                if turn:
                    least[kernels] = min(least[kernels], clock() - began)
    best = candidates[0]
    for kernels in candidates[1:]:
        if least[kernels] < WORTH * least[best]:
            best = kernels
    return best, {str(kernels): round(1e3 * seconds, 3) for kernels, seconds in least.items()}

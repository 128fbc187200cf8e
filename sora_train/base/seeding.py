"""Random draws are keyed, never taken from a process's generator: key -> seed, the same everywhere.

A draw belongs to (seed, stream name, the sample's own epoch, sample id), so it is the same on every
rank, worker, device and layout, and resuming needs no generator state.
"""

import hashlib


def key_seed(seed: int, stream: str, *parts: int | str) -> int:
    """A stable 63-bit seed for the draw named by its arguments (BLAKE2b, so it never changes)."""
    text = "\x1f".join([str(seed), stream, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

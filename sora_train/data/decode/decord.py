"""Decoding by decord behind the same function as PyAV's; imported only where it is asked for."""

from __future__ import annotations

import numpy as np

from sora_train.data.decode.frames import (
    TIME_TOLERANCE,
    BadClip,
    ByteRange,
    DecodeRequest,
    batches_of_frames,
    blaming_the_clip,
    fit_frame,
    too_few_frames,
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
    """As `sora_train.data.decode.frames.decode_frames`; images are not decord's business."""
    file = ByteRange(request.path, request.offset, request.length, request.data)
    with file, blaming_the_clip(file):
        return _decode(file, request)


def _decode(file: ByteRange, request: DecodeRequest) -> np.ndarray:
    import decord

    reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
    shown_from, shown_to = reader.get_frame_timestamp(range(len(reader))).T.astype(float)
    # It counts frames that an edit list hides where it seeks, and leaves them out where it does not.
    if shown_from.min() < -TIME_TOLERANCE:
        raise BadClip(
            "unreadable",
            "decord miscounts a clip whose edit list hides its first frames; use data.decoder=pyav",
        )
    starts, ends = shown_from - shown_from.min(), float(shown_to.max() - shown_from.min())
    if request.times[-1] >= ends + TIME_TOLERANCE:
        raise too_few_frames(ends, request)
    order = np.argsort(starts, kind="stable")
    shown = (
        np.searchsorted(starts[order], np.asarray(request.times) + TIME_TOLERANCE, side="right") - 1
    )
    indices = order[np.clip(shown, 0, None)]
    clip = np.empty((len(indices), request.height, request.width, 3), np.uint8)
    for batch in batches_of_frames(request):
        frames = reader.get_batch(indices[batch].tolist()).asnumpy()
        if frames.shape[1:3] != request.shown:
            raise BadClip(
                "unreadable",
                f"decord sees frames of {frames.shape[1:3]}, the index {request.shown}; "
                "use data.decoder=pyav",
            )
        for place, frame in zip(range(batch.start, batch.stop), frames, strict=True):
            clip[place] = fit_frame(frame, request)
    return clip

"""Decoding by torchcodec behind the same function as PyAV's, in a program that may import torch.

torchcodec hands out tensors, so it cannot be had without torch: it runs in `decode_torchcodec_worker`
alone, which is started only where it is asked for. Its wheel holds no FFmpeg; the libraries of PyAV's
wheel serve it as well, so that the decoder is the one that indexed the clips.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import av
import numpy as np

from sora_train.data.decode.frames import (
    TIME_TOLERANCE,
    BadClip,
    DecodeRequest,
    batches_of_frames,
    blaming_the_clip,
    fit_frame,
    open_container,
    too_few_frames,
    video_stream,
)
from sora_train.data.storage.ranges import ByteRange
from sora_train.errors import UserError

LINKS = "SORA_FFMPEG_LINKS"
"""Environment variable: the folder of links that a worker has made for itself, to be removed."""
_WHEELS_LIBRARY = re.compile(r"(lib(?:av|sw)\w+)-[0-9a-f]+\.so\.(\d+)")


def require() -> None:
    """Raise UserError where torchcodec is not installed."""
    if importlib.util.find_spec("torchcodec") is None:
        raise UserError(
            "data.decoder=torchcodec, but torchcodec is not installed: "
            "`pip install 'sora_train[torchcodec]'`, or set data.decoder=pyav"
        )


def load() -> None:
    """Import torchcodec, with PyAV's FFmpeg where that is a wheel's; to be called as a program starts.

    The dynamic linker reads its search path once, at the start of a program, so the program is
    started anew with a path on which those libraries have their plain names.
    """
    bundled = Path(av.__file__).resolve().parent.parent / "av.libs"
    if LINKS not in os.environ and bundled.is_dir():
        links = tempfile.mkdtemp(prefix="sora-ffmpeg-")
        for library in bundled.iterdir():
            if named := _WHEELS_LIBRARY.match(library.name):
                os.symlink(library, Path(links) / f"{named[1]}.so.{named[2]}")
        search = [links, str(bundled), os.environ.get("LD_LIBRARY_PATH", "")]
        path = os.pathsep.join(filter(None, search))
        os.execve(
            sys.executable, sys.orig_argv, {**os.environ, LINKS: links, "LD_LIBRARY_PATH": path}
        )
    try:
        import torch
        import torchcodec.decoders  # noqa: F401
    # Its own message is a page; the linker and torch raise what they please.
    except Exception as error:
        sys.exit(
            f"torchcodec does not load ({_cause(error)}): it has to fit torch and an FFmpeg of 4 to 8; "
            "see constraints.txt, or set data.decoder=pyav"
        )
    finally:
        shutil.rmtree(os.environ.get(LINKS, ""), ignore_errors=True)
    torch.set_num_threads(1)


def _cause(error: Exception) -> str:
    """The first cause in torchcodec's long message, or the message."""
    causes = re.findall(r"^OSError: (.*)$", str(error), re.MULTILINE)
    return (causes[0] if causes else " ".join(str(error).split()))[:200]


def decode_frames(request: DecodeRequest) -> np.ndarray:
    """As `sora_train.data.decode.frames.decode_frames`; images are not torchcodec's business."""
    file = ByteRange(request.path, request.offset, request.length, request.data)
    with file, blaming_the_clip(file):
        return _decode(file, request)


def _decode(file: ByteRange, request: DecodeRequest) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    # Of several streams torchcodec would take the largest, and the index holds the first.
    with open_container(file) as container:
        stream = video_stream(container).index
    file.seek(0)
    decoder = VideoDecoder(
        cast(Any, file),
        stream_index=stream,
        dimension_order="NHWC",
        num_ffmpeg_threads=1,
        # Anything else goes by the header's rate.
        seek_mode="exact",
        device="cpu",
    )
    # Matroska rounds to milliseconds, and a frame that begins now is shown now.
    times = np.asarray(request.times) + request.start + TIME_TOLERANCE
    ends = float(decoder.metadata.end_stream_seconds or 0.0)
    if times[-1] >= ends + 2 * TIME_TOLERANCE:
        raise too_few_frames(ends - request.start, request)
    times = np.clip(times, decoder.metadata.begin_stream_seconds, np.nextafter(ends, 0))
    clip = np.empty((len(times), request.height, request.width, 3), np.uint8)
    for batch in batches_of_frames(request):
        frames = decoder.get_frames_played_at(times[batch].tolist())
        if (frames.pts_seconds.numpy() > times[batch]).any():
            raise BadClip(
                "unreadable", "a seek goes beyond the frame it is for; use data.decoder=pyav"
            )
        for place, frame in zip(range(batch.start, batch.stop), frames.data.numpy(), strict=True):
            clip[place] = fit_frame(frame, request)
    return clip

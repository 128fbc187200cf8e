"""Makes a file of each clip: frame-exact, upright, in SDR, without bars; or a copy of its packets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from pydantic import Field

from data_prep.media.crop import Crop, CropConfig, find_crop
from data_prep.media.made import MADE, columns_of
from data_prep.media.reading import BACKGROUND, frames_between, open_row, picture, resized
from data_prep.stage import Stage, Workspace
from sora_train.base.files import renamed_when_whole
from sora_train.config.sections.base import Section
from sora_train.data.decode.frames import (
    BadClip,
    DecodeRequest,
    blaming_the_clip,
    decode_stream,
    open_container,
    video_stream,
)
from sora_train.data.decode.video_io import Encoding, stream_h264

SAMPLES = 8


class ClipConfig(Section):
    """`clip:`"""

    copy_packets: bool = False
    """Copy the packets between key frames instead of encoding anew: fast and without loss, but clips begin and end at
    the key frames inside their scene, and nothing is cropped."""
    short_side: int = Field(1080, ge=0)
    """Clips that are larger are scaled down to this short side; 0: none is."""
    crf: int = Field(18, ge=0, le=51)
    """Quality of the H.264, lower is better."""
    gop: int = Field(48, ge=1)
    """Most frames between key frames: few make a clip quick to read from any place."""
    crop: CropConfig = CropConfig()


def clip(rows: pa.Table, settings: ClipConfig, workspace: Workspace) -> pa.Table:
    """The file of each clip below `workspace.files`, with what is in it."""
    return pa.Table.from_pylist(
        [_made(row, settings, workspace) for row in rows.to_pylist()], schema=STAGE.adds
    )


def _made(row: Mapping[str, Any], settings: ClipConfig, workspace: Workspace) -> dict[str, Any]:
    is_image = row["source_kind"] == "image"
    extension = row["source_codec"] if is_image else "mp4"
    name = _name(row, settings)
    file = f"{name[:2]}/{name}.{extension}"
    path = workspace.files / file
    begin, end, crop = row["begin"], row["end"], None
    with open_row(row) as source:
        if is_image:
            _copy_bytes(source, path)
        elif settings.copy_packets:
            begin, end = _copy_packets(source, row, path)
        else:
            with blaming_the_clip(source):
                crop = find_crop(_samples(source, row), settings.crop)
                _encode(source, row, crop, settings, path)
    made = columns_of(workspace.files, file, row["source_kind"])
    whole = [0, 0, row["source_width"], row["source_height"]]
    return {
        "begin": begin,
        "end": end,
        "bit_rate": int(made["bytes"] * 8 / made["duration"]) if made["duration"] else 0,
        "crop": [crop.left, crop.top, crop.width, crop.height] if crop else whole,
        "crop_reason": crop.reason if crop else "",
        **made,
    }


def _name(row: Mapping[str, Any], settings: ClipConfig) -> str:
    """What a clip's file is called: a digest of what it is made of."""
    made_of = [row["source_digest"], row["begin"], row["end"], settings.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _copy_bytes(source: Any, path: Path) -> None:
    with renamed_when_whole(path) as partial, open(partial, "wb") as file:
        while block := source.read(1 << 20):
            file.write(block)


def _samples(source: Any, row: Mapping[str, Any]) -> np.ndarray:
    """Some frames spread over a clip, uint8 (N, H, W, 3), as displayed."""
    height, width = row["source_height"], row["source_width"]
    length = row["end"] - row["begin"]
    # From the middles of equal parts: a decoder that is given the very edges may meet the next scene.
    times = [row["begin"] + length * (n + 0.5) / SAMPLES for n in range(SAMPLES)]
    request = DecodeRequest(
        row=0, key=row["key"], path=row["path"], offset=0, length=row["length"], kind="video",
        times=tuple(times), crop=(0.0, 0.0, float(height), float(width)), shown=(height, width),
        height=height, width=width, start=row["source_start"], fps=row["source_fps"],
        traits=row["source_traits"], alpha_background=BACKGROUND,
    )  # fmt: skip
    source.seek(0)
    return decode_stream(source, request)


def _encode(
    source: Any, row: Mapping[str, Any], crop: Crop, settings: ClipConfig, path: Path
) -> None:
    size = _size(crop, settings.short_side)

    def frames() -> Iterator[tuple[float | None, np.ndarray]]:
        source.seek(0)
        for time, _, frame in frames_between(
            source,
            row["begin"],
            row["end"],
            row["source_traits"],
            row["source_start"],
            row["source_fps"],
            is_seekable=row["is_seekable"],
        ):
            shown = resized(picture(frame), row["source_height"], row["source_width"])
            box = shown[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            # Of an even rate the place in the sequence says the time exactly.
            yield (time - row["begin"] if row["source_vfr"] else None), resized(box, *size)

    stream_h264(frames(), row["source_fps"], path, Encoding(settings.crf, settings.gop))


def _size(crop: Crop, short_side: int) -> tuple[int, int]:
    """(height, width) of a clip: that of its crop, scaled down to `short_side`; even, as 4:2:0 colour needs."""
    scale = min(1.0, short_side / min(crop.height, crop.width)) if short_side else 1.0
    height, width = (max(2, round(side * scale) // 2 * 2) for side in (crop.height, crop.width))
    return height, width


def _copy_packets(source: Any, row: Mapping[str, Any], path: Path) -> tuple[float, float]:
    """Copy the packets from the first key frame of the range to the last one; returns where they begin and end.

    Raises BadClip where the range holds no two key frames.
    """
    half, start = 0.25 / (row["source_fps"] or 25.0), row["source_start"]
    begin, end = row["begin"] + start, row["end"] + start
    with blaming_the_clip(source):
        with open_container(source) as container:
            stream = video_stream(container)
            keys = [
                packet.pts
                for packet in container.demux(stream)
                if packet.is_keyframe
                and packet.pts is not None
                and begin - half <= packet.pts * packet.time_base <= end + half
            ]
        if len(keys) < 2:
            raise BadClip(
                "no_key_frames",
                f"{row['begin']:.3f} to {row['end']:.3f} s hold {len(keys)} key frames, and a copy needs two",
            )
        source.seek(0)
        with renamed_when_whole(path) as partial, open_container(source) as container:
            stream = video_stream(container)
            tick = stream.time_base
            assert tick is not None
            _remux(container, stream, keys[0], keys[-1], str(partial))
        return float(keys[0] * tick) - start, float(keys[-1] * tick) - start


def _remux(container: Any, stream: av.VideoStream, first: int, last: int, file: str) -> None:
    with av.open(file, "w", format="mp4", options={"movflags": "+faststart"}) as output:
        copied = output.add_stream_from_template(stream)
        container.seek(first, stream=stream, backward=True)
        is_inside = False
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            if packet.is_keyframe:
                is_inside = first <= packet.pts < last
                if packet.pts >= last:
                    break
            # Frames shown before their key frame belong to the scene before.
            if is_inside and packet.pts >= first:
                packet.pts -= first
                packet.dts = packet.dts - first if packet.dts is not None else None
                packet.stream = copied
                output.mux(packet)


def _seconds(row: Mapping[str, Any], settings: ClipConfig) -> float:
    # HDR is tone-mapped at a second a frame of 4K.
    pixels = row["source_width"] * row["source_height"] * row["source_fps"]
    each = 40.0 if row["source_hdr"] else 4.0
    return 60.0 + (row["end"] - row["begin"]) * max(1.0, each * pixels / (1920 * 1080 * 30))


STAGE = Stage(
    name="clip",
    run=clip,
    config=ClipConfig,
    reads=("source_digest", "begin", "end"),
    adds=pa.schema(
        [
            ("begin", pa.float64()),
            ("end", pa.float64()),
            ("bit_rate", pa.int64()),
            ("crop", pa.list_(pa.int64())),
            ("crop_reason", pa.string()),
            *MADE.items(),
        ]
    ),
    seconds=_seconds,
)

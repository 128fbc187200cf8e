"""What is in each source: its streams, the real number of frames, how it is to be shown; long ones in parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import av
import pyarrow as pa
from pydantic import Field

from data_prep.media.reading import open_row
from data_prep.stage import OF_ROW, Stage, Workspace
from sora_train.config.sections.base import Section
from sora_train.data.decode.frames import (
    COUNTED,
    UNSEEKABLE,
    BadClip,
    blaming_the_clip,
    open_container,
)
from sora_train.data.decode.probe import HLG, PQ, Probe, ProbeRequest, probe_file

# FFmpeg's numbers for the range of a picture's values.
_RANGES = {1: "limited", 2: "full"}


class ProbeConfig(Section):
    """`probe:`"""

    count: Literal["decode", "packets"] = "packets"
    """How frames are counted: by their packets, or by decoding every one, which finds damage before the long work."""
    part_seconds: float = Field(120.0, ge=10)
    """Longer sources are searched for scenes in parts of this length, so that many processes share one."""


def probe(rows: pa.Table, settings: ProbeConfig, workspace: Workspace) -> pa.Table:
    """A row for each part of each source; the parts of a source have its columns, and times of their own."""
    results: list[dict[str, Any]] = []
    for number, row in enumerate(rows.to_pylist()):
        found = _columns(row, settings)
        results += [
            found | {"part_begin": begin, "part_end": end, OF_ROW: number}
            for begin, end in parts(row, found, settings.part_seconds)
        ]
    return pa.Table.from_pylist(results, schema=STAGE.adds.append(pa.field(OF_ROW, pa.int64())))


def parts(
    row: Mapping[str, Any], found: Mapping[str, Any], seconds: float
) -> list[tuple[float, float]]:
    """(begin, end) in seconds after the first frame, end to end, of about equal length."""
    begin = max(0.0, row["range_begin"] or 0.0)
    end = min(found["source_duration"], row["range_end"] or float("inf"))
    if found["source_kind"] != "video" or not found["is_seekable"]:
        return [(begin, max(begin, end))]
    count = max(1, round((end - begin) / seconds))
    edges = [round(begin + (end - begin) * n / count, 6) for n in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _columns(row: Mapping[str, Any], settings: ProbeConfig) -> dict[str, Any]:
    count = settings.count if row["kind"] == "video" else "decode"
    request = ProbeRequest(
        0, row["key"], row["path"], row["offset"], row["length"], row["kind"], count
    )
    with open_row(row) as file:
        probed = probe_file(file, request)
        streams: dict[str, Any] = {
            "streams": "",
            "container": "",
            "audio": "",
            "bit_rate": 0,
            "range": "",
        }
        if row["kind"] == "video":
            file.seek(0)
            with blaming_the_clip(file):
                streams = _streams(file)
    if row["range_begin"] is not None and row["range_begin"] >= probed.duration > 0:
        raise BadClip(
            "bad_range", f"the range begins at {row['range_begin']:g} s of {probed.duration:.3f} s"
        )
    traits = probed.traits.split()
    seekable = COUNTED not in traits and streams["container"] not in UNSEEKABLE
    hdr = "pq" if PQ in traits else "hlg" if HLG in traits else ""
    return _named(row, probed) | {
        "is_seekable": seekable,
        "source_hdr": hdr,
        "source_range": streams["range"],
        "source_audio": streams["audio"],
        "source_container": streams["container"],
        "source_bit_rate": streams["bit_rate"],
        "source_streams": streams["streams"],
    }


def _named(row: Mapping[str, Any], probed: Probe) -> dict[str, Any]:
    return {
        "source_digest": probed.digest,
        "source_kind": row["kind"],
        "source_codec": probed.codec,
        "source_frames": probed.frames,
        "source_fps": probed.fps,
        "source_vfr": probed.vfr,
        "source_width": probed.width,
        "source_height": probed.height,
        "source_rotation": probed.rotation,
        "source_duration": probed.duration,
        "source_start": probed.start,
        "source_traits": probed.traits,
    }


def _streams(file: Any) -> dict[str, Any]:
    """Every stream of a container, what its sound is, and how its pictures' values are meant."""
    with open_container(file) as container:
        told = [_stream(stream) for stream in container.streams]
        videos = [stream for stream in told if stream["type"] == "video" and not stream["cover"]]
        return {
            "streams": json.dumps(told),
            "container": container.format.name,
            "audio": " ".join(stream["codec"] for stream in told if stream["type"] == "audio"),
            "bit_rate": int(container.bit_rate or 0),
            "range": videos[0].get("range", "") if videos else "",
        }


def _stream(stream: Any) -> dict[str, Any]:
    context = stream.codec_context
    told = {
        "type": stream.type,
        "codec": context.codec.canonical_name if context is not None else "unknown",
        "cover": bool(stream.disposition & av.stream.Disposition.attached_pic),
        "language": stream.language or "",
    }
    if stream.type == "video" and context is not None:
        told |= {
            "width": context.width,
            "height": context.height,
            "fps": float(stream.average_rate or 0),
            "pixels": context.pix_fmt or "",
            "range": _RANGES.get(int(context.color_range), ""),
        }
    return told


def _seconds(row: Mapping[str, Any], settings: ProbeConfig) -> float:
    # Reading a large file takes as long as the disk needs, decoding it five seconds a MiB at most.
    return 60.0 + row["length"] / 2**20 * (5.0 if settings.count == "decode" else 0.5)


STAGE = Stage(
    name="probe",
    run=probe,
    config=ProbeConfig,
    reads=("path", "offset", "length", "stamp", "kind", "range_begin", "range_end"),
    adds=pa.schema(
        [
            ("source_digest", pa.string()),
            ("source_kind", pa.string()),
            ("source_codec", pa.string()),
            ("source_frames", pa.int64()),
            ("source_fps", pa.float64()),
            ("source_vfr", pa.bool_()),
            ("source_width", pa.int64()),
            ("source_height", pa.int64()),
            ("source_rotation", pa.int64()),
            ("source_duration", pa.float64()),
            ("source_start", pa.float64()),
            ("source_traits", pa.string()),
            ("is_seekable", pa.bool_()),
            ("source_hdr", pa.string()),
            ("source_range", pa.string()),
            ("source_audio", pa.string()),
            ("source_container", pa.string()),
            ("source_bit_rate", pa.int64()),
            ("source_streams", pa.string()),
            ("part_begin", pa.float64()),
            ("part_end", pa.float64()),
        ]
    ),
    seconds=_seconds,
)

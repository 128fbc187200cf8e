"""What is known of a clip's file once it is made, as columns."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from sora_train.data.decode.probe import ProbeRequest, probe_video

PROBED = {
    "digest": pa.string(),
    "codec": pa.string(),
    "frames": pa.int64(),
    "fps": pa.float64(),
    "vfr": pa.bool_(),
    "width": pa.int64(),
    "height": pa.int64(),
    "duration": pa.float64(),
    "start": pa.float64(),
    "traits": pa.string(),
    "coding": pa.string(),
}
"""The fields of `Probe` that are kept of it."""
MADE = {"file": pa.string(), "bytes": pa.int64(), **PROBED}


def columns_of(files: Path, file: str, kind: str) -> dict[str, Any]:
    """The columns MADE of a file below `files`; `kind` is `video` or `image`. Raises BadClip."""
    path = files / file
    length = path.stat().st_size
    probed = probe_video(ProbeRequest(0, file, str(path), 0, length, kind, "packets"))
    return {"file": file, "bytes": length, **{name: getattr(probed, name) for name in PROBED}}

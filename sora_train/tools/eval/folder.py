"""A folder of clips, as `sora sample` writes it or of any mp4 files, read to be judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.data.decode.frames import BadClip, DecodeRequest, StorageFault, decode_frames
from sora_train.data.decode.probe import ProbeRequest, probe_video
from sora_train.errors import UserError
from sora_train.evaluation.cases import Case, Sampled, asked_by

PROMPTS = "prompts.json"
MOST_FRAMES = 4096
"""Of one clip: it is held in memory whole."""


def read_folder(folder: Path, most: int) -> tuple[list[Sampled], list[str]]:
    """The first `most` clips of a folder, and a sentence for each that cannot be read.

    Raises UserError where there is no folder, no clip in it, or none that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a run, or a folder of clips")
    rows = _listed(folder)[:most]
    if not rows:
        raise UserError(
            f"{folder} holds no clips (no {PROMPTS} that names any, and no mp4 files) and is no run; give the --out of "
            "`sora sample`, or a run"
        )
    clips, notes = [], []
    for file, prompt in rows:
        try:
            clip, fps = read_clip(folder / file)
        except (BadClip, StorageFault, OSError) as error:
            notes.append(f"{folder / file} is left out: {error}.")
            continue
        clips.append(
            Sampled(Case("clips", prompt, asked=asked_by(prompt)), clip, fps, file=str(file))
        )
    if not clips:
        raise UserError(f"no clip of {folder} can be read: {notes[0]}")
    return clips, notes


def read_clip(path: Path) -> tuple[np.ndarray, float]:
    """A video as it is shown, uint8 (F, H, W, 3), and its rate. Raises BadClip where it is damaged."""
    size = path.stat().st_size
    probe = probe_video(ProbeRequest(0, path.name, str(path), 0, size, "video"))
    fps = probe.fps or 1.0
    if probe.frames > MOST_FRAMES:
        raise BadClip("too_long", f"it has {probe.frames} frames, more than {MOST_FRAMES}")
    request = DecodeRequest(
        row=0,
        key=path.name,
        path=str(path),
        offset=0,
        length=size,
        kind="video",
        times=tuple(number / fps for number in range(probe.frames)),
        crop=(0.0, 0.0, float(probe.height), float(probe.width)),
        shown=(probe.height, probe.width),
        height=probe.height,
        width=probe.width,
        start=probe.start,
        fps=probe.fps,
        traits=probe.traits,
    )
    return decode_frames(request), fps


def _listed(folder: Path) -> list[tuple[Path, str]]:
    """(file, prompt) of each clip. Raises UserError where `prompts.json` is damaged."""
    path = folder / PROMPTS
    if not path.exists():
        return [(Path(file.name), "") for file in sorted(folder.glob("*.mp4"))]
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        return [(Path(row["file"]), str(row["prompt"])) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it, and the clips are judged without their prompts"
        ) from error

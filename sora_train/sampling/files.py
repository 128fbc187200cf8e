"""Sample clips as files: mp4 a prompt, a contact sheet, and the prompts beside them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sora_train.base.contact_sheet import contact_sheet
from sora_train.base.files import write_atomically
from sora_train.data.decode.video_io import encode_h264


def save_clips(
    folder: Path,
    clips: list[np.ndarray],
    prompts: list[str],
    *,
    fps: float,
    seeds: list[int],
    notes: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Write `000.mp4` ..., `contact_sheet.png` and `prompts.json`, with `notes` of each; returns the clips' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, clip in enumerate(clips):
        path = folder / f"{i:03d}.mp4"
        encode_h264(clip, fps, path)
        paths.append(path)
    contact_sheet(clips, prompts, folder / "contact_sheet.png")
    rows = [
        {"prompt": prompt, "file": path.name, "seed": seed, **note}
        for prompt, path, seed, note in zip(
            prompts, paths, seeds, notes or [{}] * len(paths), strict=True
        )
    ]
    write_atomically(folder / "prompts.json", json.dumps(rows, indent=1))
    return paths


def save_stills(clips: list[np.ndarray], paths: list[Path]) -> list[Path]:
    """Write clips of a single frame as PNG beside their mp4 files; returns the images' paths."""
    stills = []
    for clip, path in zip(clips, paths, strict=True):
        if len(clip) == 1:
            still = path.with_suffix(".png")
            partial = still.with_name(f".{still.name}.tmp")
            Image.fromarray(clip[0]).save(partial, format="PNG")
            os.replace(partial, still)
            stills.append(still)
    return stills

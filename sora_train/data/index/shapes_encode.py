"""Scenes of the shapes world as files, with what the manifest says of them."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image

from sora_train.data.decode.video_io import encode_h264
from sora_train.data.shapes.scene import Scene
from sora_train.data.shapes.world import Lasting, render

# Fine enough that the oracle reads the files as well as the renderer's own frames.
CRF = 14


@dataclass(frozen=True)
class ShapesRequest:
    """Asks for scenes `first` to `first + count - 1` of a split."""

    row: int
    key: str
    seed: int
    split: str
    first: int
    count: int
    image_share: float
    colour: str = ""
    lasting: Lasting | None = None


@dataclass(frozen=True)
class EncodedScene:
    """A scene as a file, and what the manifest says of it."""

    key: str
    data: bytes
    extension: str
    caption: str
    meta: dict[str, object]


def encode_scene(scene: Scene) -> EncodedScene:
    """The scene as mp4, or as PNG where it is a single image."""
    frames = render(scene)
    file = io.BytesIO()
    is_image = scene.num_frames == 1
    if is_image:
        Image.fromarray(frames[0]).save(file, "PNG")
    else:
        encode_h264(frames, scene.fps, file, crf=CRF)
    data = file.getvalue()
    meta: dict[str, object] = {
        "kind": "image" if is_image else "video",
        "codec": "png" if is_image else "h264",
        "frames": scene.num_frames,
        "fps": 0.0 if is_image else scene.fps,
        "height": scene.height,
        "width": scene.width,
        "duration": 0.0 if is_image else scene.num_frames / scene.fps,
        "sample_digest": hashlib.sha256(data).hexdigest()[:32],
    }
    return EncodedScene(scene.key, data, "png" if is_image else "mp4", scene.caption, meta)

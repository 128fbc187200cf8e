"""500 damaged videos and pictures: each is used or dropped with a reason, and what is used is decoded or fails alone.

Through what `sora data index` and the loader run: no crash, no hang, no stop, no clip that is neither used nor told of.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_train.data.decode.frames import DecodeRequest
from sora_train.data.decode.pool import DecodePool
from sora_train.data.index.folder import open_source
from sora_train.data.manifest import Manifest
from sora_train.data.sample import Failure

FORMS = {
    "mp4": "mpeg4", "mkv": "libx264", "avi": "mpeg4", "webm": "libvpx-vp9", "ts": "mpeg2video", "mov": "png",
    "flv": "flv1", "gif": "gif", "png": "", "jpg": "", "webp": "", "tif": "", "bmp": "",
}  # fmt: skip
PIXELS = {"png": "rgba", "gif": "rgb8"}


def encoded(path: Path, codec: str) -> bytes:
    """Six frames of 64 x 48, each another grey with a bright square that moves; a picture is the first of them."""
    frames = np.stack([np.full((48, 64, 3), 40 * n, np.uint8) for n in range(6)])
    for number, frame in enumerate(frames):
        frame[8:24, 8 * number : 8 * number + 8] = (255, 60, 10)
    if not codec:
        Image.fromarray(frames[0]).save(path)
        return path.read_bytes()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to eight places flipped, cut out, doubled or overwritten; half of them in the header."""
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(min(len(data), 200) if draw.random() < 0.5 else len(data))
        length = draw.choice([1, 1, 2, 4, 8, 300])
        match draw.choice(["flip", "cut", "double", "ones", "tail"]):
            case "flip":
                data = data[:at] + draw.randbytes(length) + data[at + length :]
            case "cut":
                data = data[:at] + data[at + length :]
            case "double":
                data = data[: at + length] + data[at:]
            case "ones":
                # The largest number there is: a header that asks for all memory.
                data = data[:at] + b"\xff" * min(length, 8) + data[at + min(length, 8) :]
            case "tail":
                data = data[: max(1, at)] if draw.random() < 0.2 else data
        data = data or b"\0"
    return data


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    return {form: encoded(folder / f"a.{form}", codec) for form, codec in FORMS.items()}


def requests(manifest: Manifest) -> Iterator[DecodeRequest]:
    """What the loader asks of each clip that is used: its first frame and one of its middle, whole."""
    for row in np.flatnonzero(manifest.drop_reason == ""):
        height, width = int(manifest.height[row]), int(manifest.width[row])
        video = manifest.kind[row] == "video"
        times = (0.0, float(manifest.duration[row]) / 2) if video else (0.0,)
        yield DecodeRequest(
            row=int(row), key=str(manifest.key[row]), path=str(manifest.path(row)),
            offset=int(manifest.offset[row]), length=int(manifest.length[row]),
            kind=str(manifest.kind[row]), times=times, crop=(0.0, 0.0, height, width),
            shown=(height, width), height=16, width=16, start=float(manifest.start[row]),
            fps=float(manifest.fps[row]), traits=str(manifest.traits[row]),
        )  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 60), *(pytest.param(n, 110, marks=pytest.mark.slow) for n in (60, 170, 280, 390))],
)
def test_each_is_used_or_dropped_with_a_reason(
    tmp_path: Path, wholes: dict[str, bytes], first: int, count: int
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    forms = list(wholes)
    for number in range(first, first + count):
        form = forms[number % len(forms)]
        file = folder / f"{number:04d}.{form}"
        file.write_bytes(mutated(wholes[form], random.Random(number)))
        file.with_suffix(".txt").write_text("a square that moves")
    manifest = open_source(str(folder), work_dir=tmp_path / "work", timeout=20.0)
    assert len(manifest) == count
    dropped = manifest.drop_reason != ""
    assert all(manifest.drop_detail[dropped])
    assert not any(
        word in text
        for text in manifest.drop_detail[dropped]
        for word in (" object at 0x", "Errno")
    )
    with DecodePool(2, timeout=20.0) as pool:
        answers = [pool.submit(request) for request in requests(manifest)]
        for answer in answers:
            found = answer.result(timeout=120)
            assert isinstance(found, Failure) or found.shape[-1] == 3
    # The damage is such that neither outcome is rare: the test would pass for a reader that drops all.
    assert 0.1 * count < dropped.sum() < 0.9 * count

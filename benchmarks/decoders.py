"""Decoders beside each other on one clip, written again with keyframes near and far, by pattern of access.

    python benchmarks/decoders.py CLIP [--repeats N] [--out DIR]

CLIP is played forth and back for 20 s at 24 fps. All answer the same request in one process on one core, in turns;
what is compared is the time of cores, so other work on the machine counts little. `pyav, whole` decodes every frame
from a window's keyframe to its end, as the package did before it chose packets. A decoder whose pixels are not
PyAV's is named with the largest difference.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from sora_train.data.decode import decord, frames, torchcodec
from sora_train.data.decode.frames import BadClip, DecodeRequest
from sora_train.data.decode.probe import ProbeRequest, probe_video
from sora_train.data.storage.ranges import ByteRange
from sora_train.device.measuring import Measured, Result, Stats

FPS, FRAMES, ASKED, SIDE = 24, 480, 16, 256
CODINGS = {
    "h264, a keyframe each frame": ("libx264", {"g": "1", "preset": "fast"}, "mp4"),
    "h264, each 12": ("libx264", {"g": "12", "preset": "fast"}, "mp4"),
    "h264, each 48": ("libx264", {"g": "48", "preset": "fast"}, "mp4"),
    "h264, each 250": ("libx264", {"g": "250", "preset": "fast"}, "mp4"),
    "hevc, each 48": (
        "libx265",
        {"preset": "ultrafast", "x265-params": "keyint=48:log-level=none"},
        "mp4",
    ),
    "vp9, each 48": ("libvpx-vp9", {"g": "48", "deadline": "realtime", "cpu-used": "8"}, "webm"),
    "av1, each 48": ("libsvtav1", {"g": "48", "preset": "12"}, "mp4"),
}


def whole(request: DecodeRequest) -> np.ndarray:
    """PyAV's answer where no packet is left out."""
    with (
        ByteRange(request.path, request.offset, request.length) as file,
        frames.open_container(file) as container,
    ):
        stream = frames.video_stream(container)
        is_far = request.times[0] > frames.SEEK_WORTH_SECONDS
        if is_far:
            ticks = int((request.times[0] + request.start) / float(stream.time_base or 1))
            container.seek(ticks, stream=stream, backward=True)
        clip = frames._pick(container, stream, request, None, sought=is_far)
        assert clip is not None, "its files have an index"
        return clip


CONTENDERS: dict[str, Callable[[DecodeRequest], np.ndarray]] = {
    "pyav": frames.decode_frames,
    "pyav, whole": whole,
    "decord": decord.decode_frames,
    "torchcodec": torchcodec.decode_frames,
}


def write(source: Path, path: Path, codec: str, options: dict[str, str]) -> None:
    """The clip at `source`, forth and back for FRAMES frames."""
    with av.open(str(source)) as container:
        forth = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
    images = itertools.islice(itertools.cycle([*forth, *forth[-2:0:-1]]), FRAMES)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = forth[0].shape[0] * 2 // 3, forth[0].shape[1]
        stream.pix_fmt = "yuv420p"
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def requests(path: Path) -> dict[str, DecodeRequest]:
    """A frame, a run of frames and frames spread over the clip, with their shorter side at SIDE."""
    size = path.stat().st_size
    found = probe_video(ProbeRequest(0, path.name, str(path), 0, size, "video", "packets"))
    begin = (found.frames - ASKED) // 2
    numbers = {
        "still": np.array([found.frames // 2]),
        "run": np.arange(begin, begin + ASKED),
        "spread": np.linspace(0, found.frames - 1, ASKED).astype(int),
    }
    shown = (found.height, found.width)
    height, width = (round(side * SIDE / min(shown)) for side in shown)
    return {
        pattern: DecodeRequest(
            0, path.name, str(path), 0, size, "video", tuple((chosen / found.fps).tolist()),
            (0, 0, *shown), shown, height, width, start=found.start, fps=found.fps,
        )
        for pattern, chosen in numbers.items()
    }  # fmt: skip


def rates(request: DecodeRequest, repeats: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each contender, turn by turn; and what is wrong with those that fail or show other pixels."""
    seconds: dict[str, list[float]] = {}
    wrong: dict[str, str] = {}
    ours = frames.decode_frames(request)
    for _ in range(repeats):
        for name, decode in CONTENDERS.items():
            began = time.process_time()
            try:
                clip = decode(request)
            except BadClip as error:
                wrong[name] = error.reason
                continue
            seconds.setdefault(name, []).append(time.process_time() - began)
            if not np.array_equal(clip, ours):
                wrong[name] = f"pixels differ by up to {abs(clip.astype(int) - ours).max()}"
    return seconds, wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("clip", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    measured: dict[str, Measured] = {}
    facts: dict[str, str | int | float | None] = {"clip": options.clip.name}
    with tempfile.TemporaryDirectory() as folder:
        for number, (coding, (codec, settings, suffix)) in enumerate(CODINGS.items()):
            path = Path(folder) / f"{number}.{suffix}"
            write(options.clip, path, codec, settings)
            for pattern, request in requests(path).items():
                seconds, wrong = rates(request, options.repeats)
                for name, spent in seconds.items():
                    if name == "pyav":
                        value = Measured(Stats.of([1e3 * one for one in spent]), "ms", "{:.0f}")
                    else:
                        shares = [
                            theirs / ours
                            for theirs, ours in zip(spent, seconds["pyav"], strict=True)
                        ]
                        value = Measured(Stats.of(shares), "of pyav's time", "{:.2f}")
                    measured[f"{coding}, {pattern}: {name}"] = value
                facts |= {f"{coding}, {pattern}: {name}": what for name, what in wrong.items()}
                print(coding, pattern, {n: round(min(s), 4) for n, s in seconds.items()}, wrong)
    path = Result(
        "decoders", measured, facts, command=f"python benchmarks/decoders.py {options.clip.name}"
    ).write(options.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    torchcodec.load()
    main()

"""What the invisible watermark costs in quality, what it survives, and how often it is seen where it is not.

    sora bench watermark --videos FOLDER --keys 3 --trials 30000 --out benchmarks/results

Every clip has FRAMES frames: windows of the real clips of a folder, scaled to a short side of 256 pixels, and scenes of
the shapes world at 256 and at 48 pixels. Each is written as a backend would, marked by
`Watermark.mark`, changed, and looked at by `Watermark.detect` with nothing but the key. False alarms are looked for
with keys that marked nothing, in marked and in unmarked clips.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from sora_train.base.code_version import commit, cpu_model
from sora_train.base.files import write_atomically
from sora_train.data.decode.video_io import encode_h264
from sora_train.data.shapes.world import render, sample_scene
from sora_train.serving.provenance.detection import GRID, PLACES, THRESHOLD, detect, spectra
from sora_train.serving.provenance.pattern import PERIODS, REACH, phases
from sora_train.serving.provenance.watermark import Watermark
from sora_train.serving.provenance.whitening import looked_at

FRAMES = 16
REAL = {
    "hiker.mp4": (0, (0, 16, 32)),
    "press.mp4": (0, (0, 40, 80)),
    "nasa.mp4": (1, (60, 150, 260, 340)),
    "motorcycle_4k.mp4": (0, (0, 40, 80)),
    "bars_av1.mkv": (0, (0, 60)),
}
"""Which of the file's video streams, and where windows begin."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What is done to a marked video: cropped to a share of each side, scaled, compressed."""

    name: str
    crop: float = 1.0
    scale: float = 1.0
    crf: int = 10


JOINT = Change("all three", 0.8, 0.5, 28)
CHANGES = (
    Change("nothing"),
    Change("CRF 28", crf=28),
    Change("scale 0.5", scale=0.5),
    Change("crop to 80 %", crop=0.8),
)


def rgb_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def luma_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray()[: frame.height] for frame in container.decode(video=0)])


def real_clips(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for file, (stream, starts) in REAL.items():
        with av.open(str(folder / file)) as container:
            kept: dict[int, list[np.ndarray]] = {start: [] for start in starts}
            for number, frame in enumerate(container.decode(container.streams.video[stream])):
                windows = [start for start in starts if start <= number < start + FRAMES]
                if windows:
                    share = 256 / min(frame.height, frame.width)
                    size = [round(side * share / 2) * 2 for side in (frame.width, frame.height)]
                    small = frame.reformat(*size, format="rgb24", interpolation="AREA")
                    kept[windows[0]].append(small.to_ndarray())
                if number > max(starts) + FRAMES:
                    break
        yield from ((f"{file} from {start}", np.stack(frames)) for start, frames in kept.items())


def shapes(side: int, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Scenes whose frames are played forth and back to FRAMES; a background of each kind comes in turn."""
    seen: dict[str, int] = {}
    for index in range(10_000):
        scene = sample_scene(11, index, image_share=0)
        if seen.get(scene.background, 0) > len(seen):
            continue
        seen[scene.background] = seen.get(scene.background, 0) + 1
        clip = render(dataclasses.replace(scene, height=side, width=side))
        order = [*range(len(clip)), *range(len(clip) - 2, 0, -1)]
        yield f"shapes {side} {index} {scene.background}", clip[np.resize(order, FRAMES)]
        if sum(seen.values()) == count:
            return


def changed(path: Path, change: Change, out: Path, draws: random.Random) -> None:
    """Write a video again: a crop at a place that is drawn, bicubic scaling, x264 with its defaults."""
    with (
        av.open(str(path)) as given,
        av.open(str(out), "w") as made,
    ):
        stream = None
        for frame in given.decode(video=0):
            if stream is None:
                height, width = (
                    int(side * change.crop) // 2 * 2 for side in (frame.height, frame.width)
                )
                top = draws.randint(0, (frame.height - height) // 2) * 2
                left = draws.randint(0, (frame.width - width) // 2) * 2
                size = [int(side * change.scale) // 2 * 2 for side in (width, height)]
                stream = made.add_stream("libx264", rate=24, options={"crf": str(change.crf)})
                stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
                stream.codec_context.thread_count = 1
            planes = frame.to_ndarray(format="yuv444p")
            cut = np.ascontiguousarray(planes[:, top : top + height, left : left + width])
            picture = av.VideoFrame.from_ndarray(cut, format="yuv444p")
            made.mux(stream.encode(picture.reformat(*size, "yuv420p", interpolation="BICUBIC")))
        made.mux(stream.encode(None))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(float(np.mean((a.astype(np.float32) - b) ** 2)), 1e-9))


def measured(
    name: str, clip: np.ndarray, number: int, folder: Path, changes: tuple[Change, ...]
) -> dict[str, Any]:
    """One clip with one key: quality, size, time, and the score after every change."""
    source, marked, after = (folder / f"{file}.mp4" for file in ("source", "marked", "after"))
    encode_h264(clip, 24, source)
    watermark, draws = Watermark(b"benchmark %8d key" % number), random.Random(f"{name} {number}")
    begin = time.process_time()
    watermark.mark(source, marked)
    middle = time.process_time()
    row: dict[str, Any] = {
        "clip": name,
        "pixels": min(clip.shape[1:3]),
        "luma_psnr": psnr(luma_of(marked), luma_of(source)),
        "rgb_psnr": psnr(rgb_of(marked), rgb_of(source)),
        "growth": marked.stat().st_size / source.stat().st_size,
        "mark_seconds": (middle - begin) / len(clip),
    }
    for change in changes:
        changed(marked, change, after, draws)
        row[change.name] = watermark.detect(after).score
    return row


def interval(hits: int, of: int) -> str:
    """Share with the 95 % interval of Wilson."""
    if not of:
        return "-"
    z, share = 1.96, hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


@torch.inference_mode()
def best_scores(picture: np.ndarray, keys: range) -> list[float]:
    """`detect` of many keys in one picture, whose spectra are shared; the first is compared with `detect` itself."""
    each = torch.from_numpy(np.stack([one for _, one in spectra(picture)])[:, :, REACH:])
    half = torch.zeros(len(each), GRID, GRID // 2 + 1, dtype=torch.complex64)
    rows, columns = torch.from_numpy(PERIODS % GRID), torch.from_numpy(PERIODS[REACH:])
    best = []
    for key in keys:
        waves = torch.from_numpy(phases(b"false alarm %8d" % key).conj()[:, REACH:].copy())
        half[:, rows[:, None], columns[None]] = (each * waves).to(torch.complex64)
        best.append(float(torch.fft.irfft2(half, (GRID, GRID)).max()) * GRID**2)
    assert abs(best[0] - detect(picture, phases(b"false alarm %8d" % keys[0])).score) < 1e-3
    return best


def false_alarms(paths: list[Path], trials: int) -> list[float]:
    scores: list[float] = []
    share = math.ceil(trials / len(paths))
    for number, path in enumerate(paths):
        picture = looked_at(path)
        scores += best_scores(picture, range(number * share, (number + 1) * share))
        print(
            f"{len(scores)} trials, largest score {max(scores):.2f} of {THRESHOLD:.2f}", flush=True
        )
    return scores


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| clips | n | luma PSNR, least | RGB PSNR, least | size | "
        + " | ".join(change.name for change in (*CHANGES, JOINT))
        + " |",
        "|---|--:|--:|--:|--:|" + "--:|" * (len(CHANGES) + 1),
    ]
    groups = {
        "real, 256": lambda row: row["pixels"] == 256 and not row["clip"].startswith("shapes"),
        "shapes, 256": lambda row: row["pixels"] == 256 and row["clip"].startswith("shapes"),
        "all, 256": lambda row: row["pixels"] == 256,
        "shapes, 48": lambda row: row["pixels"] == 48,
    }
    for name, belongs in groups.items():
        group = [row for row in rows if belongs(row)]
        if not group:
            continue
        cells = []
        for change in (*CHANGES, JOINT):
            found = [row[change.name] for row in group if change.name in row]
            cells.append(
                f"{interval(sum(score >= THRESHOLD for score in found), len(found))}, n {len(found)}"
            )
        lines.append(
            f"| {name} | {len(group)} | {min(row['luma_psnr'] for row in group):.1f} dB "
            f"| {min(row['rgb_psnr'] for row in group):.1f} dB "
            f"| x {float(np.median([row['growth'] for row in group])):.1f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sora bench watermark", description=__doc__)
    parser.add_argument("--videos", default=os.environ.get("SORA_TEST_VIDEOS", ""))
    parser.add_argument("--shapes", type=int, default=12, help="scenes of each size")
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--trials", type=int, default=30_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    asked = parsed(arguments)
    torch.set_num_threads(1)
    clips = list(real_clips(Path(asked.videos))) if asked.videos else []
    clips += [*shapes(256, asked.shapes), *shapes(48, asked.shapes)]
    rows, result = (
        [],
        {"commit": commit(), "cpu": cpu_model(), "threshold": THRESHOLD, "places": PLACES},
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder, looked = Path(name), []
        for key in range(asked.keys):
            for number, (clip_name, clip) in enumerate(clips):
                needed = (JOINT,) if min(clip.shape[1:3]) >= 256 else CHANGES[1:2]
                changes = needed if key else (*CHANGES, JOINT)
                row = measured(clip_name, clip, key * len(clips) + number, folder, changes)
                rows.append(row)
                print(json.dumps(row), flush=True)
                if key == 0 and number % 2 == 0:
                    for kind in ("source", "marked"):
                        looked.append(folder / f"{kind}_{number}.mp4")
                        (folder / f"{kind}.mp4").rename(looked[-1])
            write_atomically(
                asked.out / "watermark.json", json.dumps(result | {"rows": rows}, indent=1)
            )
        print(table(rows), flush=True)
        scores = false_alarms(looked, asked.trials) if asked.trials else []
    quantiles = np.quantile(scores, (0.5, 0.9, 0.99, 0.999, 1)).tolist() if scores else []
    result |= {"rows": rows, "trials": len(scores), "quantiles": quantiles}
    result["alarms"] = sum(score >= THRESHOLD for score in scores)
    write_atomically(asked.out / "watermark.json", json.dumps(result, indent=1))
    write_atomically(asked.out / "watermark.md", table(rows) + "\n")
    print(
        f"{result['alarms']} false alarms in {len(scores)} trials; quantiles of the best score {quantiles}"
    )
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))

"""Long videos of the shapes world, read by the oracle; what memory they take; and whether a kill changes them.

    sora bench long quality runs/quickstart_long --prompts 32
    sora bench long memory --size 256
    sora bench long kills runs/quickstart_long --times 5
    sora bench long picture --out long

quality: of the videos that show what their prompt says in the first second, how many still do in the last one; the
motion energy of the last second over that of the first; the worst seam between windows over the median change inside;
and slopes of what may drift. memory: the most a process takes above what it takes with the model loaded, for 5 seconds
and for 60, with random weights. kills: the bytes of files whose making was killed at random moments, and those of one
that was left alone. picture: frames of the videos of `quality` over time, as one PNG.
"""

import argparse
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from sora_train.base.code_version import commit, cpu_model
from sora_train.base.files import write_atomically
from sora_train.checkpoint.layout import split_step
from sora_train.data.shapes.oracle import read
from sora_train.data.shapes.scene import Prompt
from sora_train.data.shapes.world import LASTING_MOTIONS, eval_prompts
from sora_train.evaluation.metrics import changes, drift, motion_energy, seam_ratio
from sora_train.sampling.api import checkpoint_info, load
from sora_train.sampling.long.video import LongRequest, anchor_rate, levels, make_long
from sora_train.sampling.prompts.script import Script

FACTORS = ("colour", "shape", "motion")
SECOND = 9
"""Frames that span the world's second at 8 frames a second, both ends counted."""
COLUMNS, ROWS = 13, 4
EDGE = ((1, 1), (1, 1), (0, 0))
ALIVE = 0.5
"""Share of the first second's motion energy that the last one keeps in a video that is not frozen."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sora bench long", description=__doc__)
    parser.add_argument("what", choices=("quality", "memory", "kills", "picture", "peak"))
    parser.add_argument("run", nargs="?", default="")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--anchor-fps", type=float, help="0: none; else the lowest rate trained.")
    parser.add_argument("--smooth-fps", type=float, default=0.0)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("long"))
    args = parser.parse_args(argv)
    ways = {"quality": quality, "memory": memory, "kills": kills, "picture": picture, "peak": peak}
    row = ways[args.what](args)
    row |= {"commit": commit(), "cpu": cpu_model()}
    print(json.dumps(row, indent=1))
    if args.what != "peak":
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / f"{args.what}.json", json.dumps(row, indent=1))
    return 0


# --- quality ---


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """One video a prompt, and what the oracle reads of its first and of its last second."""
    prompts = eval_prompts(args.prompts, held_out=False, motions=LASTING_MOTIONS)
    info, model = checkpoint_info(*split_step(args.run)), load(args.run)
    rate = args.anchor_fps
    if rate is None:
        rate = anchor_rate(info.frame_rates, model.shape)
    request = LongRequest(args.seconds, model.shape, rate, smooth_fps=args.smooth_fps)
    began = time.process_time()
    paths = make_long(
        model,
        [Script.of(prompt.text) for prompt in prompts],
        request,
        args.out / "videos",
        seed=args.seed,
        batch=args.prompts,
        steps=args.steps,
    )
    spent = time.process_time() - began
    clips = [frames_of(path, request) for path in paths]
    passes = levels(request, model.spec.history_frames, model.vae.frame_step, anchored=True)
    seams = [window.fresh for window in passes[-1].windows[1:]]
    row = judged(clips, prompts, seams, request.fps)
    return row | {
        "step": model.step,
        "videos": len(clips),
        "seconds": args.seconds,
        "fps": request.fps,
        "anchor_fps": rate,
        "steps": args.steps or model.spec.num_steps,
        "cpu_seconds_a_video": spent / len(clips),
    }


def frames_of(path: Path, request: LongRequest) -> np.ndarray:
    """A file's frames, as whoever watches it sees them."""
    count = max(1, round(request.seconds * request.fps))
    frames = read_file(path)
    assert len(frames) == count, f"{path} has {len(frames)} frames"
    return frames


def read_file(path: Path) -> np.ndarray:
    """All frames of a file, uint8 (F, H, W, 3)."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def judged(
    clips: list[np.ndarray], prompts: list[Prompt], seams: list[int], fps: float
) -> dict[str, Any]:
    """The numbers of the benchmark."""
    step = max(1, round(fps / 8))
    span = SECOND * step
    firsts = [clip[:span:step] for clip in clips]
    lasts = [clip[aligned(len(clip), span, round(fps)) :][:span:step] for clip in clips]
    right = {
        name: [right_of(clip, prompt) for clip, prompt in zip(part, prompts, strict=True)]
        for name, part in (("first", firsts), ("last", lasts))
    }
    energy = [
        motion_energy(last, 8.0) / max(motion_energy(first, 8.0), 1e-9)
        for first, last in zip(firsts, lasts, strict=True)
    ]
    row: dict[str, Any] = {}
    for factor in FACTORS:
        kept = [number for number, found in enumerate(right["first"]) if found[factor]]
        still = [number for number in kept if right["last"][number][factor]]
        row[f"{factor}_first"] = len(kept) / len(clips)
        row[f"{factor}_kept"] = len(still) / max(len(kept), 1)
        if factor == "motion":
            moving = [n for n in kept if prompts[n].motion != "still"]
            alive = [n for n in still if n in moving and energy[n] >= ALIVE]
            row["moving_kept_alive"] = len(alive) / max(len(moving), 1)
    moving = [n for n, prompt in enumerate(prompts) if prompt.motion != "still"]
    row["energy_ratio"] = spread([energy[n] for n in moving])
    if seams:
        row["seam_worst"] = spread([seam_ratio(clip, seams) for clip in clips])
        row["seam_mean"] = spread([seam_size(clip, seams, np.mean) for clip in clips])
        row["seam_median"] = spread([seam_size(clip, seams, np.median) for clip in clips])
        # As many places in the middle of windows: what the worst of so many is where nothing was joined.
        inside = [a + (b - a) // 2 for a, b in itertools.pairwise([*seams, len(clips[0])])]
        row["inside_worst"] = spread([seam_ratio(clip, inside) for clip in clips])
    slopes = [drift(clip, fps) for clip in clips]
    row |= {name: spread([one[name] for one in slopes]) for name in slopes[0]}
    return row


def aligned(frames: int, span: int, rate: int) -> int:
    """The first frame of the last whole second: as far into the world's period as the video's first frame."""
    return max(0, (frames - span) // rate * rate)


def right_of(clip: np.ndarray, prompt: Prompt) -> dict[str, bool]:
    """Whether the largest thing has the prompt's colour, shape and motion."""
    found = read(clip)
    return {
        factor: bool(found) and getattr(found[0], factor) == getattr(prompt, factor)
        for factor in FACTORS
    }


def seam_size(clip: np.ndarray, seams: list[int], of: Callable[[np.ndarray], float]) -> float:
    """The mean, or the median, of the changes at seams over the median change elsewhere, or over one level if that is
    less."""
    found = changes(clip)
    borders = np.array(seams) - 1
    inner = np.delete(found, borders)
    return float(of(found[borders])) / max(1.0, float(np.median(inner)))


def spread(values: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def picture(args: argparse.Namespace) -> dict[str, Any]:
    """A row for each of the first videos, a column for each tenth of the time; `long.png`."""
    rows = []
    for path in sorted((args.out / "videos").glob("*.mp4"))[:ROWS]:
        clip = read_file(path)
        places = np.linspace(0, len(clip) - 1, COLUMNS).round().astype(int)
        rows.append(np.concatenate([np.pad(clip[at], EDGE) for at in places], axis=1))
    Image.fromarray(np.concatenate(rows)).save(args.out / "long.png")
    return {"picture": str(args.out / "long.png")}


# --- memory ---


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks above the loaded model of a short and a long video, each in a process of its own."""
    row: dict[str, Any] = {"size": args.size}
    for seconds in (5.0, args.seconds):
        command = [sys.executable, "-m", "benchmarks.long", "peak", "--seconds", f"{seconds:g}"]
        command += ["--size", str(args.size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout[done.stdout.index("{") :])
        row[f"above_loaded_mb_{seconds:g}s"] = found["above_loaded_mb"]
        row["loaded_mb"] = found["loaded_mb"]
    row["ratio"] = row[f"above_loaded_mb_{args.seconds:g}s"] / row["above_loaded_mb_5s"]
    return row


def peak(args: argparse.Namespace) -> dict[str, Any]:
    """Make one video with random weights, and measure this process."""
    import torch

    from sora_train.config.compose import compose
    from sora_train.models.text_to_video import TextToVideo
    from sora_train.models.vae.autoencoder import VideoVAE
    from sora_train.objectives.spec import build_spec
    from sora_train.sampling.long.passes import Maker
    from sora_train.sampling.long.store import Store
    from sora_train.sampling.long.video import stacked, write_videos
    from sora_train.sampling.pipeline import ClipShape

    # Small networks, since their frames are what is held; the sizes are those of a real video.
    overrides = ["experiment=parity_tiny", "objective.num_steps=1"]
    cfg = compose(overrides).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0)
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    request = LongRequest(args.seconds, ClipShape(33, args.size, args.size, 8.0), 0.5)
    passes = levels(request, spec.history_frames, vae.frame_step, anchored=True)
    loaded = resident()
    top = Sampled()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), {})
        maker = Maker(model.eval(), vae, spec, store, 0, [0], [""], 1, lambda: None)
        frames = stacked(passes, maker, lambda at: ["a red square rotates"])
        write_videos(frames, [Path(folder) / "a.mp4"], request.fps, store)
    most = max(top.stop(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"loaded_mb": loaded / 1e6, "above_loaded_mb": (most - loaded) / 1e6}


def resident() -> int:
    """Bytes of this process in memory."""
    text = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


class Sampled:
    """The most that this process takes, looked at every 20 milliseconds."""

    def __init__(self) -> None:
        self.most, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, resident())

    def stop(self) -> int:
        """The most, in bytes."""
        self._done.set()
        self._thread.join()
        return self.most


# --- kills ---


def kills(args: argparse.Namespace) -> dict[str, Any]:
    """Files made in one go, and in pieces between kills at random moments."""
    rng = random.Random(args.seed)
    command = [sys.executable, "-m", "sora_train", "sample", "--ckpt", args.run]
    command += ["--seconds", f"{args.seconds:g}", "--prompt", "a red square rotates"]
    command += ["--prompt", "a blue ring bounces"] + (
        ["--steps", str(args.steps)] * bool(args.steps)
    )
    whole, killed = args.out / "whole", args.out / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    subprocess.run([*command, "--out", str(whole)], check=True, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    moments = []
    for _ in range(args.times):
        process = subprocess.Popen([*command, "--out", str(killed)], stdout=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.2, 0.7) * took)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        folders = list(killed.glob(".unfinished-*"))
        moments.append(sum(len(list(folder.glob("*.npy"))) for folder in folders))
    subprocess.run([*command, "--out", str(killed)], check=True, stdout=subprocess.DEVNULL)
    equal = all(
        (whole / name).read_bytes() == (killed / name).read_bytes()
        for name in ("000.mp4", "001.mp4")
    )
    return {"kills": args.times, "windows_kept_after_each": moments, "equal_bytes": equal}


if __name__ == "__main__":
    sys.exit(main())

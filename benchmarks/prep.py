"""`python -m benchmarks.prep`: what each stage of `sora prep` costs, what a second worker brings, memory, and peers.

    python -m benchmarks.prep [--films N] [--seconds S] [--height H] [--only stages,workers,memory,cuts,nemo]
                              [--nemo PYTHON] [--out FILE.md]

Films are rendered first, shots of known cuts and cameras. `stages`: the whole pipeline with one worker; a stage's
seconds are those of its process's core, so that other programs add little. `workers`: the same with one worker and
with two, wall clock, in turns. `memory`: the most memory of a worker while a film of an hour is searched for scenes,
after a tenth of it and at its end. `cuts`: our detectors beside PySceneDetect alone on the same films. `nemo`: NeMo
Curator's video reader and motion filter on a CPU, from an environment of its own, beside our probe and motion score.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.footage import random_footage, write_footage
from data_prep.command import engine_of, prepare
from data_prep.pipeline import SETTINGS_FILE, bound_stages, run, stages_of
from data_prep.settings import parse
from data_prep.stage import Workspace
from sora_train.base.code_version import commit, cpu_model
from sora_train.base.files import read_json, write_atomically

PARTS = ("stages", "workers", "memory", "cuts", "nemo")
DETECTORS = ("joined", "transnetv2", "difference", "pyscenedetect")
ALLOWED_FRAMES = 2


def films(folder: Path, count: int, seconds: float, height: int) -> float:
    """Render `count` films; the seconds they last together."""
    folder.mkdir()
    total = 0.0
    for seed in range(count):
        film = random_footage(
            9000 + seed, max(1, round(seconds / 3)), height=height, width=height * 16 // 9 // 2 * 2
        )
        write_footage(film, folder / f"{seed}.mp4")
        total += film.shots[-1][1]
    return total


def stages(folder: Path, seconds: float, work: Path) -> list[str]:
    """A line for each stage that looks at rows alone: results, core seconds each, times realtime."""
    out = work / "stages"
    prepare(
        [
            f"input={folder}",
            f"output={out}",
            "workers=1",
            "caption.by=template",
            "caption.template={camera}",
        ]
    )
    stored = read_json(out / "prep" / SETTINGS_FILE) or {}
    named = stages_of()
    lines = [
        "| stage | rows | core seconds a row | footage, times realtime per core |",
        "|---|---|---|---|",
    ]
    for one in bound_stages(named, parse([], named, stored), Workspace(out)):
        rows, spent = one.ledger.work() if not one.stage.whole else (0, 0.0)
        if rows and spent:
            lines.append(
                f"| {one.stage.name} | {rows} | {spent / rows:.3f} | {seconds / spent:.1f} |"
            )
    return lines


def workers(folder: Path, work: Path, turns: int = 2) -> list[str]:
    """How much faster two workers are than one, the commands whole, in turns."""
    spent: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(turns):
        for count in (1, 2):
            began = time.perf_counter()
            prepare(
                [
                    f"input={folder}",
                    f"output={work / f'workers-{turn}-{count}'}",
                    f"workers={count}",
                    "until=score",
                ]
            )
            spent[count].append(time.perf_counter() - began)
    ratios = [one / two for one, two in zip(spent[1], spent[2], strict=True)]
    told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return [f"two workers: {statistics.median(ratios):.2f} times as fast as one ({told})"]


def memory(folder: Path, work: Path) -> list[str]:
    """The most resident memory of the worker after the first tenth of an hour of footage and at its end, in MB."""
    film = random_footage(77, 1440, height=72, width=128)
    folder.mkdir()
    write_footage(film, folder / "hour.mp4")
    named = stages_of()
    given = [
        f"input={folder}",
        f"output={work / 'hour'}",
        "workers=1",
        "until=scenes",
        "scenes.detector=difference",
    ]
    settings = parse(given, named)
    samples: list[int] = []
    done = threading.Event()

    def watch() -> None:
        import psutil

        while not done.wait(0.1):
            children = psutil.Process(os.getpid()).children(recursive=True)
            samples.append(max((child.memory_info().rss for child in children), default=0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with engine_of(settings) as engine:
        run(named, settings, engine, lambda line: None)
    done.set()
    watcher.join()
    first, whole = max(samples[: len(samples) // 10]), max(samples)
    minutes = film.shots[-1][1] / 60
    return [
        f"{minutes:.0f} minutes: {first / 1e6:.0f} MB at most in the first tenth, {whole / 1e6:.0f} MB in all"
    ]


def cuts(folder: Path, count: int, seconds: float, height: int, work: Path) -> list[str]:
    """Precision and recall of hard cuts, and frames a core second, of each detector."""
    import pyarrow.parquet as pq

    lines = [
        "| detector | hard cuts: precision | recall | frames a core second |",
        "|---|---|---|---|",
    ]
    for name in DETECTORS:
        out = work / f"cuts-{name}"
        prepare(
            [
                f"input={folder}",
                f"output={out}",
                "workers=1",
                "until=scenes",
                f"scenes.detector={name}",
            ]
        )
        ledger = _ledger(out, "scenes")
        rows = [
            row
            for path in ledger.folder.glob("*.parquet")
            for row in pq.read_table(path).to_pylist()
        ]
        found = sum(one["kind"] == "cut" for row in rows for one in row["transitions"])
        truth, hits, frames = 0, 0, 0
        placed = ledger_rows(out)
        for seed in range(count):
            film = random_footage(
                9000 + seed,
                max(1, round(seconds / 3)),
                height=height,
                width=height * 16 // 9 // 2 * 2,
            )
            wanted = [begin for begin, _, kind in film.transitions if kind == "cut"]
            given = [one["begin"] for one in placed[f"{seed}.mp4"] if one["kind"] == "cut"]
            hits += sum(
                any(abs(a - b) * film.fps < ALLOWED_FRAMES + 0.5 for b in given) for a in wanted
            )
            truth += len(wanted)
            frames += round(film.shots[-1][1] * film.fps)
        spent = ledger.work()[1]
        lines.append(
            f"| {name} | {hits / max(1, found):.3f} | {hits / max(1, truth):.3f} | {frames / spent:.0f} |"
        )
    return lines


def ledger_rows(out: Path) -> dict[str, list[dict]]:
    """The transitions of each source of a run until `scenes`."""
    stored = read_json(out / "prep" / SETTINGS_FILE) or {}
    named = stages_of()
    settings = parse([], named, stored)
    tables = {}
    with engine_of(settings) as engine:
        rows = run(named, settings, engine, lambda line: None)
    for row in rows.to_pylist():
        tables.setdefault(row["key"], []).extend(row["transitions"] or [])
    return tables


def _ledger(out: Path, stage: str):
    named = stages_of()
    stored = read_json(out / "prep" / SETTINGS_FILE) or {}
    bound = bound_stages(named, parse([], named, stored), Workspace(out))
    return next(one.ledger for one in bound if one.stage.name == stage)


NEMO = """
import json, resource, subprocess, sys
from pathlib import Path

from nemo_curator.stages.video.clipping.clip_extraction_stages import FixedStrideExtractorStage
from nemo_curator.stages.video.filtering.motion_filter import MotionFilterStage, MotionVectorDecodeStage
from nemo_curator.stages.video.io.video_reader import VideoReaderStage
from nemo_curator.tasks import FileGroupTask


class X264:
    # Its transcoding takes h264_nvenc, libopenh264 or VP9, of which distributions ship the last alone, and VP9 has no
    # motion vectors: so the clips are made by FFmpeg's x264, as ours are.
    def process(self, task):
        for clip in task.data.clips:
            begin, end = clip.span
            command = ["ffmpeg", "-v", "error", "-threads", "1", "-ss", str(begin), "-i", str(task.data.input_video),
                       "-t", str(end - begin), "-an", "-c:v", "libx264", "-preset", "veryfast", "-crf", "18",
                       "-threads", "1", "-movflags", "frag_keyframe+empty_moov", "-f", "mp4", "-"]
            clip.buffer = subprocess.run(command, check=True, capture_output=True).stdout
        return task


def spent_so_far():
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


stages = [VideoReaderStage(input_path=sys.argv[1]),
          FixedStrideExtractorStage(clip_len_s=5.0, clip_stride_s=5.0, min_clip_length_s=2.0, limit_clips=0),
          X264(), MotionVectorDecodeStage(num_cpus_per_worker=1.0), MotionFilterStage(score_only=True)]
spent = {}
for path in sorted(Path(sys.argv[1]).glob("*.mp4")):
    task = FileGroupTask(dataset_name="films", data=[str(path)])
    for stage in stages:
        began = spent_so_far()
        task = stage.process(task)
        task = task[0] if isinstance(task, list) else task
        name = type(stage).__name__
        spent[name] = spent.get(name, 0.0) + spent_so_far() - began
    assert any(clip.motion_score_global_mean for clip in task.data.clips), "no clip has a motion score"
print(json.dumps(spent))
"""


def nemo(folder: Path, seconds: float, python: str) -> list[str]:
    """NeMo Curator's stages that run on a CPU, on the same films: core seconds of their process."""
    if not python:
        return [
            "not measured: give --nemo the interpreter of an environment with nemo-curator[video_cpu]"
        ]
    done = subprocess.run(
        [python, "-c", NEMO, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return [f"NeMo Curator does not run here: {last[:300]}"]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    lines = [
        "| stage of NeMo Curator | core seconds | footage, times realtime per core |",
        "|---|---|---|",
    ]
    return lines + [
        f"| {name} | {spent:.2f} | {seconds / max(spent, 1e-9):.1f} |"
        for name, spent in told.items()
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--films", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--nemo", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/prep.md"))
    given = parser.parse_args(arguments)
    chosen = given.only.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        seconds = films(work / "films", given.films, given.seconds, given.height)
        parts: dict[str, Callable[[], list[str]]] = {
            "stages": lambda: stages(work / "films", seconds, work),
            "workers": lambda: workers(work / "films", work),
            "memory": lambda: memory(work / "long", work),
            "cuts": lambda: cuts(work / "films", given.films, given.seconds, given.height, work),
            "nemo": lambda: nemo(work / "films", seconds, given.nemo),
        }
        lines = [
            "# Preparing footage", "",
            f"`python -m benchmarks.prep {' '.join(arguments)}`, commit {commit() or 'unknown'}, {cpu_model()}, "
            f"{len(os.sched_getaffinity(0))} cores. {given.films} films, {seconds:.0f} s in all, "
            f"{given.height} lines high.",
        ]  # fmt: skip
        for part in chosen:
            lines += ["", f"## {part}", "", *parts[part]()]
            # As they come: a later part may be cut off.
            write_atomically(given.out, "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

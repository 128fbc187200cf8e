"""VBench, run in an environment of its own: its packages and this one's cannot be installed together."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_train.base.files import write_atomically
from sora_train.errors import Fault, UserError

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""Those that VBench can judge of clips which are not its own prompts'."""
PROGRAM = "from vbench.cli.vbench import main; main()"
"""What its command `vbench` runs."""
RESULTS = "_eval_results.json"


def vbench(clips: Path, python: Path, dimensions: Sequence[str], out: Path) -> dict[str, float]:
    """Each dimension's score of the clips of a folder, also written to `out` as JSON.

    Weights are looked for in VBENCH_CACHE_DIR, which the environment passes on.

    Raises:
        UserError: no clips, no such interpreter, or a dimension that VBench does not judge of other prompts' clips.
        Fault: VBench failed, or wrote no score.
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise UserError(
            f"--dimension {unknown[0]} is none that VBench judges of clips of other prompts; choose among "
            f"{', '.join(DIMENSIONS)}"
        )
    if not python.is_file() or not os.access(python, os.X_OK):
        raise UserError(
            f"--python {python} is no interpreter; give bin/python of the environment that VBench is installed in"
        )
    if not clips.is_dir() or not any(clips.glob("*.mp4")):
        raise UserError(f"{clips} holds no mp4 files; give a folder of clips")
    scores = {name: _one(clips.resolve(), python, name) for name in dimensions}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps({"clips": str(clips), "scores": scores}, indent=1))
    return scores


def _one(clips: Path, python: Path, dimension: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        # Links, since VBench takes every file of a folder for a video.
        videos, results = Path(folder) / "videos", Path(folder) / "results"
        videos.mkdir()
        for clip in sorted(clips.glob("*.mp4")):
            (videos / clip.name).symlink_to(clip)
        command = [os.path.abspath(python), "-c", PROGRAM, "evaluate", "--videos_path", str(videos)]
        command += ["--dimension", dimension, "--mode", "custom_input"]
        done = subprocess.run(
            [*command, "--output_path", str(results)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
            raise Fault(
                f"VBench failed on {dimension} (exit {done.returncode}): {last[0]}; try the environment of --python "
                "by hand, and see that VBENCH_CACHE_DIR holds its weights"
            )
        return _score(results, dimension)


def _score(results: Path, dimension: str) -> float:
    """The score in VBench's `..._eval_results.json`: {dimension: [score, [...]]}."""
    for path in sorted(results.glob(f"*{RESULTS}")):
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            return float(found[dimension][0])
        except (ValueError, TypeError, KeyError, IndexError):
            break
    raise Fault(
        f"VBench ended without a score of {dimension} in a file *{RESULTS}; its version may write another one"
    )

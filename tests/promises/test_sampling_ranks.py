"""Promise 1 for sampling: clips over several processes are those of one, however the work is spread.

The reference is one process: latents in float64, decoded pixels bit for bit. `tests/mutants/areas/sampling.yaml` holds
what was broken on purpose.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses

from sora_train.cli import run
from sora_train.config.sections.model import ModelConfig
from sora_train.errors import UserError
from sora_train.sampling.ranks.layout import AXES, Layout, check_context, layout_of

WORKER = Path(__file__).with_name("sampling_worker.py")
EXACT = 1e-12


def launch(folder: Path, run: Path, size: int) -> Path:
    command = [sys.executable, str(WORKER), str(folder), str(run), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    said = "\n".join(file.read_text()[-1500:] for file in sorted(folder.glob("measure-*")))
    assert (folder / f"found-{size}.json").is_file(), done.stderr[-1500:] + said
    return folder


def require_one_process(folder: Path, size: int) -> None:
    found = json.loads((folder / f"found-{size}.json").read_text())
    decoding = found.pop("decoding")
    for layout, numbers in found.items():
        assert numbers.pop("clips apart") <= 1, layout
        for name, value in numbers.items():
            assert value <= (0 if name.endswith("apart") else EXACT), f"{layout}: {name}"
    for name, value in decoding.items():
        if frames := re.fullmatch(r"latent frames decoded of (\d+) frames, tiles of 0", name):
            # Each its share, and the first one on all of them.
            assert value == 1 + -(-(int(frames[1]) - 1) // size), name
        elif not name.startswith("latent frames"):
            assert value == 0, name


def require_one_voice(folder: Path, size: int) -> None:
    """One sentence of all that the processes say, and no exit code of 0 among those that failed."""
    names = [path.name for path in (folder / f"clips-{size}").iterdir()]
    assert sorted(names) == ["000.mp4", "001.mp4", "contact_sheet.png", "prompts.json"]
    for task, told, teller in (
        ("sample", "", None),
        ("refuse", "is for 3 processes", None),
        ("fail", "rank 1 holds a bad file", 1),
        ("vanish", "failed or was killed", None),
    ):
        said = [(folder / f"{task}-{size}.{rank}").read_text() for rank in range(size)]
        errors = [line for text in said for line in text.splitlines() if line.startswith("error:")]
        assert len(errors) == bool(told) and all(told in line for line in errors), (task, said)
        assert teller is None or "error:" in said[teller]
        exits = [re.search(r"exit (\d+)", text) for text in said]
        codes = [None if code is None else int(code[1]) for code in exits]
        assert all(bool(code) == bool(told) for code in codes if code is not None), (task, codes)
    paths = [(folder / f"sample-{size}.{rank}").read_text().count(".mp4") for rank in range(size)]
    assert paths == [2] + [0] * (size - 1)


def require_same_long_videos(folder: Path, run_dir: Path, size: int) -> None:
    """Of two prompts, made apart by two teams and together by one, beside those of one process."""
    command = ["sample", "--ckpt", str(run_dir), "--prompt", "a", "--prompt", "b", "--steps", "2"]
    assert run([*command, "--seconds", "3", "--out", str(folder / "alone")]) == 0
    for task in ("long", "long_shared"):
        made = folder / f"{task}-{size}"
        assert sorted(path.name for path in made.iterdir()) == [
            "000.mp4",
            "001.mp4",
            "prompts.json",
        ]
        for name in ("000.mp4", "001.mp4"):
            one, several = (read_all(path / name) for path in (folder / "alone", made))
            assert len(one) == 24 and np.abs(one.astype(int) - several).mean() < 0.05, task


def read_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.mark.timeout(600)
def test_two_processes_are_one(finished_run: Path, tmp_path: Path) -> None:
    launch(tmp_path, finished_run, 2)
    require_one_process(tmp_path, 2)
    require_one_voice(tmp_path, 2)
    require_same_long_videos(tmp_path, finished_run, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_processes_are_one(finished_run: Path, tmp_path: Path) -> None:
    launch(tmp_path, finished_run, 4)
    require_one_process(tmp_path, 4)
    require_one_voice(tmp_path, 4)
    require_same_long_videos(tmp_path, finished_run, 4)


@given(size=st.integers(1, 48), clips=st.integers(1, 20), views=st.integers(1, 3))
def test_what_is_chosen_uses_all_processes(size: int, clips: int, views: int) -> None:
    """Every process has something to do; and what is chosen can be asked for."""
    layout = layout_of("auto", size, clips, views, batch=16)
    assert layout.prompts * layout.guidance * layout.context == size
    assert layout.prompts <= clips and layout.guidance <= views
    assert layout_of(str(layout), size, clips, views, batch=16) == layout
    degrees = layout.degrees(num_heads=12)
    assert degrees.cp == layout.context and 12 % degrees.ulysses == 0
    for axis in AXES:
        part = f"{axis}={getattr(layout, axis)}"
        assert getattr(layout_of(part, size, clips, views, 16), axis) == getattr(layout, axis)


def test_prompts_come_first_then_guidance_then_context() -> None:
    assert layout_of("auto", 8, 2, 2, 16) == Layout(prompts=2, guidance=2, context=2)
    assert layout_of("auto", 8, 1, 2, 16) == Layout(guidance=2, context=4)
    assert layout_of("context=4", 8, 9, 2, 16) == Layout(prompts=2, context=4)
    assert layout_of("guidance=6,prompts=1", 6, 2, 3, 16) == Layout(guidance=6)


@pytest.mark.parametrize(
    ("text", "size", "said"),
    [
        ("prompts=2,guidance=2,context=3", 8, ["12 processes", "8 are running"]),
        ("prompts=3", 8, ["prompts=3"]),
        ("context=2", 1, ["2 processes", "1 is running", "torchrun"]),
        ("prompts=8", 8, ["5 to make", "prompts=5"]),
        ("guidance=8,prompts=5", 40, ["2 (2 a clip)", "guidance=2"]),
        ("context", 8, ["'context'", "prompts, guidance, context"]),
        ("tensor=2", 8, ["'tensor=2'"]),
        ("context=2,context=2", 8, ["'context=2'", "once"]),
        ("context=0", 8, ["'context=0'"]),
        ("context=²", 8, ["'context=²'"]),
    ],
)
def test_what_cannot_be_is_told(text: str, size: int, said: list[str]) -> None:
    with refuses(UserError, "--parallel", *said):
        layout_of(text, size, clips=5, views=2, batch=16)


def test_a_ring_needs_attention_in_parts() -> None:
    cfg = ModelConfig(num_heads=2, attention="flash3")
    check_context(Layout(context=2), cfg)
    with refuses(UserError, "context=4", "model.attention=flash3", "context=2"):
        check_context(Layout(context=4), cfg)

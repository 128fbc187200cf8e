"""The README is true: every command on it runs, the long ones in a short form, and every link leads somewhere.

The blocks are walked in the order of the page, in one folder, because later commands look at what earlier ones
made. Nearly all of it happens in this process: starting Python and torch anew for each command would take minutes.
Keys and flags are left as they stand on the page and the short form is appended, so a misspelt one still fails.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_train.cli import run
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import ConfigError, UserError
from sora_train.tools.sweep.local import Runner, Task
from sora_train.train import train

REPO = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md")),
]

SMALL = [
    "model=micro",
    "text=bytes_micro",
    "buckets=micro",
    "data.micro_batch=2",
    "data.num_workers=1",
    "data.shapes_clips=6",
    "data.shapes_val_clips=2",
    "objective.num_steps=1",
    "validation.max_clips=1",
    "sample.max_prompts=1",
    "sample.oracle_prompts=0",
]

SHORT: dict[str, list[str]] = {
    "train experiment=quickstart": [*SMALL, "train.steps=2"],
    "train experiment=tiny_lora": [*SMALL, "train.steps=1"],
    "distill": ["train.steps=1", "sample.every=0"],
    "ckpt export": [],
    "train experiment=real_tiny": [*SMALL, "train.steps=1", "sample.every=0"],
    "train my.yaml": [*SMALL, "train.steps=1", "sample.every=0"],
    "train -m my.yaml": [*SMALL, "dry_run=true"],
    "train my_project/train.py": [*SMALL, "train.steps=1", "sample.every=0"],
    "sample": ["--steps", "1"],
    "eval": ["--num", "1", "--tiers", "a", "--steps", "1"],
    "prep run": [
        "workers=1",
        "scenes.detector=difference",
        "cut.min_seconds=1",
        "score.text=false",
        "filter.keep=frames > 0",
    ],
    "prep status": [],
    "prep shards": ["workers=1"],
    "data index": ["workers=1"],
    "data show": [],
    "ckpt ls": [],
    "ckpt verify": [],
    "config show": [],
    "config explain": [],
    "config diff": [],
    "init": [],
    "plan": ["plan.counted=0"],
    "fetch": [],
    "launch": ["--print"],
    "serve": ["--settings"],
    "watch": [],
    "bench all": ["--toy", "--only", "sampling"],
    "doctor experiment=quickstart": ["--no-bandwidth"],
    "doctor parity": [
        "--layouts",
        "fsdp x2",
        "--accumulations",
        "1",
        "--optimizers",
        "sgd",
    ],
}
"""How each kind of `sora` command is cut short: what is appended to it. A command of no kind here is a failure."""

MAKE_RUNS = {
    "test": "pytest",
    "test-all": "pytest",
    "test-slurm": "pytest",
    "test-serve": "pytest",
    "lint": "ruff",
}
"""Targets that are looked at with `make -n` alone, since running them would run this test: what they must call."""


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of each code block, in order."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def readme() -> str:
    return (REPO / "README.md").read_text(encoding="utf-8")


# --- the ways a command is treated ---


def treat(command: str) -> None:
    """Run one command of the README in its short form; fails for a command of an unknown kind."""
    words = shlex.split(command)
    if words[0] == "make":
        make(words)
    elif words[0] in ("sora", ".venv/bin/sora"):
        sora(words[1:])
    elif words[0] == "torchrun":
        torchrun_composes(words[1:])
    elif command == "source .venv/bin/activate":
        assert "VENV := .venv\n" in (REPO / "Makefile").read_text(), (
            "make puts its environment elsewhere"
        )
    else:
        pytest.fail(
            f"README: `{command}` is of no kind that {Path(__file__).name} knows how to run"
        )


def sora(words: list[str]) -> None:
    kinds = [kind for kind in SHORT if words[: len(kind.split())] == kind.split()]
    if not kinds:
        pytest.fail(f"README: say in SHORT how `sora {' '.join(words)}` is cut short")
    code = exit_code([*words, *SHORT[kinds[0]]])
    # The doctor ends with 1 where something of this machine would stop a job.
    assert code == 0 or (kinds[0].startswith("doctor experiment") and code == 1), (
        f"`sora {' '.join(words)}` ends with exit code {code}"
    )


def exit_code(words: list[str]) -> int:
    """Of the real command, run in this process."""
    try:
        return run(words)
    except SystemExit as end:  # a project's own file ends so
        return int(end.code or 0)


def make(words: list[str]) -> None:
    (target,) = words[1:]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
    }
    told = subprocess.run(
        ["make", "-n", target],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    if target in MAKE_RUNS:
        assert MAKE_RUNS[target] in told.stdout
        return
    started = [line for line in told.stdout.splitlines() if line.startswith(".venv/bin/sora ")]
    assert started, f"`make {target}` starts no sora command; say in MAKE_RUNS what it is for"
    for line in started:
        treat(line)


def torchrun_composes(words: list[str]) -> None:
    """The short form of torchrun: its flags parse and its job's config composes. The slow test below starts it."""
    from torch.distributed.run import get_args_parser

    job = get_args_parser().parse_args(words)
    overrides = [
        argument for argument in job.training_script_args if not argument.endswith(".yaml")
    ]
    files = [Path(argument) for argument in job.training_script_args if argument.endswith(".yaml")]
    config_cls = Config
    if job.module:
        assert job.training_script == "sora_train.train"
    else:
        config_cls = runpy.run_path(job.training_script, run_name="project")["MyConfig"]
    compose(overrides, config_cls=config_cls, yaml_file=files[0] if files else None)


# --- what the commands find around them ---


def write_clips(folder: Path) -> None:
    folder.mkdir()
    rows = []
    for number in range(6):
        frames = np.full((5, 32, 32, 3), 40 * number, np.uint8)
        name = f"{number}.mp4" if number % 2 else f"{number}.png"
        if number % 2:
            encode_h264(frames, 8, folder / name)
        else:
            Image.fromarray(frames[0]).save(folder / name)
        rows.append(json.dumps({"file": name, "caption": f"grey number {number}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))


def write_footage(folder: Path) -> None:
    """Films in which a ramp of grey moves, each with its caption."""
    folder.mkdir()
    for number in range(3):
        ramp = (np.arange(64)[None] * (2 + number) + np.arange(24)[:, None] * 5)[
            :, None, :, None
        ] % 256
        frames = np.broadcast_to(ramp, (24, 48, 64, 3)).astype(np.uint8)
        encode_h264(np.ascontiguousarray(frames), 8, folder / f"film-{number}.mp4")
        (folder / f"film-{number}.txt").write_text(f"a ramp of grey, number {number}")


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README supposes: clips in my_clips and my_footage, prompts in prompts.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # a project's own file sets these two
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_clips(tmp_path / "my_clips")
    write_footage(tmp_path / "my_footage")
    (tmp_path / "prompts.txt").write_text("red circle moves left\n")
    return tmp_path


@pytest.fixture
def first_job_only(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Sweeps run their first job here and only count the others; all of them were composed before."""
    started: list[list[str]] = []

    def run(runner: Runner, task: Task) -> int:
        assert task.command[1:3] == ["-m", "sora_train.train"]
        started.append(task.command)
        return train(None, Config, task.command[3:]) if len(started) == 1 else 0

    monkeypatch.setattr(Runner, "run", run)
    return started


# --- the tests ---


@pytest.mark.timeout(600)
def test_every_command_runs(newcomer: Path, first_job_only: list[list[str]]) -> None:
    met = set()
    for language, text in blocks(readme()):
        met.add(language)
        if language == "bash":
            for command in commands(text):
                print(f"$ {command}", flush=True)
                treat(command)
        elif language == "yaml":
            (newcomer / "my.yaml").write_text(text)
        elif language == "python":
            exec(compile(text, "README.md", "exec"), {})
        else:
            assert language == "", f"README: no test for a block of {language}"
    assert met == {"bash", "yaml", "python", ""}
    assert len(first_job_only) == 4
    for made in ("report.html", "summary.json", "metrics.jsonl", "config.yaml", "run.json", "lock"):
        assert (newcomer / "runs/quickstart" / made).is_file()
    assert list((newcomer / "runs/quickstart/samples").glob("step-*/*.mp4"))
    assert list((newcomer / "samples/star").glob("*.mp4"))


@pytest.mark.slow
def test_torchrun_commands_run_on_their_ranks(newcomer: Path) -> None:
    sora(["init", "my_project"])
    for text in (text for language, text in blocks(readme()) if language == "bash"):
        for command in commands(text):
            if command.startswith("torchrun "):
                words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)[1:]]
                cut = [*SMALL, "train.steps=1", "sample.every=0", "train.micro_batches=2"]
                done = subprocess.run([*words, *cut], capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize(
    "command",
    [
        "docker run sora_train",
        "sora trian experiment=quickstart",
        "sora deploy runs/quickstart",
        "sora train experiment=another_one",
        "make nothing",
    ],
)
def test_a_command_of_an_unknown_kind_fails(command: str, newcomer: Path) -> None:
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        treat(command)


@pytest.mark.parametrize(
    "command",
    [
        "sora train experiment=quickstart train.stepz=3",
        "sora config show experiment=quickstrat",
        "sora sample --ckpt runs/x --promt hello",
        "torchrun --standalone -m sora_train.train experiment=quickstart optim.lrr=1",
    ],
)
def test_a_misspelt_key_or_flag_fails(command: str, newcomer: Path) -> None:
    with pytest.raises((ConfigError, UserError)):
        treat(command)


def test_a_misspelt_flag_of_torchrun_fails(newcomer: Path) -> None:
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        treat("torchrun --standalonee -m sora_train.train experiment=quickstart")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    local = [target.split("#")[0] for target in targets if not target.startswith(("http", "#"))]
    lost = [target for target in local if not ((REPO / page).parent / target).exists()]
    assert not lost, f"{page} points at what is not there: {lost}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_are_there(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (REPO / page).read_text(), flags=re.MULTILINE))
    assert named <= targets, f"{page} speaks of {sorted(named - targets)}"


def test_the_tree_is_the_tree() -> None:
    (tree,) = [text for language, text in blocks(readme()) if not language]
    folder = Path()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = Path(name) if not line.startswith(" ") else folder
        path = folder if not line.startswith(" ") else folder / name
        assert list(REPO.glob(str(path))), f"README: there is no {path}"


def test_no_number_is_left_open() -> None:
    assert "TBD" not in readme()

"""The command line: instant help, one sentence a mistake, the right exit code, projects of one's own."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from sentences import refuses, says

from sora_train.cli import run
from sora_train.config.compose import compose
from sora_train.errors import ConfigError, Fault, UserError, run_command
from sora_train.tools.config.project import create

REPO = Path(__file__).resolve().parents[2]


def command(
    *arguments: str, cwd: Path = REPO, **environment: str
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# --- help ---


def test_help_answers_in_under_a_second():
    command("-m", "sora_train", "--help")  # bytecode is written once
    times = []
    for _ in range(3):
        start = time.monotonic()
        done = command("-m", "sora_train", "--help")
        times.append(time.monotonic() - start)
        assert done.returncode == 0 and "train" in done.stdout
    assert min(times) < 1.0


HELPED = [
    "train",
    "sample",
    "distill",
    "prep shards",
    "data index",
    "data show",
    "ckpt ls",
    "ckpt inspect",
    "ckpt verify",
    "ckpt diff",
    "ckpt average",
    "ckpt prune",
    "config show",
]
HELPED += ["config diff", "config explain", "bench train", "bench data", "init", "report"]
HELPED += ["data report"]


@pytest.mark.parametrize("name", HELPED)
def test_every_command_teaches_by_example(name: str, capsys: pytest.CaptureFixture[str]):
    assert run([*name.split(), "--help"]) == 0
    assert f"\n  sora {name}" in capsys.readouterr().out


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]):
    assert run([]) == 0
    assert "Commands:" in capsys.readouterr().out


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["trian"], ("'train', 'track'", "sora --help")),
        (["train", "experiment=quikstart"], ("quickstart",)),
        (["train", "train.step=3"], ("train.steps",)),
        (["train", "missing.yaml"], ("missing.yaml",)),
        (["train", "missing.py"], ("sora init NAME", "NAME/train.py")),
        (["train", "--frobnicate"], ("cannot read '--frobnicate'",)),
        (["train", "experiment=real_tiny"], ("data.source", "empty")),
        (["sample", "--prompt", "x"], ("--ckpt", "sora sample --help")),
        (["sample", "--ckpt", "runs/a"], ("no prompt",)),
        (["sample", "--ckpt", "runs/a", "--size", "64"], ("--size", "'64'", "WIDTHxHEIGHT")),
        (
            ["sample", "--ckpt", "runs/a@x", "--prompt", "x"],
            ("number", "runs/a@500"),
        ),
        (
            ["sample", "--ckpt", "a", "--prompts", "none.txt"],
            ("--prompts none.txt", "cannot be read"),
        ),
        (["prep"], ("sora prep --help",)),
        (["prep", "shards", "inptu=x"], ("inptu", "input")),
        (["prep", "shards", "input=x"], ("output", "no value")),
        (["data", "index", "source=nowhere"], ("nowhere", "does not exist")),
        (["ckpt", "ls", "nowhere"], ("nowhere",)),
        (["config", "explain", "data.cahce"], ("data.cache",)),
        (["config", "diff", "quickstart", "b"], ("experiment=quickstart",)),
        (["report", "nowhere"], ("nowhere", "run folder")),
    ],
)
def test_mistakes_of_the_user(
    arguments: list[str],
    facts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SORA_DEBUG", raising=False)
    assert run_command(lambda: run(arguments)) == 2
    stderr = capsys.readouterr().err
    says(stderr, *facts)
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def raising(error: BaseException):
    def fail() -> int:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("a; b"), 2, ("error: a; b\n",)),
        (ConfigError("a\nb"), 2, ("error: a\nerror: b\n",)),
        (Fault("a"), 1, ("error: a\n",)),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            ("error: ", "disk", "/x/y", "free"),
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            1,
            ("error: ", "Permission denied", "/x", "path"),
        ),
        (MemoryError(), 1, ("error: ", "memory")),
        (
            ZeroDivisionError("a\nb"),
            1,
            ("error: ", "ZeroDivisionError: a b", "SORA_DEBUG=1"),
        ),
        (KeyboardInterrupt(), 130, ("interrupted\n",)),
    ],
)
def test_exit_codes_and_sentences(
    error: BaseException,
    code: int,
    told: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("SORA_DEBUG", raising=False)
    assert run_command(raising(error)) == code
    begins, *facts = told
    printed = capsys.readouterr().err
    assert printed.startswith(begins)
    for fact in facts:
        says(printed, fact)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SORA_DEBUG", "1")
    with pytest.raises(UserError):
        run_command(raising(UserError("a")))


def test_the_module_under_torchrun_tells_the_same():
    done = command("-m", "sora_train.train", "train.step=3", SORA_DEBUG="0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    says(done.stderr, "train.step", "train.steps")


def test_a_closed_pipe_is_no_traceback():
    shell = f"{sys.executable} -m sora_train config show experiment=quickstart | true"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


# --- data ---


def test_clips_go_into_shards_and_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 24), (200, 0, 0)).save(clips / f"{name}.png")
    (clips / "c.png").write_bytes(b"no picture")
    (clips / "captions.jsonl").write_text(
        "".join(f'{{"file": "{name}.png", "caption": "red {name}"}}\n' for name in "abc")
    )
    shards = tmp_path / "shards"
    assert run(["prep", "shards", f"input={clips}", f"output={shards}", "workers=1"]) == 0
    assert "3 clips = 2 usable + 1 dropped" in capsys.readouterr().out
    assert run(["data", "show", f"source={shards}", f"work_dir={tmp_path / 'index'}"]) == 0
    listed = capsys.readouterr().out
    assert "32x24" in listed and "red a" in listed and "unreadable" in listed


# --- projects of one's own ---


def test_init_writes_a_project_whose_files_compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    told = create(Path("my_project"))
    assert "sora train my_project/train.py my_project/my.yaml" in told
    config = compose([], yaml_file=Path("my_project/my.yaml")).config
    assert config.name == "my_project" and config.run.dir == "runs/my_project"
    lines = [line for line in Path("my_project/train.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 15
    compile(Path("my_project/train.py").read_text(), "train.py", "exec")
    with pytest.raises(UserError, match="exists already"):
        create(Path("my_project"))
    with refuses(UserError, "no name"):
        create(Path("my project"))

"""`sora sample --seconds` as a user gives it: killed and given again, and refused in a sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sentences import refuses

from sora_train.cli import run as cli_run
from sora_train.errors import UserError


def command(run: Path, out: Path, *more: str) -> list[str]:
    asked = ["--ckpt", str(run), "--prompt", "a red ring", "--out", str(out)]
    return ["sample", *asked, "--frames", "9", "--steps", "1", *more]


@pytest.mark.slow
def test_a_killed_command_given_again_makes_the_same_file(finished_run: Path, tmp_path: Path):
    """SIGKILL after some windows: what is there is kept, and the file has the bytes it would have had."""
    asked = "--seconds", "6"
    assert cli_run(command(finished_run, tmp_path / "whole", *asked)) == 0
    out = tmp_path / "killed"
    words = [sys.executable, "-m", "sora_train", *command(finished_run, out, *asked)]
    process = subprocess.Popen(words)
    deadline = time.monotonic() + 120
    while len(list(out.glob(".unfinished-*/*.npy"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "000.mp4").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob(".unfinished-*/*.npy")}
    assert len(kept) >= 3
    subprocess.run(words, check=True)
    assert (out / "000.mp4").read_bytes() == (tmp_path / "whole" / "000.mp4").read_bytes()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--anchor-fps", "1"], ("--anchor-fps 1", "--seconds")),
        (["--smooth-fps", "24"], ("--smooth-fps 24", "--seconds")),
        (["--seconds", "-3"], ("--seconds is -3",)),
        (["--seconds", "6", "--smooth-fps", "2"], ("--smooth-fps 2", "higher rate")),
        (["--seconds", "6", "--size", "33x32"], ("--size 33x32", "multiples")),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(finished_run: Path, tmp_path: Path, flags, facts):
    with refuses(UserError, *facts):
        cli_run(command(finished_run, tmp_path, *flags))
    assert not list(tmp_path.iterdir())

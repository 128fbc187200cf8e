"""Whatever a tracker's process does, the run ends on time, says so once, and exits with 0."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sentences import refuses, says

from sora_train.cli import run as cli_run
from sora_train.config.sections.outputs import TrackerConfig
from sora_train.monitoring.tracking import process as tracking
from sora_train.monitoring.tracking.process import start_tracker

TRACKED = TrackerConfig(kind="wandb", finish_seconds=0.5)

TROUBLE = {
    "never ends": ("import time; time.sleep(600)", "did not finish in 0.5 s"),
    "ignores signals": (
        "import signal, time\n"
        "for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(name, signal.SIG_IGN)\n"
        "while True: time.sleep(1)",
        "did not finish in 0.5 s",
    ),
    "never lets go": ("while True: pass", "did not finish in 0.5 s"),
    "has a child that never ends": (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])",
        "did not finish in 0.5 s",
    ),
    "dies at once": ("raise SystemExit(7)", "stopped (exit code 7"),
    "dies later": ("import time; time.sleep(0.3); raise SystemExit(8)", "stopped (exit code 8"),
    "is killed": (
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "stopped (exit code -9",
    ),
    "writes garbage and dies": (
        "import os; os.write(1, os.urandom(100_000)); raise SystemExit(9)",
        "stopped (exit code 9",
    ),
}


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    command = [sys.executable, "-S", "-c", code]
    monkeypatch.setattr(tracking, "tracker_command", lambda cfg, run_dir, kind: command)


def wait_for(there: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def living(group: int) -> list[str]:
    """The processes of a group, those left out that only wait for somebody to learn of their end."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(its_group) == group and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_bad_tracker_is_told_of_once_and_ended_on_time(
    trouble: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    code, expected = TROUBLE[trouble]
    stand_in(monkeypatch, code)
    trackers = start_tracker(TRACKED, tmp_path)
    process = trackers.trackers[0]._process
    assert process is not None
    if "stopped" in expected:
        wait_for(lambda: process.poll() is not None)
        time.sleep(0.2)  # the watching thread says it
    began = time.monotonic()
    trackers.finish()
    assert time.monotonic() - began < 4
    time.sleep(0.2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and expected in said[0]
    says(said[0], "metrics.jsonl", "complete")
    assert "`sora track replay " in said[0]
    assert process.poll() is not None
    wait_for(lambda: not living(process.pid))
    assert not tracking.stop_file(tmp_path, "wandb").exists()


def test_several_bad_trackers_share_one_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stand_in(monkeypatch, TROUBLE["ignores signals"][0])
    trackers = start_tracker(
        TRACKED.model_copy(update={"kind": ("wandb", "tensorboard")}), tmp_path
    )
    began = time.monotonic()
    trackers.finish()
    assert time.monotonic() - began < 2
    said = capsys.readouterr().err
    assert "tracker wandb did" in said and "tracker tensorboard did" in said


def test_a_preempted_run_waits_for_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sign = tracking.stop_file(tmp_path, "wandb")
    stand_in(
        monkeypatch, f"import os, time\nwhile not os.path.exists({str(sign)!r}): time.sleep(0.01)"
    )
    trackers = start_tracker(TRACKED, tmp_path)
    process = trackers.trackers[0]._process
    began = time.monotonic()
    trackers.detach()
    trackers.finish()
    assert time.monotonic() - began < 0.45
    wait_for(lambda: process is not None and process.poll() == 0)


def test_a_tracker_that_talks_without_end_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(tracking, "MAX_LOG_BYTES", 1 << 20)
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.05)
    stand_in(monkeypatch, "import time\nwhile True: print('x' * 8000); time.sleep(0.0005)")
    tracker = start_tracker(TRACKED, tmp_path).trackers[0]
    wait_for(lambda: tracker._process is not None and tracker._process.poll() is not None)
    time.sleep(0.1)
    says(capsys.readouterr().err, "ended", "1 MiB")


def test_a_tracker_that_cannot_start_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(tracking, "tracker_command", lambda *_: ["/no/such/program"])
    start_tracker(TRACKED, tmp_path).finish()
    assert "could not start" in capsys.readouterr().err


def test_a_run_folder_that_takes_no_log_does_not_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tracking.log_file(tmp_path, "wandb").mkdir(parents=True)
    start_tracker(TRACKED, tmp_path).finish()
    assert "could not start" in capsys.readouterr().err


BLOCKED = """
import sys, time
from pathlib import Path
from sora_train.monitoring.tracking import feed as tracking_feed
def blocked(job): time.sleep(600)
tracking_feed.open_sink = blocked
tracking_feed.GRACE_SECONDS = 0
tracking_feed.follow(tracking_feed.FeedRequest(Path(sys.argv[1]), "wandb", "p", "auto", int(sys.argv[2]), 0.5))
"""


def test_the_process_ends_hard_when_its_run_is_gone_and_the_tracker_hangs(tmp_path: Path):
    parent = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    # Its parent is this test, not `parent`: to it the run is gone from the start.
    feed = subprocess.Popen([sys.executable, "-c", BLOCKED, str(tmp_path), str(parent.pid)])
    try:
        assert feed.wait(20) == -14  # SIGALRM
    finally:
        parent.kill()
        parent.wait()


def test_a_run_that_is_being_fed_is_not_sent_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "metrics.jsonl").write_text("")
    lock = tmp_path / "trackers/tensorboard.lock"
    lock.parent.mkdir()
    hold = f"import fcntl, time; f = open({str(lock)!r}, 'a'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        with refuses(Exception, "tensorboard", "another process"):
            cli_run(["track", "replay", str(tmp_path), "--kind", "tensorboard"])
    finally:
        holder.kill()
        holder.wait()

"""W&B: what stands in its offline file, read back with W&B's own messages, and a server that refuses or is silent.

wandb 0.31 has no reader in Python any more (its core is Go); the file is LevelDB's log of its `Record` messages.
"""

import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from sora_train.config.sections.outputs import TrackerConfig
from sora_train.monitoring.goodput import note_start
from sora_train.monitoring.tracking.feed import Feed
from sora_train.monitoring.tracking.process import start_tracker

BLOCK = 32768


def records(log: Path) -> Iterator[Any]:
    """Every record of a .wandb file: a header of 7 bytes, then blocks of 32 KiB with chunks of records."""
    pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, whole = log.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield pb2.Record.FromString(whole)
            whole = b""


def items(found: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / f"wandb_{name}"))
    return monkeypatch


def make_run(run_dir: Path, rows: int = 3) -> None:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("seed: 3\nmodel: {num_layers: 2}\n")
    note_start(run_dir, 0, 1, time.time())
    note_start(run_dir, 2, 4, time.time())
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            row = {
                "step": step,
                "time": 1.0,
                "train/loss": 1 / step,
                **{f"train/by_t/{i}": 1.0 for i in range(60)},
            }
            file.write(json.dumps(row) + "\n")
    (run_dir / "spikes").mkdir()
    spike = {"step": 2, "reason": "loss_spike", "loss": 9.5}
    (run_dir / "spikes/step-000002.json").write_text(json.dumps(spike))
    folder = run_dir / "samples/step-000003"
    folder.mkdir(parents=True)
    (folder / "prompts.json").write_text('[{"prompt": "a red square", "file": "000.mp4"}]')
    with av.open(str(folder / "000.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8, width=32, height=32, pix_fmt="yuv420p")
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_everything_is_in_the_offline_file(tmp_path: Path, clean: pytest.MonkeyPatch):
    run_dir = tmp_path / "run"
    make_run(run_dir, rows=40)
    tracker = start_tracker(TrackerConfig(kind="wandb", mode="offline"), run_dir)
    tracker.finish_seconds = 120
    tracker.finish()
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    found = list(records(log))
    assert log.stat().st_size > BLOCK, "records that span blocks are part of the test"
    config: dict[str, Any] = {}
    for record in found:
        config |= items(record.run.config.update) | items(record.config.update)
    assert config["seed"] == 3
    assert len(config["code"]["package"]) == 64
    history = [items(record.history.item) for record in found if record.history.item]
    losses = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert losses == {step: 1 / step for step in range(1, 41)}
    assert all(row["train/by_t/59"] == 1.0 for row in history if "train/loss" in row)
    (media,) = [row for row in history if "samples/000/path" in row]
    assert (media["samples/000/caption"], media["step"]) == ("a red square", 3)
    assert media["samples/000/_type"] == "video-file"
    assert list(log.parent.rglob(Path(media["samples/000/path"]).name))
    summary: dict[str, Any] = {}
    for record in found:
        summary |= items(record.summary.update)
    assert summary["train/loss"] == 1 / 40
    alerts = {record.alert.title: record.alert.text for record in found if record.alert.title}
    assert set(alerts) == {"run: restart", "run: spike"}
    assert "step 2 on 4 rank(s)" in alerts["run: restart"] and "9.5" in alerts["run: spike"]


@contextmanager
def server(answers: bool) -> Iterator[str]:
    """A server that refuses every key, or takes the question and says nothing."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if not answers:
                over.wait()
                return
            self.send_response(401)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            return

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        over.set()
        listening.shutdown()


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("refuses", "401"),
        pytest.param("silent", "did not respond", marks=pytest.mark.slow),
        ("short", "40+ characters"),
    ],
)
def test_a_bad_key_or_server_is_one_sentence_and_the_run_is_kept(
    tmp_path: Path,
    clean: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    word: str,
):
    run_dir = tmp_path / "run"
    make_run(run_dir)
    clean.setenv("WANDB_API_KEY", "a" * (8 if kind == "short" else 40))
    with server(answers=kind != "silent") as address:
        clean.setenv("WANDB_BASE_URL", address)
        began = time.monotonic()
        tracker = start_tracker(TrackerConfig(kind="wandb", mode="online"), run_dir)
        assert time.monotonic() - began < 2, "the run does not wait for its tracker"
        tracker.finish_seconds = 120
        tracker.finish()
    said = capfd.readouterr().err
    assert said.count("W&B cannot be used") == 1 and word in said
    assert "wandb login" in said and "sora track replay" in said
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    rows = [items(record.history.item) for record in records(log) if record.history.item]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]


class Bell:
    """Keeps the alerts of a feed."""

    name = "bell"

    def __init__(self) -> None:
        self.rung: list[tuple[int, str, str]] = []

    def confirmed_step(self) -> int:
        return -1

    def config(self, values: dict[str, Any]) -> None:
        return

    def row(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        return

    def samples(self, step: int, clips: list[tuple[Path, str]], sheet: Path | None) -> None:
        return

    def alert(self, step: int, title: str, text: str) -> None:
        self.rung.append((step, title, text))

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        return


def test_an_alert_is_sent_once_and_old_ones_are_not(tmp_path: Path):
    make_run(tmp_path / "run")
    folder = tmp_path / "run"
    bell = Bell()
    feed = Feed(bell, folder)
    feed.push()
    feed.push()
    assert [title for _, title, _ in bell.rung] == ["run: restart", "run: spike"]
    Feed(bell, folder).push()  # of a resumed run: what was told stands in its memory
    assert len(bell.rung) == 2
    (folder / "trackers/bell.json").unlink()
    os.utime(folder / "spikes/step-000002.json", (1.0, 1.0))
    Feed(bell, folder).push()
    assert [title for _, title, _ in bell.rung[2:]] == ["run: restart"]
    for number in (4, 5):
        told = json.dumps({"step": number, "reason": "non_finite", "loss": "nan"})
        (folder / f"spikes/step-{number:06d}.json").write_text(told)
    feed.push()
    assert bell.rung[-1] == (
        5,
        "run: spike",
        "step 5 was skipped: non_finite, loss nan (and 1 more)",
    )
    assert Feed(Bell(), folder, alerts=False).push() == 0

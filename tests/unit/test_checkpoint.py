"""Saving: whole or not there, whatever ends it and wherever; what stays; what is refused before the first step."""

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses, says
from torch import Tensor

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint import saver as saver_module
from sora_train.checkpoint.layout import recover
from sora_train.checkpoint.points import POINTS, VARIABLE
from sora_train.checkpoint.retention import Retention
from sora_train.checkpoint.saver import Saver
from sora_train.checkpoint.space import Space, require_space, space_for
from sora_train.checkpoint.staging import Staging
from sora_train.config.sections.outputs import CheckpointConfig
from sora_train.errors import Fault, UserError
from sora_train.runtime.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors_of(value: float, size: int = 1000) -> dict[str, Tensor]:
    columns = torch.full((4, size), value).t()
    return {"model.w": torch.full((size,), value), "model.t": columns, "optim.w.step": torch.tensor(value)}  # fmt: skip


def a_saver(folder: Path, **values: object) -> Saver:
    return Saver(folder, CheckpointConfig(**values), ALONE, timedelta(seconds=60))


def value_of(found: checkpoints.Checkpoint, size: int = 1000) -> float:
    """The one value that all tensors of a checkpoint have."""
    into = tensors_of(-1.0, size)
    checkpoints.load(found, into, None)
    values = {float(v) for tensor in into.values() for v in tensor.unique()}
    assert len(values) == 1, "torn"
    return values.pop()


def in_children(mode: str, step: int, folders: list[Path], limit: int = 0) -> list[int]:
    """The exit codes of saves into these folders, each in a process of its own; see save_child.py."""
    command = [sys.executable, str(Path(__file__).with_name("save_child.py")), mode, str(step)]
    done = subprocess.run(
        [*command, str(limit), *map(str, folders)],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


# --- killed while saving ---


@pytest.mark.parametrize(
    ("mode", "again"),
    [
        ("async", False),
        ("sync", True),
        pytest.param("sync", False, marks=pytest.mark.slow),
        pytest.param("async", True, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_the_one_before_or_the_new_one_is_whole(
    tmp_path: Path, mode: str, again: bool
) -> None:
    """A save of the next step, and one of the same step, which replaces the only checkpoint there is."""
    seen = []
    step = 1 if again else 2
    folders = [tmp_path / point for point in POINTS]
    for folder in folders:
        checkpoints.save(folder, 1, tensors_of(1.0), {"step": 1}, a_saver(folder).control)
    assert in_children(mode, step, folders) == [-signal.SIGKILL] * len(POINTS)
    for folder in folders:
        (newest,) = checkpoints.list_checkpoints(folder)[-1:]
        seen.append(value_of(newest))
        recover(folder)
        (recovered,) = checkpoints.list_checkpoints(folder)[-1:]
        assert (
            value_of(recovered) == seen[-1] and recovered.path.name == f"step-{recovered.step:06d}"
        )
        assert recovered.state()["step"] == recovered.step == (step if seen[-1] == 2.0 else 1)
        # Whoever goes on from here saves as if nothing had been.
        saver = a_saver(folder, mode=mode)
        saver.save(3, tensors_of(3.0), {"step": 3})
        saver.wait()
        assert value_of(checkpoints.list_checkpoints(folder)[-1]) == 3.0
        assert (folder / "latest").read_text() == "step-000003"
        left = {path.name for path in folder.iterdir()} - {"latest"}
        assert left == {found.path.name for found in checkpoints.list_checkpoints(folder)}
    assert seen == [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]


def test_between_two_renames_the_replaced_one_counts(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, tensors_of(1.0), {}, a_saver(tmp_path).control)
    final = tmp_path / "step-000001"
    final.rename(tmp_path / "step-000001.old")
    assert [value_of(found) for found in checkpoints.list_checkpoints(tmp_path)] == [1.0]
    recover(tmp_path)
    assert final.is_dir() and not (tmp_path / "step-000001.old").exists()


# --- behind the training ---


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Saves that are written behind stop before their first byte, until the event is set."""
    free = threading.Event()
    write = saver_module.write

    def waiting(*args, **kwargs):
        assert free.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(saver_module, "write", waiting)
    yield free
    free.set()


def test_what_is_written_behind_is_the_moment_of_the_save(
    tmp_path: Path, held: threading.Event
) -> None:
    saver = a_saver(tmp_path)
    tensors, state = tensors_of(1.0), {"owed": ["row"]}
    saver.save(1, tensors, state)
    for tensor in tensors.values():
        tensor.fill_(9.0)
    state["owed"].clear()
    assert saver.poll() is None and checkpoints.list_checkpoints(tmp_path) == []
    held.set()
    saver.wait()
    (found,) = checkpoints.list_checkpoints(tmp_path)
    assert value_of(found) == 1.0 and found.state() == {"owed": ["row"]}


def test_a_second_save_waits_for_the_first(tmp_path: Path, held: threading.Event) -> None:
    saver = a_saver(tmp_path)
    saver.save(1, tensors_of(1.0), {})
    buffers = [buffer.data_ptr() for buffer in saver.staging.buffers.values()]
    threading.Timer(0.2, held.set).start()
    saver.save(2, tensors_of(2.0), {})
    assert held.is_set(), "the buffers were still being read"
    saver.wait()
    assert [value_of(found) for found in checkpoints.list_checkpoints(tmp_path)] == [1.0, 2.0]
    assert buffers == [buffer.data_ptr() for buffer in saver.staging.buffers.values()]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_save_that_fails_is_told_and_the_one_before_stays(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = a_saver(tmp_path, mode=mode)
    saver.save(1, tensors_of(1.0), {})
    saver.wait()
    for point in POINTS[1:4]:
        monkeypatch.setenv(VARIABLE, f"fail:{point}")
        told = r"cannot write .*step-000002: No space left.*the checkpoint before it is whole"
        with pytest.raises(Fault, match=told):
            saver.save(2, tensors_of(2.0), {})
            saver._thread.join()
            assert isinstance(saver.poll(), Fault), "the next step's exchange raises it"
            saver.wait()
        assert saver.poll() is None
        assert [value_of(found) for found in checkpoints.list_checkpoints(tmp_path)] == [1.0]
    monkeypatch.delenv(VARIABLE)
    saver.save(2, tensors_of(2.0), {})
    saver.wait()
    assert value_of(checkpoints.list_checkpoints(tmp_path)[-1]) == 2.0


def test_buffers_are_written_in_rows_and_serve_other_tensors_anew(tmp_path: Path) -> None:
    staging = Staging(tensors_of(1.0))
    assert staging.fits(tensors_of(2.0)) and not staging.fits(tensors_of(2.0, size=7))
    saver = a_saver(tmp_path)
    saver.save(1, tensors_of(1.0), {})
    saver.save(2, tensors_of(2.0, size=7), {})
    saver.wait()
    assert value_of(checkpoints.list_checkpoints(tmp_path)[-1], size=7) == 2.0


# --- the storage, for real ---


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """As a quota or a full disk: the write itself fails, somewhere in the middle."""
    checkpoints.save(tmp_path, 1, tensors_of(1.0), {}, a_saver(tmp_path).control)

    assert in_children("async", 2, [tmp_path], limit=100_000) == [0]
    said = (tmp_path / "said").read_text()
    says(said, "cannot write", str(tmp_path / "step-000002"))
    assert "File too large" in said or "MiB free" in said
    assert {path.name for path in tmp_path.iterdir()} == {"said", "latest", "step-000001"}
    assert value_of(checkpoints.list_checkpoints(tmp_path)[-1]) == 1.0


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:  # fmt: skip
        pytest.skip("no file system may be mounted here")
    try:
        saver = a_saver(disk / "checkpoints")
        saver.save(1, tensors_of(1.0), {})
        saver.save(2, tensors_of(2.0, size=100_000), {})
        with refuses(Fault, "step-000002", "free space"):
            saver.wait()
        assert [value_of(f) for f in checkpoints.list_checkpoints(saver.folder)] == [1.0]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    saver = a_saver(tmp_path / "checkpoints")
    saver.save(1, tensors_of(1.0), {})
    with refuses(Fault, "cannot write", str(tmp_path / "checkpoints")):
        saver.wait()


# --- what stays ---


@given(
    losses=st.dictionaries(st.integers(0, 40), st.none() | st.floats(allow_infinity=True)),
    last=st.integers(1, 4), every=st.integers(0, 5), best=st.integers(0, 3),
)  # fmt: skip
def test_what_stays(losses: dict[int, float | None], last: int, every: int, best: int) -> None:
    kept = Retention(last, every, best).kept(losses)
    steps = sorted(losses)
    assert kept <= set(steps) and set(steps[-last:]) <= kept
    assert not every or {step for step in steps if step % every == 0} <= kept
    extra = kept - set(steps[-last:]) - {s for s in steps if every and s % every == 0}
    assert len(extra) <= best
    known = {s: v for s, v in losses.items() if v is not None and math.isfinite(v)}
    if best and known:
        assert any(known.get(step) == min(known.values()) for step in kept)
    assert Retention(last, every, best).kept({s: losses[s] for s in kept}) == kept, "and stays"


def test_pruning_by_validation_loss(tmp_path: Path) -> None:
    saver = a_saver(tmp_path, keep_last=1, keep_every=4, keep_best=1)
    for step, loss in enumerate([0.5, 0.1, math.nan, 0.3, None, 0.2, 0.9], 1):
        row = {} if loss is None else {"val/loss": loss}
        saver.save(step, tensors_of(step), {"row": row})
    saver.wait()
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [2, 4, 7]
    assert (
        json.loads((tmp_path / "step-000002" / "state.json").read_text())["row"]["val/loss"] == 0.1
    )


# --- before the first step ---


def test_the_room_that_is_needed(tmp_path: Path) -> None:
    cfg = CheckpointConfig(every=10, keep_last=2, keep_best=1, keep_every=20)
    tensors = {"w": torch.zeros(1 << 18)}
    space = space_for(tmp_path / "run" / "checkpoints", tensors, cfg, 0, 100)
    assert (space.one, space.together, space.for_ever) == (1 << 20, 4 << 20, 5 << 20)
    assert space.available == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    # A run of one save has one checkpoint.
    assert space_for(tmp_path, tensors, cfg, 0, 5).together == 1 << 20
    require_space(tmp_path, space, cfg)
    with refuses(UserError, "3 MiB", "4 MiB", "lower", "checkpoint.keep_last"):
        require_space(tmp_path, Space(1 << 20, 4 << 20, 0, 3 << 20), cfg)


def test_a_rehearsal_goes_the_whole_way_and_leaves_nothing(tmp_path: Path) -> None:
    saver = a_saver(tmp_path)
    saver.rehearse(tensors_of(1.0), {"step": 0})
    assert list(tmp_path.iterdir()) == []
    saver.save(1, tensors_of(2.0), {})
    saver.wait()
    assert value_of(checkpoints.list_checkpoints(tmp_path)[-1]) == 2.0


def test_a_rehearsal_finds_storage_that_loses_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saver_module.write

    def lossy(*args, **kwargs):
        found = write(*args, **kwargs)
        file = found.path / "__0_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        return found

    monkeypatch.setattr(saver_module, "write", lossy)
    with refuses(Fault, "digest", "storage"):
        a_saver(tmp_path).rehearse(tensors_of(1.0), {})
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_compares_what_it_reads_with_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the buffers not what the weights are, every digest would still be right."""
    copy = Staging.copy

    def stale(self: Staging, tensors: dict[str, Tensor]) -> None:
        copy(self, tensors)
        self.buffers["model.t"][3, 1] = 7.0

    monkeypatch.setattr(Staging, "copy", stale)
    with refuses(Fault, "model.t", "saved"):
        a_saver(tmp_path).rehearse(tensors_of(1.0), {})

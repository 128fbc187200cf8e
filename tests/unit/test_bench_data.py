"""The loader's benchmark at toy size: all contenders read the same clips, and what cannot be measured is said."""

import json
import mmap
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from clip_files import write_clip

from benchmarks import webdataset_peer
from benchmarks.data import (
    DataBench,
    Effort,
    Memory,
    core_seconds,
    main,
    portioned,
    resident,
    run,
)
from benchmarks.raw_worker import RawRequest, answer
from sora_train.config.compose import compose
from sora_train.data.index.folder import open_source
from sora_train.errors import UserError

TOY = [
    "experiment=quickstart",
    "data.shapes_clips=12",
    "data.shapes_val_clips=1",
    "data.num_workers=1",
    "data.prefetch=1",
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*TOY, f"run.dir={tmp_path_factory.mktemp('toy')}"]


def test_a_toy_loader_is_measured(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sizes = ["--clips", "8", "--repeats", "1", "--soak", "16", "--out", str(tmp_path)]
    assert main([*toy, *sizes]) == 0
    found = json.loads((tmp_path / "data.json").read_text())
    measured = found["measured"]
    rates = {"bare decoder", "loader", "webdataset"}
    shares = {"loader / bare decoder", "webdataset / bare decoder"}
    times = {"processes up", "first micro-batch after that"}
    memory = {"RSS of this process", "RSS of its decoders"}
    cores = {"time of cores of the bare decoder", "time of cores of the loader"}
    shares |= {"bare decoder / loader, by cores"}
    assert set(measured) == rates | shares | times | memory | cores
    assert all(value["median"] > 0 for value in measured.values())
    loader, raw = (measured[name]["median"] for name in ("loader", "bare decoder"))
    assert measured["loader / bare decoder"]["median"] == pytest.approx(100 * loader / raw)
    assert found["facts"]["clips"] == 12 and found["facts"]["decode processes"] == 1
    assert "growth of RSS, %" in found["facts"]
    assert found["facts"]["clips while memory was watched"] >= 16
    assert "| loader / bare decoder |" in capsys.readouterr().out


@pytest.mark.parametrize(("prefetch_mb", "ahead"), [(2048, 1), (0, 0)])
def test_turns_decode_what_they_deliver_and_end_by_the_clock_or_the_clips(
    toy: list[str], prefetch_mb: int, ahead: int
):
    """The bare decoder gets the clips that the loader decoded in its turn, each once and none twice."""
    bench = DataBench.open(compose([*toy, f"data.prefetch_mb={prefetch_mb}"]).config)
    with bench.open_loader() as loader, bench.raw_pool(loader) as pool:
        bench.begin(loader, pool)
        last, read = bench.next_step, bench.read
        assert read == last - 1 + ahead, "as far as data.prefetch and data.prefetch_mb allow"
        for clips, seconds, most in ((10, 600.0, None), (10**6, 0.0, 1)):
            delivered, _, rows = bench.loader_turn(loader, clips, seconds)
            steps = range(last, bench.next_step)
            sizes = [len(bench.tape[step].rows) for step in steps]
            assert delivered == sum(sizes) and (most is None or len(steps) == most)
            assert seconds == 0 or sum(sizes) >= clips > sum(sizes[:-1])
            decoded = [
                (row, epoch)
                for step in range(read + 1, bench.read + 1)
                for row, epoch in zip(bench.tape[step].rows, bench.tape[step].epochs, strict=True)
            ]
            assert rows == decoded and bench.read - read == len(steps)
            last, read = bench.next_step, bench.read
            assert bench.raw_turn(loader, pool, rows) > 0


def test_what_was_measured_is_there_when_time_is_up(toy: list[str], tmp_path: Path):
    """One turn of each, however many were asked for, where a turn takes longer than all may."""
    path = run(toy, Effort(clips=8, repeats=50, soak=0, seconds=1e-3), out=tmp_path)
    measured = json.loads(path.read_text())["measured"]
    assert (
        measured["loader"]["n"] == measured["bare decoder"]["n"] == measured["webdataset"]["n"] == 1
    )
    assert "RSS of this process" not in measured


def test_light_requests_go_together_and_heavy_ones_alone(toy: list[str]):
    bench = DataBench.open(compose(toy).config)
    with bench.open_loader() as loader:
        light = loader.request(int(bench.tape.rows[0]), 0)
    heavy = replace(light, length=10**7)
    sizes = [len(portion) for portion in portioned([light] * 5 + [heavy] * 2 + [light])]
    assert sizes == [4, 1, 1, 1, 1]


def test_the_bare_decoder_counts_what_it_decodes(toy: list[str]):
    bench = DataBench.open(compose(toy).config)
    with bench.open_loader() as loader:
        good = loader.request(int(bench.tape.rows[0]), 0)
    missing = type(good)(**{**vars(good), "path": "/nowhere.tar"})
    assert answer(RawRequest(0, "bench", (good, missing, good))) == ("ok", 2)


def test_loose_clips_are_no_shards_for_webdataset(tmp_path: Path):
    write_clip(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a clip")
    assert "tars" in webdataset_peer.missing(open_source(str(tmp_path), work_dir=tmp_path / "w"))


def test_memory_that_grows_is_told():
    flat, grows = [100 << 20] * 20, [(100 + number) << 20 for number in range(20)]
    assert Memory(flat, flat).facts(20)["growth of RSS, MiB"] == 0
    assert Memory(grows, flat).facts(20)["growth of RSS, MiB"] == pytest.approx(16)
    own = resident()
    if own is not None:
        # Fresh pages of the system's, not memory that this process has freed before.
        with mmap.mmap(-1, 64 << 20) as ballast:
            ballast.write(b"1" * len(ballast))
            now = resident()
            assert now is not None and now[0] - own[0] > len(ballast) // 2


@pytest.mark.parametrize("change", [{"clips": 0}, {"repeats": 0}, {"soak": -1}, {"seconds": 0.0}])
def test_nothing_to_measure_is_refused(change: dict[str, int]):
    with pytest.raises(UserError, match="--clips"):
        Effort(**change)


def test_the_time_of_cores_is_that_of_this_process_and_its_children():
    before = core_seconds()
    if before is None:
        pytest.skip("/proc tells what children take")
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        mine = time.process_time()
        while time.process_time() < mine + 0.25:
            pass
        spent = (core_seconds() or 0.0) - before
        child.kill()
    assert 0.7 < spent < 2.0

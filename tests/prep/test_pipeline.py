"""The runner's promises: nothing lost, nothing computed twice, the same bytes however often it was killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from data_prep import calls
from data_prep.command import prepare, status
from data_prep.ledger import Ledger, Unfinished, digest_of
from data_prep.pipeline import bound_stages, stages_of
from data_prep.settings import parse
from data_prep.stage import DROPS, OF_ROW, Stage, Workspace, _code_version
from sora_train.config.sections.base import Section
from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import ConfigError, Fault, UserError

LIGHT = ["workers=2", "until=mine"]
STAGE_OF = '''
import os, time
from pathlib import Path
import pyarrow as pa
from data_prep.stage import Later, Stage
from sora_train.config.sections.base import Section
from sora_train.data.decode.frames import BadClip


class MineConfig(Section):
    """`mine:`"""

    factor: int = 1
    """What the length is multiplied by."""
    seconds: float = 0.0
    """How long a row takes."""


def mine(rows, settings, workspace):
    key, length = rows["key"][0].as_py(), rows["length"][0].as_py()
    with open(workspace.out / "calls.txt", "a") as file:
        file.write(key + "\\n")
    time.sleep(settings.seconds)
    name = Path(key).stem
    if name == "spin":
        while True:
            pass
    if name == "abort":
        os.abort()
    if name == "hungry":
        hoard = [bytearray(1 << 27) for _ in range(64)]
    if name == "bad":
        raise BadClip("ugly", "it is of no use")
    if name == "later" and not (workspace.out / "up").exists():
        raise Later("down", "the service is down")
    if name == "broken":
        raise KeyError("a mistake of the stage's author")
    return pa.table({"much": [length * settings.factor]})


STAGE = Stage(name="mine", run=mine, config=MineConfig, adds=pa.schema([("much", pa.int64())]),
              seconds=lambda row, settings: 4.0 if row["key"] == "spin.mp4" else 120.0,
              reads=("stamp",), after="ingest")
'''


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    folder = tmp_path / "footage"
    folder.mkdir()
    for number in range(6):
        frames = np.full((6 + number, 32, 48, 3), 40 * number, np.uint8)
        encode_h264(frames, 8, folder / f"{number}.mp4")
    return folder


@pytest.fixture
def stage_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(STAGE_OF)
    return file


def run(footage: Path, out: Path, stage_file: Path, *more: str) -> pa.Table:
    _code_version.cache_clear()  # as in a process of its own
    prepare([f"input={footage}", f"output={out}", f"stages=[{stage_file}]", *LIGHT, *more])
    return table_of(out, stage_file, *more, footage=footage)


def table_of(out: Path, stage_file: Path, *more: str, footage: Path) -> pa.Table:
    stages = stages_of([str(stage_file)])
    given = [f"input={footage}", f"output={out}", f"stages=[{stage_file}]", *LIGHT, *more]
    parsed = parse(given, stages)
    first, *rest = bound_stages(stages, parsed, Workspace(parsed.folder, str(footage)))
    rows = pq.read_table(next(first.ledger.folder.glob("*.parquet")))
    return rest[0].ledger.apply(rows, {})


def calls_of(out: Path) -> list[str]:
    file = out / "calls.txt"
    return sorted(file.read_text().split()) if file.exists() else []


NAMES = [f"{number}.mp4" for number in range(6)]


def test_a_change_runs_again_only_what_it_touches(footage: Path, tmp_path: Path, stage_file: Path):
    out = tmp_path / "out"
    table = run(footage, out, stage_file)
    sizes = [(footage / name).stat().st_size for name in NAMES]
    assert table["much"].to_pylist() == sizes and calls_of(out) == NAMES
    run(footage, out, stage_file)
    assert calls_of(out) == NAMES, "nothing is computed twice"
    # Comments and docstrings are no change of the code; a line is.
    stage_file.write_text(
        STAGE_OF.replace("What the length is", "By what the length is") + "# done\n"
    )
    run(footage, out, stage_file)
    assert calls_of(out) == NAMES
    encode_h264(np.zeros((9, 32, 48, 3), np.uint8), 8, footage / "3.mp4")
    run(footage, out, stage_file)
    assert calls_of(out) == sorted([*NAMES, "3.mp4"]), "a changed file is looked at again, alone"
    table = run(footage, out, stage_file, "mine.factor=3")
    assert table["much"].to_pylist()[0] == 3 * sizes[0] and len(calls_of(out)) == 7 + 6


def test_the_code_of_a_stage_is_part_of_its_results_address(stage_file: Path):
    before = stages_of([str(stage_file)])[1]
    assert before.name == "mine"
    first = before.address(before.config())
    _code_version.cache_clear()
    stage_file.write_text(STAGE_OF.replace("length * settings.factor", "length + settings.factor"))
    assert before.address(before.config()) != first
    _code_version.cache_clear()


def test_a_row_that_hangs_crashes_or_hoards_costs_itself_only(
    footage: Path, tmp_path: Path, stage_file: Path
):
    for name in ("spin", "abort", "hungry", "bad", "broken"):
        shutil.copy(footage / "0.mp4", footage / f"{name}.mp4")
    table = run(footage, tmp_path / "out", stage_file, "limits.memory_gb=2")
    fates = dict(zip(table["key"].to_pylist(), table["drop_reason"].to_pylist(), strict=True))
    assert fates == {
        **dict.fromkeys(NAMES, ""),
        "spin.mp4": "decode_timeout",
        "abort.mp4": "decoder_crashed",
        "hungry.mp4": "out_of_memory",
        "bad.mp4": "ugly",
        "broken.mp4": "failed",
    }
    details = dict(zip(table["key"].to_pylist(), table["drop_detail"].to_pylist(), strict=True))
    assert details["bad.mp4"] == "it is of no use" and "KeyError" in details["broken.mp4"]
    assert set(
        table.filter(pa.compute.not_equal(table["drop_reason"], ""))["drop_stage"].to_pylist()
    ) == {"mine"}


def test_what_failed_for_now_is_tried_again(
    footage: Path, tmp_path: Path, stage_file: Path, capsys
):
    out = tmp_path / "out"
    shutil.copy(footage / "0.mp4", footage / "later.mp4")
    prepare([f"input={footage}", f"output={out}", f"stages=[{stage_file}]", *LIGHT])
    assert "6 kept, 1 dropped (1 down)" in capsys.readouterr().out
    with pytest.raises(Unfinished):
        table_of(out, stage_file, footage=footage)
    (out / "up").touch()
    table = run(footage, out, stage_file)
    assert not any(table["drop_reason"].to_pylist()) and calls_of(out).count("later.mp4") == 2


def test_parts_make_the_whole(footage: Path, tmp_path: Path, stage_file: Path):
    whole = run(footage, tmp_path / "whole", stage_file)
    out = tmp_path / "parts"
    given = [f"input={footage}", f"output={out}", f"stages=[{stage_file}]", *LIGHT]
    said = [prepare([*given, f"part={part}/3"]) for part in (2, 1, 3)]
    assert "the other parts'" in said[0] and calls_of(out) == NAMES
    both = [
        table.drop_columns(["path", "stamp"]) for table in (whole, run(footage, out, stage_file))
    ]
    assert both[0].equals(both[1]) and calls_of(out) == NAMES


def test_status_tells_how_far_it_is(footage: Path, tmp_path: Path, stage_file: Path):
    out = tmp_path / "out"
    given = [f"input={footage}", f"output={out}", f"stages=[{stage_file}]", *LIGHT]
    prepare([*given, "part=1/3"])
    assert status(out).splitlines() == ["ingest: 6 kept", "mine: 2 of 6 rows done"]
    prepare(given)
    assert status(out).splitlines()[:2] == ["ingest: 6 kept", "mine: 6 kept"]
    with refuses(UserError, "holds no preparation", "sora prep run"):
        status(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["until=nine"], ("until=nine", "ingest")),
        (["mine.factr=2"], ("mine.factr", "mine.factor")),
        (["limits.memory_gb=-1"], ("limits.memory_gb", "at least 0")),
        (["part=3/2"], ("part=3/2", "i/N")),
    ],
)
def test_settings_are_checked_before_any_work(footage, tmp_path, stage_file, arguments, words):
    with refuses((UserError, ConfigError), *words):
        run(footage, tmp_path / "out", stage_file, *arguments)
    assert not calls_of(tmp_path / "out")


def test_folders_of_others_are_left_alone(footage: Path, tmp_path: Path, stage_file: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with refuses(UserError, "is not an empty folder"):
        run(footage, tmp_path / "full", stage_file)
    run(footage, tmp_path / "out", stage_file)
    shutil.copytree(footage, tmp_path / "other")
    with refuses(UserError, "holds what was made of", "other"):
        run(tmp_path / "other", tmp_path / "out", stage_file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", ("holds no stage", "STAGE = Stage")),
        ("import nothing_like_this", ("cannot be imported", "nothing_like_this")),
        (STAGE_OF.replace('after="ingest"', 'after="lunch"'), ("lunch", "ingest")),
        (STAGE_OF.replace('name="mine"', 'name="probe"'), ("a name of its own",)),
    ],
)
def test_a_file_that_is_no_stage(stage_file: Path, text: str, words: tuple[str, ...]):
    stage_file.write_text(text)
    with refuses(UserError, *words):
        stages_of([str(stage_file)])


# -- the ledger ------------------------------------------------------------------------------------


class Nothing(Section):
    """No settings."""


PLAIN = Stage(
    name="plain",
    run=lambda rows, settings, workspace: rows,
    config=Nothing,
    adds=pa.schema([("piece", pa.int64())]),
    reads=("content",),
    module="data_prep.stages.probe",
)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12),
    pieces=st.dictionaries(st.integers(0, 9), st.integers(1, 3)),
    batches=st.randoms(use_true_random=False),
)
def test_no_row_is_lost_and_order_is_kept(tmp_path_factory, rows, pieces, batches):
    ledger = Ledger(tmp_path_factory.mktemp("ledger"), PLAIN, Nothing())
    contents = [content for content, _ in rows]
    table = pa.table(
        {
            "key": [str(number) for number in range(len(rows))],
            "content": pa.array(contents, pa.int64()),
            "drop_stage": ["before" if dropped else "" for _, dropped in rows],
            "drop_reason": ["old" if dropped else "" for _, dropped in rows],
            "drop_detail": [""] * len(rows),
        },
        schema=pa.schema([("key", pa.string()), ("content", pa.int64()), *DROPS]),
    )
    addresses = dict(zip(contents, ledger.addresses(table), strict=True))
    computed = sorted({content for content, dropped in rows if not dropped})
    batches.shuffle(computed)
    for content in computed:
        count = pieces.get(content, 1)
        ledger.put([addresses[content]], pa.table({
            "piece": range(count), "drop_stage": [""] * count, "drop_reason": [""] * count,
            "drop_detail": [""] * count, OF_ROW: [0] * count}), 1.0)  # fmt: skip
    after = ledger.apply(table, {})
    expected = [
        (str(number), None if dropped else piece)
        for number, (content, dropped) in enumerate(rows)
        for piece in range(1 if dropped else pieces.get(content, 1))
    ]
    assert list(zip(after["key"].to_pylist(), after["piece"].to_pylist(), strict=True)) == expected
    assert set(after["drop_reason"].to_pylist()) <= {"", "old"}


def test_a_damaged_file_of_the_ledger_is_computed_again(
    footage: Path, tmp_path: Path, stage_file: Path
):
    out = tmp_path / "out"
    table = run(footage, out, stage_file)
    files = sorted((out / "prep/stages/mine").rglob("*.parquet"))
    files[0].write_bytes(files[0].read_bytes()[:40])
    files[1].write_bytes(b"")
    assert run(footage, out, stage_file).equals(table) and len(calls_of(out)) == 8


@pytest.mark.slow
def test_joined_files_hold_the_same(footage: Path, tmp_path: Path, stage_file: Path, monkeypatch):
    out = tmp_path / "out"
    table = run(footage, out, stage_file)
    monkeypatch.setattr("data_prep.ledger.MANY_FILES", 2)
    assert run(footage, out, stage_file).equals(table)
    assert len(list((out / "prep/stages/mine").rglob("*.parquet"))) == 1
    assert run(footage, out, stage_file).equals(table) and calls_of(out) == NAMES


def test_a_stage_that_loses_a_row_is_told():
    rows = pa.table({"key": ["a", "b"]})
    with refuses(Fault, "returns 1 rows for 2", "none for b"):
        calls.checked(PLAIN, rows, pa.table({"piece": [1], OF_ROW: [0]}))
    with refuses(Fault, "returns no column 'piece'"):
        calls.checked(PLAIN, rows, pa.table({"other": [1, 2]}))


def test_the_digest_of_a_table_is_of_its_values():
    one = pa.table({"a": [1, None, 3], "b": ["x", "y", ""]})
    chunked = pa.concat_tables([one.slice(0, 1), one.slice(1)])
    assert digest_of(one) == digest_of(chunked)
    assert digest_of(one) != digest_of(one.set_column(0, "a", pa.array([1, 0, 3])))


# -- being killed ----------------------------------------------------------------------------------


def killed_runs(footage: Path, out: Path, stage_file: Path, times: int, seed: int) -> None:
    """Start the command, kill it and all its processes at a random moment, `times` times."""
    code = "import sys; from data_prep.command import prepare; prepare(sys.argv[1:])"
    given = [
        f"input={footage}",
        f"output={out}",
        f"stages=[{stage_file}]",
        *LIGHT,
        "mine.seconds=0.3",
    ]
    draws = random.Random(seed)
    for _ in range(times):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *given], start_new_session=True, stdout=subprocess.DEVNULL
        )
        time.sleep(draws.uniform(0.5, 4.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_killed_and_begun_again_is_undisturbed(footage: Path, tmp_path: Path, stage_file: Path):
    undisturbed = run(footage, tmp_path / "calm", stage_file, "mine.seconds=0.3")
    killed_runs(footage, tmp_path / "out", stage_file, times=3, seed=5)
    assert run(footage, tmp_path / "out", stage_file, "mine.seconds=0.3").equals(undisturbed)
    repeated = len(calls_of(tmp_path / "out")) - len(NAMES)
    assert repeated <= 3 * 2, "a kill costs what was in flight, a row for each of two workers"

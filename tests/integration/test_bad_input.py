"""What a person can get wrong, and what can go wrong for them: one sentence, the right exit code, nothing half-written.

Most commands run in this process, as the console script would run them; a few are real processes.
"""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sentences import says

from sora_train import cli
from sora_train.base.files import write_atomically
from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import EXIT_FAULT, EXIT_USER, run_command

PARITY = ["train", "experiment=parity_tiny"]
CLIPS = [
    "train",
    "experiment=real_tiny",
    "vae=micro",
    "model=micro",
    "text=bytes_micro",
    "buckets=micro",
]
Told = Callable[..., tuple[int, str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    """`told("train", ...)`: exit code and the one sentence a command says on stderr."""
    monkeypatch.delenv("SORA_DEBUG", raising=False)

    def run(*arguments: str) -> tuple[int, str]:
        code = run_command(lambda: cli.run(arguments))
        return code, one_sentence(capsys.readouterr().err)

    return run


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with one good captioned clip."""
    folder = tmp_path / "clips"
    encode_h264(np.full((9, 32, 32, 3), 128, np.uint8), 8, folder / "grey.mp4")
    (folder / "grey.txt").write_text("a grey field")
    return folder


def one_sentence(stderr: str) -> str:
    assert "Traceback" not in stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert "internal fault" not in lines[0]
    return lines[0].removeprefix("error: ")


def process(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of a real `python -m sora_train`."""
    found = subprocess.run(
        [sys.executable, "-m", "sora_train", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "SORA_DEBUG": "0", **environment},
    )
    return found.returncode, found.stderr


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow over 400 kB, which stops a checkpoint halfway, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_nothing_half_written(folder: Path) -> None:
    """Under a final name everything is whole; a temporary name is not left behind at all."""
    left = [path for path in folder.rglob("*") if ".tmp" in path.name]
    assert not left, left


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lrr=1"], ["'optim.lrr'", "'optim.lr'"]),
        (["modle=micro"], ["'modle'", "'model'"]),
        (["model=mcro"], ["'model'", "'mcro'", "'micro'"]),
        (["experiment=parity_tny"], ["'parity_tny'", "'parity_tiny'"]),
        (["optim.lr=-1"], ["'optim.lr'", "-1", "above 0"]),
        (["train.steps=many"], ["'train.steps'", "'many'", "whole number"]),
        (["sample.prompts=[a"], ["'sample.prompts=[a'", "quote"]),
        (["tracker=wandbb"], ["'tracker'", "'wandbb'", "'wandb'"]),
        (["parallel.dp_shard=3"], ["parallel.dp_shard 3", "1 rank", "parallel.dp_shard=-1"]),
        (["buckets.classes=[]"], ["buckets.classes", "at least one"]),
        (["vae.path=nowhere"], ["nowhere"]),
    ],
)
def test_a_wrong_config_is_told_before_anything_is_made(
    told: Told, tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    code, sentence = told(*PARITY, f"run.dir={tmp_path / 'run'}", *overrides)
    assert code == EXIT_USER
    says(sentence, *expected)
    assert not (tmp_path / "run" / "data").exists()
    assert_nothing_half_written(tmp_path)


def broken(folder: Path, caption: str | None, name: str = "a.mp4") -> Path:
    """A folder with one file that is no video."""
    folder.mkdir()
    (folder / name).write_bytes(b"\0" * 4000)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


def test_wrong_clips_are_told_with_file_and_remedy(told: Told, tmp_path: Path, clips: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    unreadable = broken(tmp_path / "unreadable", "what it would show")
    silent = tmp_path / "silent"
    silent.mkdir()
    shutil.copy(clips / "grey.mp4", silent)
    huge = "buckets.classes=[{name: huge, pixels: 1000000, frames: [81]}]"
    odd = "buckets.classes=[{name: odd, pixels: 1024, frames: [6]}]"
    cases: list[tuple[list[str], list[str]]] = [
        ([], ["data.source is empty", "data.source=my_clips"]),
        ([f"data.source={tmp_path / 'none'}"], [f"{tmp_path / 'none'} does not exist", "give"]),
        ([f"data.source={empty}"], [str(empty), "holds no clips", "mp4"]),
        ([f"data.source={silent}"], [str(silent), "caption", "captions.jsonl"]),
        ([f"data.source={unreadable}"], [str(unreadable), "a.mp4", "1 unreadable", "mend or replace"]),
        ([f"data.source={clips}", huge], ["1 too_short", "81x1008x1008", "buckets.classes"]),
        ([f"data.source={clips}", odd], ["buckets.classes[0].frames=6", "use 5 or 9"]),
        ([f"data.source={clips}", f"data.captions={clips / 'grey.mp4'}"], ["grey.mp4", ".jsonl"]),
    ]  # fmt: skip
    for overrides, expected in cases:
        code, sentence = told(*CLIPS, f"run.dir={tmp_path / 'run'}", *overrides)
        assert code == EXIT_USER, sentence
        says(sentence, *expected)
    assert_nothing_half_written(tmp_path)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_more_bad_clips_than_allowed_are_counted(told: Told, tmp_path: Path, clips: Path) -> None:
    (clips / "b.mp4").write_bytes(b"\0" * 4000)
    (clips / "b.txt").write_text("what it would show")
    code, sentence = told(*CLIPS, f"run.dir={tmp_path / 'run'}", f"data.source={clips}")
    assert code == EXIT_USER
    for part in (
        "1 of 2 clips",
        "50.0 %",
        "unreadable 1",
        "data.max_drop_fraction=0.2",
        "raise it",
    ):
        assert part in sentence, sentence


def test_what_cannot_be_sampled_is_told(told: Told, tmp_path: Path, finished_run: Path) -> None:
    (tmp_path / "no_run").mkdir()
    run = str(finished_run)
    cases: list[tuple[list[str], list[str]]] = [
        (["--ckpt", str(tmp_path / "no_run"), "--prompt", "x"], ["no_run", "run folder"]),
        (["--ckpt", str(tmp_path / "gone"), "--prompt", "x"], ["gone", "run folder"]),
        (["--ckpt", f"{run}@99", "--prompt", "x"], ["no checkpoint of step 99", "1, 2"]),
        (["--ckpt", f"{run}@last", "--prompt", "x"], ["@last", "number"]),
        (["--ckpt", run], ["no prompt", "--prompt"]),
        (["--prompt", "x"], ["--ckpt"]),
        (["--ckpt", run, "--prompts", str(tmp_path / "none.txt")], ["--prompts", "none.txt"]),
        (["--ckpt", run, "--prompt", "x", "--size", "33x32"], ["--size 33x32", "multiples of 16"]),
        (["--ckpt", run, "--prompt", "x", "--size", "big"], ["'big'", "WIDTHxHEIGHT"]),
        (["--ckpt", run, "--prompt", "x", "--frames", "6"], ["6 frames", "for example 5"]),
        (["--ckpt", run, "--prompt", "x", "--num", "0"], ["--num", "1"]),
    ]
    out = tmp_path / "out"
    for flags, expected in cases:
        code, sentence = told("sample", *flags, "--out", str(out))
        assert code == EXIT_USER, sentence
        says(sentence, *expected)
    assert not out.exists()


def test_a_checkpoint_of_another_model_is_refused(
    told: Told, tmp_path: Path, finished_run: Path
) -> None:
    """By the config that the checkpoint tells; in sampling, which goes by the run folder's, by the tensors."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    other = [*PARITY, f"run.dir={run}", "train.steps=2", "model.num_layers=3"]
    code, sentence = told(*other)
    assert code == EXIT_USER
    says(sentence, "model.num_layers", "2", "3")
    assert "another run.dir" in sentence
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("num_layers: 2", "num_layers: 3"))
    code, sentence = told("sample", "--ckpt", str(run), "--prompt", "x", "--out", str(run / "out"))
    assert code == EXIT_USER
    says(sentence, "another model")
    assert "blocks.2" in sentence
    assert not (run / "out").exists()
    (run / "config.yaml").unlink()
    code, sentence = told(*other)
    assert code == EXIT_USER
    says(sentence, "model.num_layers", "2", "3")
    assert "another run.dir" in sentence


def test_a_damaged_checkpoint_is_a_fault(told: Told, tmp_path: Path, finished_run: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    shard = next((run / "checkpoints" / "step-000002").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, sentence = told("sample", "--ckpt", str(run), "--prompt", "x", "--out", str(run / "out"))
    assert code == EXIT_FAULT
    assert str(shard) in sentence and "digest" in sentence and "remove this checkpoint" in sentence


def test_prep_refuses_what_it_cannot_write_whole(told: Told, tmp_path: Path, clips: Path) -> None:
    taken, new = tmp_path / "taken", tmp_path / "new"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep me")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[str], list[str]]] = [
        ([f"input={clips}", f"output={taken}"], [str(taken), "not an empty folder", "empty it"]),
        ([f"input={clips}"], ["'output'"]),
        ([f"input={clips}", f"output={new}", "outputt=3"], ["'outputt'", "did you mean 'output'?"]),
        ([f"input={tmp_path / 'empty'}", f"output={new}"], [str(tmp_path / "empty"), "no clips"]),
        ([f"input={tmp_path / 'none'}", f"output={new}"], [str(tmp_path / "none"), "not exist"]),
    ]
    for settings, expected in cases:
        code, sentence = told("prep", "shards", *settings)
        assert code == EXIT_USER, sentence
        says(sentence, *expected)
    code, stderr = process("prep", "shards", *cases[0][0])
    says(one_sentence(stderr), "empty folder")
    assert code == EXIT_USER
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    assert not new.exists()
    assert_nothing_half_written(tmp_path)


def test_a_disk_that_fills_under_a_text_file_is_a_fault(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, text: str) -> None:
        path.open("w").write(text[: len(text) // 2])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", no_space)
    code, sentence = told(*PARITY, f"run.dir={tmp_path / 'run'}")
    assert code == EXIT_FAULT
    assert str(tmp_path / "run" / "config.yaml") in sentence and "free space" in sentence
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert_nothing_half_written(tmp_path)


def test_a_disk_that_fills_under_a_checkpoint_is_a_fault(
    told: Told, tmp_path: Path, finished_run: Path, small_files: None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run / "data", run / "data")
    code, sentence = told(*PARITY, f"run.dir={run}", "train.steps=1", "validation.every=0")
    assert code == EXIT_FAULT
    assert str(run / "checkpoints") in sentence and "free space" in sentence
    assert [path.name for path in (run / "checkpoints").iterdir()] == []
    assert not (run / "summary.json").exists()
    assert_nothing_half_written(tmp_path)


def test_a_traceback_only_under_sora_debug(tmp_path: Path) -> None:
    command = [*PARITY, "optim.lrr=1", f"run.dir={tmp_path / 'run'}"]
    code, stderr = process(*command)
    assert code == EXIT_USER
    says(one_sentence(stderr), "optim.lrr", "optim.lr")
    code, stderr = process(*command, SORA_DEBUG="1")
    assert code != 0
    assert "Traceback" in stderr and "ConfigError" in stderr and "compose.py" in stderr
    assert not (tmp_path / "run").exists()


def test_the_run_folder_writes_whole_files_or_none(tmp_path: Path) -> None:
    """The text files of a run are replaced at once, and an old one survives a failure."""
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    path.with_name("summary.json.tmp").mkdir()
    with pytest.raises(Exception, match=r"summary\.json"):
        write_atomically(path, "new")
    assert path.read_text() == "old"

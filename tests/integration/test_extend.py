"""What docs/extend.md shows works: each of its files is written down as it stands and run by its command.

All in one process, through the entry point of the `sora` command: a start of Python and torch costs more than a run.
"""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentences import says

from sora_train.checkpoint import find
from sora_train.checkpoint.meta import read_meta
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.cli import run
from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import UserError
from sora_train.monitoring.metrics import read_metrics
from sora_train.sampling.api import load
from sora_train.tools.doctor.replay.replay import facts
from sora_train.training.recipe import load_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extend.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
FILES = {
    text.splitlines()[0].removeprefix("# "): text
    for language, text in BLOCKS
    if language == "python"
}
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
SHORT = [
    "train.steps=2",
    "data.shapes_clips=8",
    "data.shapes_val_clips=2",
    "validation.max_clips=1",
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the page, and the clips and the catalogue that one of them reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # a project's own file sets these two
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "my_clips").mkdir()
    (catalogue,) = [text for language, text in BLOCKS if not language]
    (tmp_path / "videos.csv").write_text(catalogue)
    for number, line in enumerate(catalogue.splitlines()[1:]):
        encode_h264(
            np.full((5, 32, 32, 3), 60 * number, np.uint8), 8, tmp_path / line.split(",")[0]
        )
    return tmp_path


def exit_code(command: str, *more: str) -> int:
    """Of `sora ...`, run in this process."""
    words = shlex.split(command, comments=True)
    assert words[0] == "sora"
    try:
        return run([*words[1:], *more])
    except SystemExit as end:  # a project's own file ends so
        return int(end.code or 0)


def command_of(name: str) -> str:
    """The first command of the page that runs this file."""
    return next(command for command in COMMANDS if f" {name} " in command)


def test_every_file_has_its_command_and_every_command_its_file() -> None:
    assert len(FILES) == 5
    named = {word for command in COMMANDS for word in command.split() if word.endswith(".py")}
    assert named == set(FILES)


def test_the_model(project: Path) -> None:
    train, sample, replay = [command for command in COMMANDS if " time_mixing.py " in command]
    assert exit_code(train, *SHORT) == 0
    meta = read_meta(find(project / "runs/time_mixing"))
    assert meta.config["mix"] == {"kernel": 5}
    with pytest.raises(UserError, match="another model|unknown config key"):
        load(project / "runs/time_mixing")
    assert exit_code(sample, "--steps", "1") == 0
    assert (project / "samples/000.mp4").is_file()
    assert exit_code(replay) == 0
    replayed = facts(project / "runs/time_mixing/replay/step-000001")
    assert replayed["loss"] == pytest.approx(replayed["logged_loss"], rel=1e-6)
    # The model that is sampled from is the one that was trained, its own weights included.
    recipe = load_recipe(project / "time_mixing.py")
    model = load(project / "runs/time_mixing", project=recipe).model
    assert type(model).__name__ == "MixedInTime"
    stored = StoredTensors(find(project / "runs/time_mixing"))
    (weight,) = stored.read("ema.mix.weight").values()
    assert torch.equal(model.mix.weight, weight) and weight.abs().max() > 0
    no_recipe = project / "gentle_start.py"
    with pytest.raises(UserError, match="gentle_start.py has no `recipe`"):
        load_recipe(no_recipe)
    assert exit_code("sora train time_mixing.py experiment=parity_tiny mix.kernle=5") == 2


def test_the_dataset(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command_of("catalogue.py"), *SHORT) == 0
    table = (project / "runs/catalogue/catalogue.jsonl").read_text()
    assert table.count("\n") == 2 and "noise" not in table
    assert "2 clips" in capsys.readouterr().out
    rows = read_metrics(project / "runs/catalogue/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    # The same run folder with another choice of clips is refused.
    assert exit_code(command_of("catalogue.py"), *SHORT, "min_score=0.8", "train.steps=3") == 2


def test_the_loss(project: Path) -> None:
    assert exit_code(command_of("fair_loss.py"), *SHORT) == 0
    rows = read_metrics(project / "runs/fair_loss/metrics.jsonl")
    for row in rows:
        terms = row["train/loss/image"] + row["train/loss/video"]
        assert row["train/loss"] == pytest.approx(terms) and terms > 0
    assert any(row["train/loss/image"] > 0 for row in rows)


def test_the_callback(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine, spiked = [command for command in COMMANDS if " spikes.py " in command]
    assert exit_code(fine, *SHORT) == 0
    expected = int(re.search(r"# exit code (\d)", spiked).group(1))
    assert exit_code(spiked, *SHORT) == expected == 1
    says(capsys.readouterr().err, "max_grad_norm=1e-06", "optim.lr", "lower")
    assert not list((project / "runs/spiked/checkpoints").glob("step-*"))


def test_a_subclass_of_the_trainer(project: Path) -> None:
    assert exit_code(command_of("gentle_start.py"), *SHORT) == 0
    (first, second) = read_metrics(project / "runs/gentle_start/metrics.jsonl")
    assert first["train/lr"] == pytest.approx(0.005) and second["train/lr"] == first["train/lr"]


def test_a_new_project_trains_and_is_sampled(project: Path) -> None:
    """What `sora init` writes, its experiment and its README's commands, at a toy size."""
    assert exit_code("sora init my_project") == 0
    toy = ["model=micro", "text=bytes_micro", "buckets=micro", "data.micro_batch=4", "data.num_workers=1",
           "objective.num_steps=1", "sample.max_prompts=1", "sample.every=2", "sample.oracle_prompts=0"]  # fmt: skip
    text = (project / "my_project/README.md").read_text()
    show, train, sample = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert exit_code(show) == 0
    assert exit_code(train, *SHORT, *toy) == 0
    assert exit_code(sample, "--steps", "1") == 0
    assert list((project / "runs/my_project/samples/step-000002").glob("*.mp4"))
    assert (project / "samples/contact_sheet.png").is_file()

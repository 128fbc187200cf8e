"""Two sides trained as a pair: ended once it is clear, gone on with after a kill, refused where nothing can be told."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sentences import refuses

from sora_train.cli import run
from sora_train.errors import ConfigError, UserError
from sora_train.tools.sweep.ab import race
from sora_train.tools.sweep.ab.race import difference, train_pair
from sora_train.tools.sweep.ab.report import write_report
from sora_train.tools.sweep.ab.sides import Pair, pair_of

TINY = ["experiment=quickstart", "model=micro", "text=bytes_micro", "buckets=micro"]
LOSSES = """
import json, random, signal, sys, time
from pathlib import Path
folder, gap, steps, pause = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
if gap < 0:
    sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
folder.mkdir(parents=True, exist_ok=True)
own = random.Random(folder.name)
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, steps + 1):
        # What both share is large, their own luck small.
        loss = random.Random(step).gauss(1.0, 0.5) + own.gauss(gap, 0.01)
        file.write(json.dumps({"step": step, "train/loss": loss, "train/step_seconds": 0.1}) + "\\n")
        file.flush()
        time.sleep(pause)
"""
"""A run that takes no time: its losses are the same noise at the same step, moved by `gap`."""


@dataclass(frozen=True)
class Written:
    """Stands where a side's template does, and starts LOSSES."""

    script: Path
    gap: float
    steps: int
    pause: float

    def command(self, run, folder, config) -> list[str]:
        values = (folder / run.id, self.gap, self.steps, self.pause)
        return [sys.executable, str(self.script), *map(str, values)]


def pair(tmp_path: Path, gaps: tuple[float, float], pause: float = 0.0, at_once: int = 2) -> Pair:
    script = tmp_path / "losses.py"
    script.write_text(LOSSES)
    made = pair_of(("optim.lr=1e-3", "optim.lr=2e-3"), [*TINY, "train.steps=400"], tmp_path / "ab")
    a, b = (
        replace(side, template=Written(script, gap, 400, pause))
        for side, gap in zip((made.a, made.b), gaps, strict=True)
    )
    return replace(made, a=a, b=b, at_once=at_once)


def test_both_end_once_one_is_clearly_better(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(race, "LOOK_SECONDS", 0.1)
    made = pair(tmp_path, (0.05, 0.0), pause=0.02)
    assert train_pair(made, 0.95) == 0
    found = difference(made, 0.95)
    assert found.interval.sure and found.last < 400
    assert found.interval.low < 0.05 < found.interval.high
    text = write_report(made, found)
    assert "b is better than a by 0.0" in text and "| optim.lr | 0.001 | 0.002 |" in text
    kept = json.loads((tmp_path / "ab/ab.json").read_text())
    assert kept["differing"] == ["optim.lr"] and kept["difference"]["sure"] is True


def test_of_two_alike_none_is_better_after_all_steps(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(race, "LOOK_SECONDS", 0.1)
    made = pair(tmp_path, (0.0, 0.0))
    assert train_pair(made, 0.95) == 0
    found = difference(made, 0.95)
    # A tenth is skipped, then blocks of 8 steps.
    assert (found.first, found.last, found.block) == (41, 400, 8)
    assert "No difference in train/loss is shown after 400 of 400 steps" in write_report(
        made, found
    )


def test_in_turn_the_second_is_ended_early(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(race, "LOOK_SECONDS", 0.1)
    made = pair(tmp_path, (0.0, 0.05), pause=0.01, at_once=1)
    assert train_pair(made, 0.95) == 0
    steps = [len(race.losses(tmp_path / "ab" / name / "metrics.jsonl")) for name in "ab"]
    assert steps[0] == 400 and 120 <= steps[1] < 400


def test_where_one_fails_the_other_is_ended(tmp_path: Path, capsys):
    made = pair(tmp_path, (-1.0, 0.0), pause=0.2)
    assert train_pair(made, 0.95) == 1
    assert "a failed (exit code 1)" in capsys.readouterr().out
    assert len(race.losses(tmp_path / "ab/b/metrics.jsonl")) < 400


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("optim.lr=1e-3", "optim.lr=1e-3", ("train the same run", "change a key")),
        ("optim.lr=1e-3", "optim.lr=2e-3 train.steps=7", ("train.steps is", "7", "give one")),
        ("optim.lr=1e-3", "optim.lr=2e-3 seed=4", ("step by step", "seed", "the same clips")),
        ("optim.lr=1e-3", "objective.shift=2", ("objective.shift", "same kind")),
        ("optim.lr=1e-3", "optim.lrr=2e-3", ("b (optim.lrr=2e-3)", "optim.lr")),
        ("nowhere.yaml", "optim.lr=2e-3", ("nowhere.yaml",)),
        ("experiment=two_stages", "optim.lr=2e-3", ("stages", "one stage")),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_step(tmp_path: Path, a, b, words):
    shared = [] if "two_stages" in a else TINY
    with refuses(ConfigError, *words):
        pair_of((a, b), shared, tmp_path / "ab")
    assert not (tmp_path / "ab").exists()


def test_the_folder_of_another_pair_is_refused(tmp_path: Path):
    pair_of(("optim.lr=1e-3", "optim.lr=2e-3"), TINY, tmp_path / "ab")
    pair_of(("optim.lr=1e-3", "optim.lr=2e-3"), TINY, tmp_path / "ab")
    with refuses(UserError, "holds another pair", "optim.lr=2e-3", "--out"):
        pair_of(("optim.lr=1e-3", "optim.lr=3e-3"), TINY, tmp_path / "ab")


def test_a_confidence_that_cannot_be_is_refused():
    with refuses(UserError, "--confidence 1.5", "0.95"):
        run(["ab", "optim.lr=1", "optim.lr=2", "--confidence", "1.5"])


def test_a_yaml_file_is_a_side(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("defaults: [quickstart]\noptim: {lr: 0.004}\n")
    made = pair_of((str(tmp_path / "a.yaml"), "experiment=quickstart"), [], tmp_path / "ab")
    assert made.a.config.optim.lr == 0.004 and made.b.config.optim.lr == 0.002
    assert str(tmp_path / "a.yaml") in made.a.task(tmp_path / "ab", log=False).command


@pytest.mark.slow  # trains two small models
def test_a_learning_rate_that_is_far_too_small_loses(tmp_path: Path, capsys):
    shared = [*TINY, "train.steps=300", "sample.every=0", "sample.oracle_prompts=0"]
    out = tmp_path / "ab"
    assert run(["ab", "optim.lr=3e-3", "optim.lr=1e-6", *shared, "--out", str(out)]) == 0
    assert "a is better than b" in capsys.readouterr().out

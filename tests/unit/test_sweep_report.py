"""What a report says of a sweep: paired differences obey their laws, and the files tell what the runs did."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses, says

from sora_train.cli import run
from sora_train.config.compose import compose
from sora_train.errors import ConfigError, UserError
from sora_train.evaluation.paired import of_pairs, of_steps, student, unlike
from sora_train.tools.sweep.axes import SweepRun
from sora_train.tools.sweep.folder import Sweep
from sora_train.tools.sweep.report.charts import Scale
from sora_train.tools.sweep.report.compare import compare
from sora_train.tools.sweep.report.rows import Row, collect
from sora_train.training.trainer import Trainer

REPO = Path(__file__).resolve().parents[2]
FLOATS = st.floats(-100, 100)


# --- differences ---


def curve(values: np.ndarray) -> dict[int, float]:
    return dict(enumerate(map(float, values), 1))


def noise(rng: np.random.Generator, steps: int, rho: float = 0.9) -> np.ndarray:
    """A stationary AR(1) with unit variance: steps like those of a loss, each much like the one before."""
    drawn = rng.standard_normal(steps) * math.sqrt(1 - rho**2)
    drawn[0] /= math.sqrt(1 - rho**2)
    for step in range(1, steps):
        drawn[step] += rho * drawn[step - 1]
    return drawn


@given(st.lists(FLOATS, min_size=8, max_size=60), FLOATS)
def test_a_shift_is_found_exactly_and_without_doubt(values: list[float], shift: float):
    a = dict(enumerate(values))
    found = of_steps({step: value + shift for step, value in a.items()}, a, 0.95)
    assert found.mean == pytest.approx(shift, abs=1e-9)
    assert found.high - found.low == pytest.approx(0, abs=1e-9)
    same = of_steps(a, a, 0.95)
    assert (same.mean, same.low, same.high) == (0, 0, 0) and not same.sure


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=2, max_size=40))
def test_the_other_way_round_it_is_the_negative(pairs: list[tuple[float, float]]):
    a, b = ({n: pair[side] for n, pair in enumerate(pairs)} for side in (0, 1))
    found, back = of_steps(a, b, 0.9), of_steps(b, a, 0.9)
    assert found.mean == pytest.approx(-back.mean)
    assert found.low == pytest.approx(-back.high, nan_ok=True)
    assert found.unpaired == pytest.approx(back.unpaired, nan_ok=True)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Batch means of steps that are correlated; treated as independent they would be right less than half the time."""
    rng, hits, naive = np.random.default_rng(0), 0, 0
    for _ in range(300):
        own = noise(rng, 4000)
        found = of_steps(curve(own + 0.1), curve(np.zeros(4000)), 0.9)
        hits += found.low <= 0.1 <= found.high
        tail = own[2000:]
        naive += abs(tail.mean()) <= 1.645 * tail.std() / math.sqrt(len(tail))
    assert 0.84 <= hits / 300 <= 0.95
    assert naive / 300 < 0.6


def test_pairing_takes_out_what_the_runs_have_in_common():
    rng = np.random.default_rng(1)
    shared = noise(rng, 800)
    a, b = (shared + 0.1 * noise(rng, 800) for _ in range(2))
    found = of_steps(curve(a), curve(b), 0.95)
    assert found.unpaired > 4 * (found.high - found.low)
    independent = of_steps(curve(noise(rng, 800)), curve(noise(rng, 800)), 0.95)
    assert independent.unpaired < 2 * (independent.high - independent.low)


def test_steps_that_one_lacks_or_lost_are_left_out():
    a, b = curve(np.arange(40.0)), curve(np.arange(40.0) - 1)
    a[39] = math.nan
    del b[40]
    assert of_steps(a, b, 0.95).mean == 1
    assert math.isnan(of_steps({1: 1.0}, {2: 1.0}, 0.95).mean)
    assert math.isnan(of_steps({1: 1.0}, {1: 0.0}, 0.95).low)


def test_seeds_are_taken_pair_by_pair():
    found = of_pairs([1.0, 5.0, 9.0], [0.5, 4.4, 8.4], 0.95, "seeds")
    assert found.mean == pytest.approx(17 / 30)
    # By hand: differences .5, .6, .6, deviation 0.057735, Student's 4.302653 for two degrees.
    assert found.high - found.mean == pytest.approx(4.302653 * 0.057735 / math.sqrt(3), rel=1e-4)
    assert found.sure and found.unpaired > 10 * (found.high - found.low)
    assert math.isnan(of_pairs([1.0], [0.0], 0.95, "seeds").low)


@pytest.mark.parametrize(
    ("freedom", "t95", "t99"),
    [(1, 12.7062, 63.6567), (2, 4.30265, 9.92484), (3, 3.18245, 5.84091), (5, 2.57058, 4.03214),
     (10, 2.22814, 3.16927), (30, 2.04227, 2.75000)],
)  # fmt: skip
def test_students_quantile_is_that_of_the_tables(freedom: int, t95: float, t99: float):
    assert student(0.95, freedom) == pytest.approx(t95, rel=0.002)
    assert student(0.99, freedom) == pytest.approx(t99, rel=0.01)


def test_runs_of_other_clips_or_losses_are_not_compared():
    one = {
        "seed": 0,
        "optim.lr": 1.0,
        "data.source": "a",
        "objective.shift": 1.0,
        "data.num_workers": 1,
    }
    assert unlike(one, one | {"optim.lr": 2.0, "data.num_workers": 4}) == ""
    says(unlike(one, one | {"data.source": "b"}), "data.source", "a and b", "same clips")
    says(unlike(one, one | {"objective.shift": 2.0}), "losses", "same kind")


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6, unique=True))
def test_ticks_lie_within_the_axis(numbers: list[float]):
    scale = Scale(numbers)
    low, high = scale.of(min(numbers)), scale.of(max(numbers))
    slack = 1e-3 + 1e-6 * max(abs(low), abs(high))
    assert all(low - slack <= at <= high + slack for at, _ in scale.ticks())


# --- the report of real runs ---

KEYS = ["experiment=parity_tiny", "train.steps=16", "validation.every=8", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rates for one seed, trained; a third run was never started."""
    folder = tmp_path_factory.mktemp("swept") / "rates"
    jobs = [SweepRun(f"optim.lr={rate}", {"optim.lr": rate}) for rate in ("0.01", "0.1", "9")]
    for job in jobs[:2]:
        Trainer(compose([*KEYS, job.id, f'run.dir="{folder / job.id}"']).config).train()
    rates = [job.values["optim.lr"] for job in jobs]
    Sweep(folder, KEYS, {"optim.lr": rates}, jobs).write()
    return folder


def test_the_report_tells_what_the_runs_did(swept: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["sweep", "report", str(swept)]) == 0
    printed = capsys.readouterr().out
    says(printed, "sora sample --ckpt")
    assert "not started" in printed
    rows = list(csv.DictReader((swept / "sweep_report.csv").open()))
    assert [row["optim.lr"] for row in rows][-1] == "9" and rows[-1]["val/loss"] == ""
    for row in rows[:2]:
        told = json.loads((swept / row["id"] / "summary.json").read_text())
        assert float(row["val/loss"]) == told["val_loss"]
        assert row["state"] == "finished" and row["step"] == "16"
    assert sorted(rows[:2], key=lambda row: float(row["val/loss"])) == rows[:2]
    markdown = (swept / "sweep_report.md").read_text()
    assert markdown.count("| finished |") == 2
    page = (swept / "sweep_report.html").read_text()
    assert "val/loss by optim.lr" in page and page.count("<circle") == 2
    assert not re.search(r"(src|href)=\"http", page), "it needs no network"


def test_runs_of_a_sweep_are_paired(swept: Path):
    found = collect(swept)
    first = [row for row in found.rows if row.metrics]
    rows = [row.config for row in first]
    assert unlike(rows[0], rows[1]) == ""
    losses = {row.curve("train/loss")[1] for row in first}
    assert len(losses) == 1, (
        "before the first update they are one run: the same clips, the same noise"
    )
    base, compared = compare(found, "optim.lr=0.01", 0.95)
    assert base == "optim.lr=0.01"
    told = {one.name: one for one in compared}
    assert told["optim.lr=9"].difference is None and "taken a step" in told["optim.lr=9"].why
    difference = told["optim.lr=0.1"].difference
    assert difference is not None and difference.mean < 0
    assert difference.unpaired > difference.high - difference.low


def test_without_a_sweep_file_the_axes_are_where_configs_differ(swept: Path, tmp_path: Path):
    for run_dir in swept.glob("optim.lr=0*"):
        target = tmp_path / run_dir.name.replace("=", "-")
        target.symlink_to(run_dir)
    found = collect(tmp_path)
    assert found.axes == {"optim.lr": ["0.01", "0.1"]}
    assert [row.final("val/loss") for row in found.rows] == [
        row.final("val/loss") for row in collect(swept).rows[:2]
    ]


def test_seeds_are_repetitions_of_one_group():
    rows = [
        Row(
            f"{lr}-{seed}",
            {"optim.lr": lr, "seed": seed},
            "finished",
            "",
            1,
            [{"step": 1, "val/loss": value}],
        )
        for lr, seed, value in (("1", "0", 1.0), ("1", "1", 2.0), ("2", "0", 1.5), ("2", "1", 2.6))
    ]
    from sora_train.tools.sweep.report.rows import SweepResults, ordered

    found = SweepResults(
        Path("x"),
        {"optim.lr": ["1", "2"], "seed": ["0", "1"]},
        ordered(rows, "val/loss", False),
        "val/loss",
        False,
    )
    base, (other,) = compare(found, "", 0.95)
    assert (base, other.name, other.of) == ("optim.lr=1", "optim.lr=2", "val/loss")
    assert other.difference is not None and other.difference.mean == pytest.approx(0.55)
    assert other.difference.over == "2 seeds"


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--metric", "val/los"], ("val/loss",)),
        (["--baseline", "optim.lr=7"], ("no run", "optim.lr=0.01")),
        (["--confidence", "95"], ("between 0 and 1",)),
    ],
)
def test_a_wrong_question_is_a_sentence(swept: Path, arguments: list[str], facts: tuple[str, ...]):
    with refuses(UserError, *facts):
        run(["sweep", "report", str(swept), *arguments])


def test_a_folder_without_runs_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="holds no sweep"):
        collect(tmp_path)
    with refuses(UserError, "no folder"):
        collect(tmp_path / "no")


# --- W&B's files ---


@pytest.mark.parametrize(
    "path", sorted((REPO / "configs/sweep").glob("*.yaml")), ids=lambda p: p.stem
)
def test_what_an_agent_would_start_composes(path: Path, monkeypatch: pytest.MonkeyPatch):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="wandb is not installed")
    sweep = yaml.safe_load(path.read_text())
    values = {
        key: {"value": (space.get("values") or [space.get("min")])[0]}
        for key, space in sweep["parameters"].items()
    }
    for number in ("abc12345", "def67890"):
        # An agent's own order: the command first, then the run's id.
        command = utils.create_sweep_command(list(sweep["command"]))
        monkeypatch.setenv("WANDB_RUN_ID", number)
        filled = utils.create_sweep_command_args({"args": values})
        filled |= {"env": ["/usr/bin/env"], "interpreter": ["python"]}
        words = [
            word
            for part in command
            for word in (filled[part[2:-1]] if part.startswith("${") else [part])
        ]
        assert words[:4] == ["/usr/bin/env", "python", "-m", "sora_train.train"]
        cfg = compose(words[4:]).config
        assert Path(cfg.run.dir).name == number and cfg.tracker.kinds == ("wandb",)
        assert cfg.optim.lr == next(iter(values.values()))["value"]
    with pytest.raises(ConfigError, match="did you mean"):
        compose([*words[4:], "optim.lrr=1"])


def test_a_sweep_file_is_no_choice_of_a_run():
    with pytest.raises(ConfigError):
        compose(["sweep=lr"])

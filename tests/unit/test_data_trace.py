"""`sora data trace`: rows of the tape as a run would train them, whatever the world size."""

import json
from pathlib import Path

import numpy as np
import pytest
from sentences import refuses

from sora_train import cli
from sora_train.config.compose import compose
from sora_train.config.overrides import split_settings
from sora_train.config.sections.settings import TraceSettings
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.training.pipeline.plan import cost_model

RUN = ["experiment=parity_tiny", "train.micro_batches=5", "data.shapes_clips=24"]


def traced(folder: Path, world: int, *overrides: str) -> list[dict]:
    out = folder / f"{world}.jsonl"
    own = ["steps=2:6", f"world={world}", f"out={out}"]
    assert cli.run(["data", "trace", *RUN, f"run.dir={folder}/run", *own, *overrides]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_any_world_size_traces_the_same_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    alone, three = traced(tmp_path, 1), traced(tmp_path, 3)
    assert capsys.readouterr().out.count("(max - mean) / max") == 2
    assert list(alone[0]) == ["step", "rank", "micro", "bucket", "samples", "tokens", "cost"]
    assert len(alone) == 4 * 5 and len(three) == 4 * 6
    assert [row["samples"] for row in three if row["samples"]] == [row["samples"] for row in alone]
    idle = [row for row in three if not row["samples"]]
    assert len(idle) == 4 and all(row["tokens"] == row["cost"] == 0 for row in idle)
    assert {(row["rank"], row["micro"]) for row in three} == set(np.ndindex(3, 2))


def test_ranks_that_share_their_clips_are_told_once(tmp_path: Path):
    three = traced(tmp_path, 3)
    shared = traced(tmp_path, 6, "parallel.ulysses=2")
    assert [row | {"rank": row["rank"] * 2} for row in three] == shared
    with refuses(UserError, "world=3", "multiple", "2 ranks"):
        traced(tmp_path, 3, "parallel.ulysses=2")


def test_without_a_file_the_rows_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["data", "trace", *RUN, f"run.dir={tmp_path}", "steps=0:1"]) == 0
    printed = capsys.readouterr().out
    assert [json.loads(line)["micro"] for line in printed.splitlines()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("wrong", ["steps=3", "steps=5:5", "steps=a:b", "world=0", "world=x"])
def test_a_wrong_argument_is_named(wrong: str):
    key, value = wrong.split("=")
    with pytest.raises(UserError, match=f"{key}.*{value}"):
        split_settings(TraceSettings, ["experiment=quickstart", wrong])


@pytest.mark.parametrize("trainable", ["true", "false"])
def test_costs_are_those_of_the_model_that_is_built(trainable: str):
    cfg = compose(["experiment=parity_tiny", f"text.trainable={trainable}"]).config
    built = cost_model(cfg, TextToVideo(cfg.model, cfg.text))
    assert [cost_model(cfg)(tokens) for tokens in (1, 48, 999)] == [
        built(tokens) for tokens in (1, 48, 999)
    ]

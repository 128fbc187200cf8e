"""docs/finetune.md is walked: its YAML composes as it stands, and its commands run at toy size, in their order."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from test_readme import SMALL, blocks, commands, exit_code

from sora_train.config.job import compose_arguments
from sora_train.sampling.files import save_clips

REPO = Path(__file__).resolve().parent.parent
PAGE = (REPO / "docs" / "finetune.md").read_text(encoding="utf-8")
TOY = [*SMALL, "vae=micro", "objective.time_law=uniform", "run.device=cpu"]
RUN = [
    *TOY, "train.steps=2", "checkpoint.every=1", "validation.every=1", "sample.every=0", "optim.warmup_steps=0",
    "data.max_drop_fraction=0.5", "run.threads=1",
]  # fmt: skip
SHORT = {
    "data index": ["workers=1"],
    "data report": TOY,
    "plan": [*TOY, "plan.counted=0"],
    "train": RUN,
    "data ledger": [],
    "sample": ["--steps", "1"],
    "ckpt export": [],
}
"""What is appended to a command; the base alone comes from elsewhere."""


def experiment() -> str:
    (text,) = [text for language, text in blocks(PAGE) if language == "yaml"]
    return text


def test_the_page_s_experiment_composes_and_keeps_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("my_lora.yaml").write_text(experiment())
    cfg = compose_arguments(["my_lora.yaml"]).config
    assert cfg.adapter.trigger == "zork" and cfg.checkpoint.keep_best == 1
    assert cfg.checkpoint.every % cfg.validation.every == 0, "each checkpoint has a loss to go by"
    assert "zork" in PAGE[PAGE.index("## The clips") : PAGE.index("## The run")]


@pytest.mark.slow
def test_the_page_is_walked_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    toy_clips(Path("my_clips"), 12)
    Path("my_lora.yaml").write_text(experiment())
    assert exit_code(["train", "experiment=quickstart", *RUN, "run.dir=runs/wan"]) == 0
    given = [
        line for language, text in blocks(PAGE) if language == "bash" for line in commands(text)
    ]
    for command in given:
        words = shlex.split(command)[1:]
        if words[:2] == ["ckpt", "import"]:
            continue
        (kind,) = [kind for kind in SHORT if words[: len(kind.split())] == kind.split()]
        assert exit_code([*words, *SHORT[kind]]) == 0, command
    for written in re.findall(r"--out (\S+\.safetensors)", PAGE):
        assert Path(written).stat().st_size > 0
    assert list(Path("runs/zork/ledger").glob("*.parquet"))


def toy_clips(folder: Path, count: int) -> None:
    """Clips of noise of five frames, each with a caption that has the trigger word."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (9, 32, 32, 3)).astype(np.uint8) for _ in range(count)]
    save_clips(folder, noise, ["a zork"] * count, fps=8.0, seeds=[0] * count)
    for clip in folder.glob("*.mp4"):
        clip.with_suffix(".txt").write_text(f"a zork, take {clip.stem}")
    for other in [*folder.glob("*.png"), *folder.glob("*.json")]:
        other.unlink()

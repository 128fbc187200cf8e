"""Promise 5: an unknown key, a missing weight, a dropped sample, an ignored flag is an error or is counted, never a
warning. Wrong configs and sources are in tests/integration/test_bad_input.py, decoders that break in test_6."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from sentences import refuses, says

from sora_train import checkpoint as checkpoints
from sora_train import cli
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.config.messages import validated
from sora_train.config.yaml_files import load_yaml
from sora_train.data.storage.ranges import read_bytes
from sora_train.errors import ConfigError, Fault, UserError
from sora_train.monitoring.metrics import read_metrics
from sora_train.training.trainer import Trainer

TINY = ["experiment=real_tiny", "vae=micro", "model=micro", "text=bytes_micro", "buckets=micro"]
SHORT = ["train.steps=5", "validation.every=0", "sample.every=0", "checkpoint.every=0", "run.threads=1"]  # fmt: skip


@pytest.fixture
def source(finished_run: Path, tmp_path: Path) -> Path:
    """The clips of the finished run as a plain folder: one damaged, one without a caption, one too small."""
    from sora_train.data.manifest import FILE_NAME, Manifest

    file = next((finished_run / "data" / "shapes-train").rglob(FILE_NAME))
    made = Manifest.load(file, root=file.parent)
    folder = tmp_path / "clips"
    folder.mkdir()
    videos = np.flatnonzero(made.kind == "video")[:9].tolist()
    for number, row in enumerate(videos):
        data = read_bytes(made.path(row), made.offset[row], made.length[row])
        path = folder / f"{number}.mp4"
        path.write_bytes(data if number != 1 else data[: len(data) // 2])
        if number != 2:
            path.with_suffix(".txt").write_text(made.caption[row])
    from sora_train.data.decode.video_io import encode_h264

    encode_h264(np.zeros((9, 16, 16, 3), np.uint8), 8, folder / "small.mp4")
    (folder / "small.txt").write_text("a black speck")
    return folder


def test_used_and_dropped_are_the_total_on_the_card_and_in_the_summary(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    where = [f"data.source={source}", f"run.dir={run_dir}", "data.val_clips=0"]
    cfg = compose(
        [*TINY, *SHORT, *where, "data.max_drop_fraction=0.4", "data.micro_batch=2"]
    ).config
    Trainer(cfg).train()
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    says(told, "7 used", "3 dropped", "0 failed", "10")
    for reason, name in (("unreadable", "1.mp4"), ("no_caption", "2.mp4"), ("too_small", "small.mp4")):  # fmt: skip
        assert f"dropped: 1 clips ({reason})" in told and f"{name}:" in told
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["clips"] == {"used": 7, "dropped": 3, "failed": 0, "total": 10}
    assert summary["dropped"] == {"unreadable": 1, "no_caption": 1, "too_small": 1}
    assert sum(summary["dropped"].values()) + summary["clips"]["used"] == summary["clips"]["total"]
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert sum(row["train/clips"] for row in rows) == rows[-1]["train/samples_seen"]


def test_more_drops_than_allowed_stop_the_run_before_a_step(source: Path, tmp_path: Path) -> None:
    where = [f"data.source={source}", f"run.dir={tmp_path / 'run'}", "data.val_clips=0"]
    with refuses(UserError, "3 of 10", "data.max_drop_fraction=0.29"):
        Trainer(compose([*TINY, *SHORT, *where, "data.max_drop_fraction=0.29"]).config)
    Trainer(compose([*TINY, *SHORT, *where, "data.max_drop_fraction=0.3"]).config).close()


def test_a_file_that_vanishes_is_a_fault_and_no_drop(parity_config: Callable) -> None:
    """Storage that fails is not a bad clip: nothing may be counted away."""
    trainer = Trainer(parity_config("data.max_drop_fraction=1"))
    shutil.rmtree(trainer.data.manifest.root)
    with refuses(Fault, "cannot read", "storage"):
        trainer.train()
    assert not (trainer.folder.path / "quarantine.jsonl").exists()
    assert read_metrics(trainer.folder.metrics) == []


def test_unknown_keys_are_refused_wherever_a_config_comes_from(tmp_path: Path) -> None:
    with refuses(ConfigError, "optim.lrr", "optim.lr"):
        compose(["experiment=parity_tiny", "+optim.lrr=1"])
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [parity_tiny]\noptim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=r"optim\.lrr"):
        compose([], yaml_file=mine)
    values = Config().model_dump(mode="json")
    values["trian"] = {}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with refuses(ConfigError, "trian"):
        validated(Config, load_yaml(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "experiment=parity_tiny", "--dry-run"],
        ["train", "experiment=parity_tiny", "dry_run"],
        ["sample", "--ckpt", "RUN", "--prompt", "x", "--guidance", "3"],
        ["sample", "--ckpt", "RUN", "--prompt", "x", "a second prompt without its flag"],
        ["sample", "--ckpt", "RUN", "--prompt", "x", "--guidance-scale", "0.5"],
        ["prep", "shards", "input=RUN", "output=RUN/x", "--workers", "2"],
        ["ckpt", "list", "RUN", "--all"],
    ],
    ids=" ".join,
)
def test_flags_nobody_reads_are_refused(
    arguments: list[str], finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        cli.run([argument.replace("RUN", str(finished_run)) for argument in arguments])
    assert list(tmp_path.iterdir()) == []


def test_settings_that_would_not_be_used_are_refused(source: Path, tmp_path: Path) -> None:
    table = tmp_path / "captions.jsonl"
    table.write_text('{"file": "0.mp4", "caption": "x"}\n')
    (source / "captions.jsonl").write_text('{"file": "gone.mp4", "caption": "x"}\n')
    base = [*TINY, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"gone\.mp4"):
        Trainer(compose([*base, f"data.source={source}"]).config)
    with refuses(UserError, "data.captions", "not be used"):
        Trainer(compose([*base, f"data.source={table}", f"data.captions={table}"]).config)


def test_a_missing_weight_is_named(finished_run: Path) -> None:
    from sora_train.models.text_to_video import TextToVideo

    found = checkpoints.find(finished_run)
    cfg = validated(Config, load_yaml(finished_run / "config.yaml"))
    model = TextToVideo(cfg.model, cfg.text, seed=0)
    tensors = {f"ema.{name}": value.detach() for name, value in model.named_parameters()}
    extra = next(iter(tensors.values()))
    with refuses(UserError, "missing", "ema.head.weight"):
        checkpoints.load_part(found, {**tensors, "ema.head.weight": extra}, "ema.")
    name = "ema.transformer.proj_out.weight"
    with pytest.raises(UserError, match=rf"1 left over \({name}"):
        checkpoints.load_part(found, {k: v for k, v in tensors.items() if k != name}, "ema.")


def test_a_callback_that_fails_stops_the_run(parity_config: Callable) -> None:
    class Project(Trainer):
        def callbacks(self):  # type: ignore[no-untyped-def]
            return [lambda trainer, row: 1 / 0]

    trainer = Project(parity_config())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (trainer.folder.path / "summary.json").exists()

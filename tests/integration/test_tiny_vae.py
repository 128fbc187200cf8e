"""The shipped video autoencoder: it is the one its page describes, and its task trains."""

from pathlib import Path

from sora_train.config.compose import compose
from sora_train.models.vae.autoencoder import VideoVAE, shipped_folder
from sora_train.monitoring.metrics import read_metrics
from sora_train.training.trainer import Trainer


def test_the_weights_are_those_the_page_describes() -> None:
    folder = shipped_folder("shipped:tiny_vae")
    assert VideoVAE.load(folder).digest() in (folder / "README.md").read_text()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000


def test_its_task_trains_and_writes_a_folder_others_can_name(tmp_path: Path) -> None:
    sizes = ["data.shapes_clips=40", "data.shapes_val_clips=4", "data.num_workers=1"]
    steps = ["train.steps=8", "optim.warmup_steps=2", "validation.every=4"]
    cfg = compose(["experiment=tiny_vae", f"run.dir={tmp_path}", *sizes, *steps]).config
    Trainer(cfg).train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["train/loss"] < 0.7 * rows[0]["train/loss"]
    assert rows[-1]["val/psnr"] > rows[3]["val/psnr"]
    assert VideoVAE.load(tmp_path / "vae").channels == 16

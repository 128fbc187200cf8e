"""A run goes on under a program that has keys more than the one it was begun with; and what it cut
is in its numbers."""

from pathlib import Path

from sentences import refuses

from sora_train.config.compose import compose
from sora_train.errors import ConfigError
from sora_train.training.resilience.resume import allowed_changes
from sora_train.training.trainer import Trainer


def test_a_key_that_came_later_has_its_defaults_meaning(tmp_path: Path) -> None:
    cfg = compose(["experiment=parity_tiny", f"run.dir={tmp_path}"]).config
    saved = cfg.model_dump(mode="json")
    del saved["vae"]["tile"], saved["text"]["dtype"]
    assert allowed_changes(cfg, saved) == []
    other = compose(["experiment=parity_tiny", f"run.dir={tmp_path}", "vae.tile=32"]).config
    assert allowed_changes(other, saved) == [("vae.tile", 0, 32)]
    other = compose(["experiment=parity_tiny", f"run.dir={tmp_path}", "text.dtype=bfloat16"]).config
    with refuses(ConfigError, "text.dtype", "bfloat16"):
        allowed_changes(other, saved)


def test_captions_that_are_cut_are_counted(tmp_path: Path) -> None:
    overrides = ["experiment=parity_tiny", f"run.dir={tmp_path}", "text.max_length=16"]
    trainer = Trainer(compose(overrides).config)
    try:
        rows = [trainer.train_step() for _ in range(2)]
        # Captions of the shapes world are longer than 15 bytes; the empty one is not cut.
        first, both = (row["train/captions_cut"] for row in rows)
        assert 0 < first <= rows[0]["train/clips"]
        assert first < both <= sum(row["train/clips"] for row in rows)
        assert trainer.meta().to_dict()["captions_cut"] == both
    finally:
        trainer.close()

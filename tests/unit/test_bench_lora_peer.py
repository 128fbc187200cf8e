"""The peer of an adapter's step trains as many values on the same base, and learns."""

from pathlib import Path

import pytest
import torch

from benchmarks.lora_peer import DiffusersLoop, adapter_run, peak, state_of
from benchmarks.model import diffusers_model


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ours_and_the_peer_train_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["adapter.rank=4", "adapter.alpha=4", "adapter.targets=[attention]"]
    with adapter_run(overrides) as trainer:
        cfg = trainer.cfg
        base = {
            name.replace(".base_layer.", "."): value.detach().clone()
            for name, value in trainer.engine.model.transformer.named_parameters()
            if ".lora_" not in name
        }
        clip = (
            torch.randn(2, cfg.model.in_channels, 1, 8, 8),
            torch.randn(2, 16, cfg.model.text_dim),
        )
        peer = DiffusersLoop(diffusers_model(cfg.model, base, torch.float32), cfg, "none", [clip])
        ours = sum(value.numel() for value in trainer.engine.model_state().values())
        assert sum(value.numel() for value in peer.trained) == ours
        assert (
            peak(peer.step, peer.state) > 0
            and peak(trainer.train_step, lambda: state_of(trainer.parts)) > 0
        )
        before = [value.detach().clone() for value in peer.trained]
        peer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, peer.trained, strict=True))

"""Validation: a grid of kinds, buckets and noise levels, the same at any world size, and nothing trained is touched."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_train.config.compose import compose
from sora_train.data.sample import Clip
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.monitoring.metrics import read_metrics
from sora_train.objectives import TextToVideoObjective
from sora_train.objectives.spec import build_spec
from sora_train.objectives.validation import validated_kinds, validation_loss
from sora_train.parallel.shards import full
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.training.trainer import Trainer

CPU = torch.device("cpu")
TIMES = (0.3, 0.8)
KINDS = ("t2v", "i2v", "extend_back")


class Recorded(ControlPlane):
    """A rank that is asked for its sums and told nothing of the others."""

    def __init__(self, rank: int, size: int, cp: int = 1):
        super().__init__(World(0, 1, 0, 1, CPU))
        self.world = World(rank, size, 0, size, CPU, cp=cp)
        self.asked: list[list[float]] = []

    def sum(self, values: Sequence[float]) -> list[float]:
        self.asked.append(list(values))
        return list(values)


@pytest.fixture(scope="module")
def parts() -> tuple[TextToVideo, TextToVideoObjective]:
    mix = [f"objective.conditioning.{kind}=0.2" for kind in KINDS[1:]]
    cfg = compose(["experiment=parity_tiny", *mix]).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0)
    torch.nn.init.normal_(
        model.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    return model.eval(), TextToVideoObjective(cfg, spec, vae, CPU)


def clips(rows: range = range(5)) -> list[Clip]:
    """Long clips, and two images among them."""
    found = []
    for row in rows:
        frames = 1 if row in (1, 3) else 9
        pixels = np.random.default_rng(row).integers(0, 256, (frames, 32, 32, 3), np.uint8)
        found.append(Clip(row, 0, pixels, None, 8.0, f"clip {row}", ""))
    return found


def measured(
    parts: tuple[TextToVideo, TextToVideoObjective],
    clips: list[Clip],
    control: ControlPlane,
    times: Sequence[float] = TIMES,
    kinds: Sequence[str] = KINDS,
) -> dict[str, float]:
    model, objective = parts
    return validation_loss(
        lambda batch, kind: objective.losses_at(model, batch, kind, times),
        objective.vae,
        clips,
        times,
        kinds,
        control,
    )


def test_every_world_size_measures_the_same(parts) -> None:
    alone = Recorded(0, 1)
    measured(parts, clips(), alone)
    assert len(alone.asked) == 1, "the sums meet once"
    # In pairs that share a clip's tokens, each clip is still counted once.
    for size, cp in ((2, 1), (3, 1), (7, 1), (2, 2), (6, 2)):
        ranks = [Recorded(rank, size, cp) for rank in range(size)]
        for rank in ranks:
            measured(parts, clips(), rank)
        together = np.sum([rank.asked[0] for rank in ranks], axis=0)
        np.testing.assert_allclose(together, alone.asked[0], rtol=1e-5)


def test_ranks_make_as_many_forwards_as_each_other(parts) -> None:
    """A sharded model would wait for ever for one that makes fewer."""
    model, _ = parts
    for size in (2, 3):
        calls = []
        for rank in range(size):
            count = [0]
            hook = model.transformer.register_forward_pre_hook(
                lambda *_, count=count: count.__setitem__(0, count[0] + 1)
            )
            measured(parts, clips(), Recorded(rank, size))
            hook.remove()
            calls.append(count[0])
        assert len(set(calls)) == 1 and calls[0] > 0, calls


def test_the_grid_is_made_of_its_clips(parts) -> None:
    """Each number against clips measured one at a time."""

    def one(clip: Clip, kind: str, t: float) -> float:
        return measured(parts, [clip], Recorded(0, 1), [t], [kind])["val/loss"]

    row = measured(parts, clips(), Recorded(0, 1))
    videos = [clip for clip in clips() if len(clip.pixels) > 1]  # type: ignore[arg-type]
    images = [clip for clip in clips() if len(clip.pixels) == 1]  # type: ignore[arg-type]
    for kind in KINDS[1:]:
        expected = np.mean([one(clip, kind, t) for clip in videos for t in TIMES])
        assert row[f"val/loss/{kind}"] == pytest.approx(expected, rel=1e-5)
    for name, group in (("9x32x32", videos), ("1x32x32", images)):
        expected = np.mean([one(clip, "t2v", t) for clip in group for t in TIMES])
        assert row[f"val/loss/{name}"] == pytest.approx(expected, rel=1e-5)
    for t in TIMES:
        expected = np.mean([one(clip, "t2v", t) for clip in clips()])
        assert row[f"val/loss/t{t:.2f}"] == pytest.approx(expected, rel=1e-5)
    assert row["val/loss"] == row["val/loss/t2v"]
    assert row["val/loss"] == pytest.approx(np.mean([row[f"val/loss/t{t:.2f}"] for t in TIMES]))
    assert len({round(row[f"val/loss/{kind}"], 6) for kind in KINDS}) == 3, "kinds differ"


def test_an_image_takes_no_kind_but_text(parts) -> None:
    row = measured(parts, clips(range(1, 2)), Recorded(0, 1))
    assert set(row) == {"val/loss", "val/loss/t0.30", "val/loss/t0.80"}


def test_kinds_are_those_of_the_mix_with_text_first() -> None:
    base = ["experiment=parity_tiny", "objective.conditioning.i2v=0"]
    mix = ["objective.conditioning.loop=0.5", "objective.conditioning.i2v=0.3"]
    assert validated_kinds(compose(base).config) == ("t2v",)
    assert validated_kinds(compose([*base, *mix]).config) == ("t2v", "i2v", "loop")
    assert validated_kinds(compose([*base, *mix, "validation.kinds=[loop,t2v]"]).config) == ("t2v", "loop")  # fmt: skip
    assert validated_kinds(compose([*base, "objective.conditioning.i2v=1"]).config) == ("i2v",)


def test_validating_changes_nothing_that_is_trained(parity_config: Callable) -> None:
    """Losses, gradients, weights, moments and averages: bit for bit those of a run that never validates."""
    rows, tensors = [], []
    for name, every in (("with", 1), ("without", 0)):
        cfg = parity_config(f"validation.every={every}", "train.steps=3", "optim=adamw", name=name)
        trainer = Trainer(cfg)
        seen: dict[str, torch.Tensor] = {}
        trainer.callbacks = lambda t=trainer, s=seen: [  # type: ignore[method-assign]
            lambda *_: s.update({k: v.clone() for k, v in t.parts.tensors().items()})
        ]
        trainer.train()
        found = read_metrics(Path(cfg.run.dir) / "metrics.jsonl")
        keys = ("train/loss", "train/grad_norm")
        rows.append([[row[key] for key in keys] for row in found])
        tensors.append(seen)
        assert ("val/live/loss" in found[0]) == (every == 1)
    assert rows[0] == rows[1]
    assert tensors[0].keys() == tensors[1].keys()
    pairs = zip(tensors[0].values(), tensors[1].values(), strict=True)
    assert all(torch.equal(full(one), full(other)) for one, other in pairs)

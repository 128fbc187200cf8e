"""What is drawn for a clip tells nothing of what else is drawn for it, for another clip, or in another epoch.

Laws on what training really uses, not on the primitive that makes a draw.
"""

import itertools

import numpy as np
import pytest
import torch

from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import TextToVideoObjective
from sora_train.objectives.sample_draws import draw_samples
from sora_train.objectives.spec import build_spec

CLIPS = 3000
LIMIT = 4.5 / CLIPS**0.5
"""Of a correlation of independent draws: its deviation is 1 / sqrt(clips)."""
IMPLIED = [
    ("condition dropped or none", "kind"),
    ("condition dropped or none", "frames given"),
    ("condition noised", "noise of the condition"),
]
"""Where the second is there, the first is always the same."""
SETTINGS = [
    "experiment=parity_tiny", "objective.caption_dropout=0.4", "objective.condition_dropout=0.4",
    "objective.conditioning.i2v=0", "objective.conditioning.extend=0.4",
    "objective.conditioning.extend_back=0.4", "objective.condition_noise_share=0.5",
    "data.latents=sample",
]  # fmt: skip


@pytest.fixture(scope="module")
def objective() -> TextToVideoObjective:
    cfg = compose(SETTINGS).config
    vae = VideoVAE.from_config(cfg.vae)
    spec = build_spec(cfg, vae, TextToVideo(cfg.model, cfg.text, seed=0))
    assert spec is not None
    return TextToVideoObjective(cfg, spec, vae, torch.device("cpu"))


@pytest.fixture(scope="module")
def made(objective: TextToVideoObjective) -> dict[str, np.ndarray]:
    return decisions(objective, 0)


def decisions(objective: TextToVideoObjective, epoch: int) -> dict[str, np.ndarray]:
    """Each decision about every clip as a number; NaN where it is not made."""
    keys = [(epoch, row) for row in range(CLIPS)]
    draws = draw_samples(objective.spec, 0, keys, ["said"] * CLIPS, (9, 4, 4))
    kinds, given = np.array(draws.kinds), draws.mask_BT.sum(dim=1).numpy()
    t_cond = draws.t_cond_B.numpy()
    return {
        "noise level": draws.t_B.numpy(),
        "caption dropped": np.array([prompt == "" for prompt in draws.prompts], float),
        "condition dropped or none": (kinds == "t2v").astype(float),
        "kind": np.where(kinds == "t2v", np.nan, kinds == "extend"),
        "frames given": np.where(kinds == "t2v", np.nan, given),
        "condition noised": (t_cond > 0).astype(float),
        "noise of the condition": np.where(t_cond > 0, t_cond, np.nan),
    }


def correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    both = ~np.isnan(a) & ~np.isnan(b)
    return float(np.corrcoef(a[both], b[both])[0, 1]), int(both.sum())


def test_decisions_about_a_clip_are_independent(made: dict[str, np.ndarray]) -> None:
    """A stream that two of them shared would make them one: captions dropped at low noise only, for example."""
    for one, other in itertools.combinations(made, 2):
        if (one, other) in IMPLIED:
            continue
        found, count = correlation(made[one], made[other])
        assert abs(found) < 4.5 / count**0.5, (one, other)


def test_decisions_change_with_the_epoch(
    objective: TextToVideoObjective, made: dict[str, np.ndarray]
) -> None:
    later = decisions(objective, 1)
    for name in made:
        found, count = correlation(made[name], later[name])
        assert abs(found) < 4.5 / count**0.5, name


def test_captions_are_dropped_as_often_at_any_noise_level(made: dict[str, np.ndarray]) -> None:
    low = made["noise level"] < np.median(made["noise level"])
    shares = [made["caption dropped"][half].mean() for half in (low, ~low)]
    assert shares == pytest.approx([0.4, 0.4], abs=4.5 * (0.24 / (CLIPS / 2)) ** 0.5)


def test_shares_are_those_of_the_config(made: dict[str, np.ndarray]) -> None:
    # 0.2 of the clips are t2v, and 0.4 of the others lose their frames.
    assert np.mean(made["condition dropped or none"]) == pytest.approx(0.52, abs=0.041)
    assert np.nanmean(made["kind"]) == pytest.approx(0.5, abs=0.06)
    assert np.mean(made["condition noised"]) == pytest.approx(0.5, abs=0.041)
    # Of 9 latent frames 1 to 8 are given, each number as often.
    assert np.nanmean(made["frames given"]) == pytest.approx(4.5, abs=0.27)
    # Uniform up to objective.condition_noise_max.
    assert np.nanmax(made["noise of the condition"]) == pytest.approx(0.1, abs=0.001)
    assert np.nanmean(made["noise of the condition"]) == pytest.approx(0.05, abs=0.0034)


def clips_of(rows: list[int], epochs: list[int]) -> ClipBatch:
    """The same pixels in every clip, so that only draws can tell them apart."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    clips = [
        Clip(row, epoch, pixels, None, 8.0, "said", "")
        for row, epoch in zip(rows, epochs, strict=True)
    ]
    entry = MicroBatch(0, Bucket(5, 32, 32), epochs[0], tuple(rows), tuple(epochs))
    return ClipBatch(entry, clips, [], float(len(rows)))


def test_each_clip_and_epoch_has_noise_and_latents_of_its_own(
    objective: TextToVideoObjective,
) -> None:
    """Of one clip in two epochs and of two clips in one; the noise is not what the latents were drawn with."""
    batch = clips_of([0, 1, 0, 1], [0, 0, 1, 1])
    found = objective.flow_batch(batch)
    again = objective.flow_batch(batch)
    assert torch.equal(found.noise, again.noise) and torch.equal(found.x, again.x)
    clips = [objective.encode_batch([clip], ["t2v"], torch.zeros(1, 2)).x for clip in batch.clips]
    drawn = (found.x - torch.cat(clips)).flatten(1)
    alike = torch.corrcoef(torch.cat([found.noise.flatten(1), drawn])) - torch.eye(8)
    # 512 values: a deviation of 0.044.
    assert float(alike.abs().max()) < 0.2
    assert len(set(found.t_B.tolist())) == 4


def test_another_seed_draws_anew() -> None:
    keys, shape = [(0, row) for row in range(CLIPS)], (2, 4, 4)
    cfg = compose(SETTINGS).config
    spec = build_spec(cfg, VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0))
    assert spec is not None
    one, other = (
        draw_samples(spec, seed, keys, ["said"] * CLIPS, shape).t_B.numpy() for seed in (0, 1)
    )
    assert abs(correlation(one, other)[0]) < LIMIT


def test_validation_draws_noise_of_its_own_for_each_level_and_clip(
    objective: TextToVideoObjective,
) -> None:
    """The same at every validation and in no way that of training."""
    seen: list[torch.Tensor] = []

    class Watching(TextToVideo):
        def forward(self, latents_BCTHW, t_BT, text, **rest):  # type: ignore[no-untyped-def]
            seen.append(latents_BCTHW.clone())
            return super().forward(latents_BCTHW, t_BT, text, **rest)

    model = Watching(objective.cfg.model, objective.cfg.text, seed=0)
    batch = clips_of([0, 1], [0, 0])
    levels = (0.5, 1.0)
    with torch.no_grad():
        first = objective.losses_at(model, batch.clips, "t2v", levels)
        again = objective.losses_at(model, batch.clips, "t2v", levels)
    assert again == first
    x = objective.encode_batch(batch.clips, ["t2v"] * 2, torch.zeros(2, 2)).x
    noise = [(z - (1 - t) * x) / t for z, t in zip(seen[:2], levels, strict=True)]
    training = objective.flow_batch(batch).noise
    rows = torch.cat([*noise, training]).flatten(1)
    assert float((torch.corrcoef(rows) - torch.eye(6)).abs().max()) < 0.2

"""The objective's terms, clip by clip, against the loss written out, with every weighting and both ways to average."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hand_reference import Model, clip_loss, draws_of, latents

from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import TextToVideoObjective
from sora_train.objectives.spec import build_spec

SETTINGS = [
    "experiment=parity_tiny", "seed=5", "model.fps_embed=true", "objective.time_mean=-0.3",
    "objective.time_std=1.4", "objective.shift=0.6", "objective.shift_rule=frame",
    "objective.high_noise_share=0.3", "objective.high_noise_from=0.7", "objective.caption_dropout=0.4",
    "objective.conditioning.i2v=0.5", "objective.condition_noise_share=0.4",
]  # fmt: skip
BUCKET = Bucket(9, 32, 48)
WEIGHTINGS = ("uniform", "cosmap", "min_snr")


def batch_of(rows: range, epoch: int) -> ClipBatch:
    """Noise for pixels, a caption and a rate of its own for each clip."""
    clips = [
        Clip(
            row, epoch,
            np.random.default_rng(row).integers(0, 256, (9, 32, 48, 3), np.uint8),
            None, 4.0 + row, f"caption of clip {row}", "",
        )
        for row in rows
    ]  # fmt: skip
    entry = MicroBatch(0, BUCKET, epoch, tuple(rows), (epoch,) * len(clips))
    return ClipBatch(entry, clips, [], float(len(clips)))


@pytest.mark.parametrize("reduce", ["per_sample", "per_token"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_clips_loss_is_that_by_hand(weighting: str, reduce: str) -> None:
    cfg = compose([*SETTINGS, f"objective.weighting={weighting}", f"loss.reduce={reduce}"]).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0).double()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    objective = TextToVideoObjective(cfg, spec, vae, torch.device("cpu"))
    reference = Model(cfg)
    reference.fill({name: p.detach().numpy() for name, p in model.named_parameters()})
    batch = batch_of(range(8), epoch=2)
    with torch.no_grad():
        term = objective.terms(model, batch)["velocity"]
    assert term.per_sample is not None
    expected, drawn, total = [], [], 0.0
    for clip in batch.clips:
        x = latents(vae.autoencoder, clip.pixels)
        drawn.append(draws_of(cfg, clip, tuple(x.shape[2:])))
        with torch.no_grad():
            loss, weight = clip_loss(cfg, reference, clip, x, drawn[-1])
        expected.append(float(loss))
        total += weight
    assert {one.kind for one in drawn} == {"t2v", "i2v"}
    assert any(one.kind == "i2v" and one.t_cond > 0 for one in drawn)
    assert {one.is_high for one in drawn} == {False, True}
    assert term.per_sample.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(term.sum) == pytest.approx(sum(expected), rel=1e-5)
    assert objective.weights(batch)["velocity"] == term.weight == total


def test_a_stored_embedding_comes_with_its_caption_and_not_with_the_empty_one() -> None:
    """Otherwise captions would be dropped in name only."""
    cfg = compose([*SETTINGS, "text.trainable=false"]).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0)
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    objective = TextToVideoObjective(cfg, spec, vae, torch.device("cpu"))
    whole = batch_of(range(8), epoch=2)
    clips = [replace(clip, text=np.full((3, 64), clip.row + 1, np.float32)) for clip in whole.clips]
    found = objective.flow_batch(ClipBatch(whole.micro_batch, clips, [], 8.0))
    dropped = [draws_of(cfg, clip, (3, 4, 6)).prompt == "" for clip in clips]
    assert set(dropped) == {False, True}
    for clip, is_dropped, text in zip(clips, dropped, found.text, strict=True):
        assert (text is None) == is_dropped
        assert text is None or float(text[0, 0]) == clip.row + 1
    embedded, mask_BS = model.embed(found.prompts, found.text)
    null = model.frozen_encoder.embedding("")
    for row in np.flatnonzero(dropped):
        assert mask_BS is not None and int(mask_BS[row].sum()) == len(null)
        torch.testing.assert_close(embedded[row, : len(null)], null)

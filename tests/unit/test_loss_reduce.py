"""`loss.reduce`: what counts alike in the mean over a step, and that the cutting into micro-batches does not."""

import functools

import numpy as np
import pytest
import torch
from sentences import refuses
from torch import Tensor

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.diffusion.flow import token_loss, velocity_loss
from sora_train.errors import ConfigError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import TextToVideoObjective
from sora_train.objectives.spec import build_spec

VIDEO, IMAGE, WIDE = Bucket(9, 32, 32), Bucket(1, 32, 32), Bucket(5, 32, 64)


@functools.cache
def parts(reduce: str) -> tuple[Config, TextToVideoObjective, TextToVideo]:
    cfg = compose(
        ["experiment=parity_tiny", f"loss.reduce={reduce}", "objective.conditioning.i2v=0.5"]
    ).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0)
    # The output layer starts at zero, and behind it no gradient would tell two losses apart.
    torch.nn.init.normal_(
        model.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    return cfg, TextToVideoObjective(cfg, spec, vae, torch.device("cpu")), model


def batch_of(bucket: Bucket, rows: list[int]) -> ClipBatch:
    clips = [
        Clip(
            row, 0,
            np.random.default_rng(row).integers(0, 256, (bucket.frames, bucket.height, bucket.width, 3), np.uint8),
            None, 8.0, f"clip {row}", "",
        )
        for row in rows
    ]  # fmt: skip
    entry = MicroBatch(0, bucket, 0, tuple(rows), (0,) * len(rows))
    return ClipBatch(entry, clips, [], float(len(clips)))


def gradient(reduce: str, batches: list[ClipBatch]) -> tuple[Tensor, float]:
    """(gradient, loss) of one step of plain SGD over these micro-batches, as the Trainer scales it."""
    _, objective, model = parts(reduce)
    model.zero_grad()
    total = sum(objective.weights(batch)["velocity"] for batch in batches)
    loss = 0.0
    for batch in batches:
        part = objective.terms(model, batch)["velocity"].sum / max(total, 1.0)
        part.backward()
        loss += float(part.detach())
    grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]  # fmt: skip
    return torch.cat(grads), loss


@pytest.mark.parametrize("reduce", ["per_sample", "per_token"])
def test_the_announced_weight_is_the_weight_of_the_sum(reduce: str):
    """Known before any forward, and exactly what the loss sums over."""
    _, objective, model = parts(reduce)
    for batch in (batch_of(VIDEO, list(range(6))), batch_of(IMAGE, [1, 2]), batch_of(WIDE, [7])):
        weight = objective.weights(batch)["velocity"]
        assert objective.terms(model, batch)["velocity"].weight == weight
        flow = objective.flow_batch(batch)
        if reduce == "per_token":
            tokens = objective.token_grid(batch)[1]
            assert float(flow.token_loss(model, tokens)[1]) == weight
            assert weight == float((1 - flow.mask_BT).sum()) * tokens
        else:
            assert weight == len(batch.clips)
    assert objective.weights(batch_of(VIDEO, []))["velocity"] == 0


@pytest.mark.parametrize("reduce", ["per_sample", "per_token"])
def test_what_is_told_of_each_clip_adds_up_to_the_sum(reduce: str):
    _, objective, model = parts(reduce)
    rows = [0, 1, 2, 5]
    whole = objective.terms(model, batch_of(VIDEO, rows))["velocity"]
    assert whole.per_sample is not None and not whole.per_sample.requires_grad
    assert float(whole.per_sample.sum()) == pytest.approx(float(whole.sum.detach()), rel=1e-6)
    alone = [objective.terms(model, batch_of(VIDEO, [row]))["velocity"] for row in rows]
    assert whole.per_sample.tolist() == pytest.approx(
        [float(term.sum.detach()) for term in alone], rel=1e-4
    )


def test_given_frames_are_no_tokens_trained_on():
    cfg, objective, _ = parts("per_token")
    latent = objective.vae.latent_shape(VIDEO.frames, VIDEO.height, VIDEO.width)
    a_frame = latent[2] // cfg.model.patch_size[1] * (latent[3] // cfg.model.patch_size[2])
    weights = {objective.weights(batch_of(VIDEO, [row]))["velocity"] for row in range(12)}
    assert weights == {latent[1] * a_frame, (latent[1] - 1) * a_frame}


@pytest.mark.parametrize("reduce", ["per_sample", "per_token"])
def test_cutting_a_step_otherwise_gives_the_same_gradient(reduce: str):
    whole, loss = gradient(reduce, [batch_of(VIDEO, [0, 1, 2, 3]), batch_of(IMAGE, [4, 5])])
    cut = [(VIDEO, [2]), (IMAGE, [5]), (VIDEO, [3, 0, 1]), (IMAGE, [4]), (VIDEO, [])]
    other, other_loss = gradient(reduce, [batch_of(bucket, rows) for bucket, rows in cut])
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert whole.norm() > 0
    torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_per_token_a_video_outweighs_an_image():
    batches = [batch_of(VIDEO, [0]), batch_of(IMAGE, [4])]
    losses = {}
    for reduce in ("per_sample", "per_token"):
        video, image, both = (gradient(reduce, part)[1] for part in ([batches[0]], [batches[1]], batches))  # fmt: skip
        losses[reduce] = video, image, both
        _, objective, _ = parts(reduce)
        a, b = (objective.weights(batch)["velocity"] for batch in batches)
        assert both == pytest.approx((a * video + b * image) / (a + b), rel=1e-5)
    assert losses["per_sample"][:2] == pytest.approx(losses["per_token"][:2], rel=1e-5), (
        "alone, a clip's mean is the same either way"
    )
    assert losses["per_sample"][2] != pytest.approx(losses["per_token"][2], rel=1e-3)


def test_token_loss_is_the_slow_sum_and_ignores_what_is_given():
    generator = torch.Generator().manual_seed(0)
    v, x, noise = (torch.randn(2, 4, 3, 2, 4, generator=generator) for _ in range(3))
    kept = torch.tensor([[1.0, 1, 1], [0, 1, 1]])
    expected = sum(
        float((v - (noise - x))[b, :, t, :, 2 * q : 2 * q + 2].square().mean())
        for b in range(2)
        for t in range(3)
        for q in range(2)
        if kept[b, t]
    )  # patches of 2 x 2: two tokens a frame
    v[1, :, 0] = torch.nan
    loss, weight = token_loss(v, x, noise, kept, tokens_per_frame=2)
    assert float(weight) == 10
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    one = slice(0, 1)
    mean = velocity_loss(v[one], x[one], noise[one], kept[one])[0]
    assert float(token_loss(v[one], x[one], noise[one], kept[one], 2)[0]) == pytest.approx(6 * float(mean))  # fmt: skip


def test_the_autoencoder_has_no_tokens_to_reduce_over():
    with refuses(ConfigError, "loss.reduce=per_token", "task=text_to_video"):
        compose(["experiment=tiny_vae", "loss.reduce=per_token"])

"""`loss.reduce`: what counts alike in the mean over a step, and that the cutting into micro-batches does not."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses
from torch import Tensor

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.diffusion.flow import frame_losses, velocity_losses
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
            assert weight == float(flow.counted_BT.sum()) * tokens
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


@pytest.mark.parametrize("reduce", ["per_sample", "per_token"])
@settings(max_examples=6, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), max_size=4, unique=True),
    bucket=st.sampled_from([VIDEO, IMAGE, WIDE]),
)
def test_weights_terms_and_descriptions_agree(reduce: str, rows: list[int], bucket: Bucket):
    """All three see the same draws, whichever is asked for first and how ever often."""
    _, objective, model = parts(reduce)
    batch = batch_of(bucket, rows)
    described, weight = objective.describe(batch), objective.weights(batch)["velocity"]
    with torch.no_grad():
        flow, term = objective.flow_batch(batch), objective.terms(model, batch)["velocity"]
    assert len(described) == len(rows) and list(term.info) == described == objective.describe(batch)
    assert weight == term.weight == sum(info.weight for info in described)
    if not rows:
        return
    assert [info.prompt for info in described] == flow.prompts
    assert [info.t for info in described] == flow.t_B.tolist()
    assert [list(info.condition_frames or ()) for info in described] == flow.mask_BT.int().tolist()
    tokens = objective.token_grid(batch)[1]
    counted = (flow.counted_BT.sum(dim=1) * tokens).tolist()
    assert [info.weight for info in described] == (
        counted if reduce == "per_token" else [1.0] * len(rows)
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


def test_frame_losses_are_the_slow_sum_over_tokens_and_ignore_condition_frames():
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
    losses_BT = frame_losses(v, x, noise, kept)
    assert float(losses_BT.sum()) * 2 == pytest.approx(expected, rel=1e-6)
    one = slice(0, 1)
    mean = float(velocity_losses(v[one], x[one], noise[one], kept[one])[0])
    assert float(losses_BT[0].sum()) * 2 == pytest.approx(6 * mean)


def test_the_autoencoder_has_no_tokens_to_reduce_over():
    with refuses(ConfigError, "loss.reduce=per_token", "task=text_to_video"):
        compose(["experiment=tiny_vae", "loss.reduce=per_token"])

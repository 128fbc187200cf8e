"""The objective's proofs: what the model is shown, that loss and sampler are one, and that each task can be learned."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.diffusion import flow, timesteps
from sora_train.diffusion.condition_frames import (
    encode_condition_frames,
    pixel_mask,
    there_and_back,
)
from sora_train.diffusion.condition_masks import KINDS, STILL_KINDS
from sora_train.diffusion.sampler import sample_ode
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import FlowBatch, SampleDraws, TextToVideoObjective, to_pixels
from sora_train.objectives.sample_draws import draw_samples, frame_masks
from sora_train.objectives.spec import build_spec

CPU = torch.device("cpu")
MIX = [f"objective.conditioning.{kind}=0.09" for kind in KINDS if kind != "t2v"]
Parts = tuple[Config, TextToVideoObjective, TextToVideo]


def built(*overrides: str) -> Parts:
    cfg = compose(["experiment=parity_tiny", *overrides]).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0)
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    return cfg, TextToVideoObjective(cfg, spec, vae, CPU), model


@functools.cache
def mixed() -> Parts:
    return built(*MIX, "loss.reduce=per_token", "objective.condition_dropout=0.1",
                 "objective.condition_noise_share=0.5", "objective.weighting=cosmap")  # fmt: skip


def walking(row: int = 0, frames: int = 13, size: int = 32) -> Clip:
    """A bright square that walks over a gradient."""
    pixels = np.tile(np.linspace(20, 120, size), (frames, size, 3, 1)).transpose(0, 1, 3, 2)
    pixels = pixels.astype(np.uint8)
    for f in range(frames):
        pixels[f, 8:20, (row + f) % 20 : (row + f) % 20 + 10, 0] = 240
    return Clip(row, 0, pixels, None, 8.0, "a red square walks", "")


def drawn(objective: TextToVideoObjective, rows: Sequence[int], num_frames: int = 4) -> SampleDraws:
    """The draws of rows with clips of so many latent frames."""
    keys = [(0, row) for row in rows]
    size = (num_frames, 4, 4)
    return draw_samples(objective.spec, objective.cfg.seed, keys, ["said"] * len(keys), size)


@functools.cache
def one_of_each_kind() -> dict[str, int]:
    """A row for every kind of the mix, which its draws make that kind."""
    kinds = drawn(mixed()[1], range(300)).kinds
    return {kind: kinds.index(kind) for kind in KINDS}


def batch_of(rows: Sequence[int]) -> ClipBatch:
    entry = MicroBatch(0, Bucket(13, 32, 32), 0, tuple(rows), (0,) * len(rows))
    return ClipBatch(entry, [walking(row) for row in rows], [], float(len(rows)))


def shown_to(model: TextToVideo, call: Callable[[], Any]) -> dict[str, Any]:
    """What the model is called with."""
    seen: dict[str, Any] = {}

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, z=args[0], t=args[1])

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return seen


# --- what the model is shown ---


def test_given_frames_are_shown_at_their_own_noise_level_and_nothing_else_is() -> None:
    """Frame by frame, against z = (1 - t) x + t noise, for every kind of the mix."""
    _, objective, model = mixed()
    kinds = list(one_of_each_kind())
    found = objective.flow_batch(batch_of(list(one_of_each_kind().values())))
    assert found.condition_latents is not None and found.t_cond_B is not None
    assert 0 < int((found.t_cond_B > 0).sum()) < len(kinds), "a share of the samples"
    seen = shown_to(model, lambda: found.predict(model))
    for b, kind in enumerate(kinds):
        assert bool(found.mask_BT[b].any()) == (kind != "t2v")
        for f in range(4):
            is_condition = bool(found.mask_BT[b, f])
            t = float(found.t_cond_B[b] if is_condition else found.t_B[b])
            clean = (found.condition_latents if is_condition else found.x)[b, :, f]
            assert float(seen["t"][b, f]) == t
            z = (1 - t) * clean + t * found.noise[b, :, f]
            torch.testing.assert_close(seen["z"][b, :, f], z)
    assert torch.equal(seen["mask_BT"], found.mask_BT)


def test_training_gives_what_sampling_can_encode() -> None:
    """The condition latents of a batch are those of the known pixel frames alone, whatever the others hold."""
    _, objective, _ = mixed()
    kinds, rows = list(one_of_each_kind()), list(one_of_each_kind().values())
    mask_BT = drawn(objective, rows).mask_BT
    found = objective.encode_batch([walking(row) for row in rows], kinds, mask_BT)
    assert found.condition_latents is not None
    for i, (row, kind, mask_T) in enumerate(zip(rows, kinds, mask_BT, strict=True)):
        if not mask_T.any():
            continue
        pixels = to_pixels([walking(row)], CPU)
        if kind == "loop":
            pixels = there_and_back(pixels, dim=2)
            assert torch.equal(pixels[:, :, 0], pixels[:, :, -1])
        known = pixel_mask(kind, mask_T, 4)
        noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(row))
        sampled = torch.where(known[:, None, None] > 0, pixels, noise)
        with torch.no_grad():
            alone = encode_condition_frames(objective.vae.encode, sampled, known, 4, 4)
        conditions = torch.where(mask_T[:, None, None] > 0, found.condition_latents[i], 0.0)
        torch.testing.assert_close(conditions, alone[0], msg=kind)


def test_announced_weights_are_those_of_the_sums_for_every_kind() -> None:
    _, objective, model = mixed()
    for row in one_of_each_kind().values():
        batch = batch_of([row])
        tokens = objective.token_grid(batch)[1]
        weight = float(objective.flow_batch(batch).counted_BT.sum()) * tokens
        assert objective.weights(batch)["velocity"] == weight > 0
        assert objective.terms(model, batch)["velocity"].weight == weight


def test_conditions_and_captions_are_dropped_independently() -> None:
    _, objective, _ = built("objective.conditioning.i2v=1", "objective.caption_dropout=0.5",
                            "objective.condition_dropout=0.5")  # fmt: skip
    draws = drawn(objective, range(2000))
    no_text = [prompt == "" for prompt in draws.prompts]
    no_frames = [kind == "t2v" for kind in draws.kinds]
    assert not draws.mask_BT[torch.tensor(no_frames)].any()
    both = np.mean([a and b for a, b in zip(no_text, no_frames, strict=True)])
    assert both == pytest.approx(0.25, abs=0.04)
    assert np.mean(no_text) == pytest.approx(0.5, abs=0.04)
    assert np.mean(no_frames) == pytest.approx(0.5, abs=0.04)


def test_concatenated_conditions_are_inputs_and_every_frame_counts() -> None:
    cfg, objective, _ = mixed()
    wide = cfg.model.model_copy(update={"in_channels": 36, "mask_channel": False})
    model = TextToVideo(wide, cfg.text, seed=0)
    model.transformer.proj_out = torch.nn.Linear(wide.dim, 16 * 4)
    concat = TextToVideoObjective(
        cfg, objective.spec.replace(cond_mode="concat", condition_noise_share=0.0), objective.vae, CPU
    )  # fmt: skip
    count, kinds = len(KINDS), list(one_of_each_kind())
    batch = batch_of(list(one_of_each_kind().values()))
    found = concat.flow_batch(batch)
    seen = shown_to(model, lambda: found.predict(model))
    assert seen["z"].shape == (count, 36, 4, 4, 4)
    torch.testing.assert_close(seen["z"][:, :16], flow.interpolate(found.x, found.noise, found.t_B))
    assert torch.equal(seen["t"], found.t_B[:, None].expand(count, 4)), (
        "no frame has a time of its own"
    )
    for b, kind in enumerate(kinds):
        known = seen["z"][b, 16:20].amax(dim=(2, 3))
        assert torch.equal(known.amax(dim=0), found.mask_BT[b])
        inner = known[:, 1:].sum(dim=0)[found.mask_BT[b, 1:] > 0]
        assert (inner == (1 if kind in STILL_KINDS else 4)).all(), kind
    assert concat.weights(batch)["velocity"] == count * 4 * concat.token_grid(batch)[1]
    assert float(found.counted_BT.sum()) * 4 == concat.weights(batch)["velocity"]


def test_stored_latents_are_refused_where_pixels_are_needed() -> None:
    _, objective, _ = mixed()
    stored = Clip(3, 0, None, np.zeros((16, 4, 4, 4), np.float32), 8.0, "red", "")
    for kind in ("t2v", "i2v", "extend"):
        encoded = objective.encode_batch([stored], [kind], frame_masks([kind], 4, [0.5]))
        assert encoded.condition_latents is None
    for kind in ("i2v_last", "loop"):
        with pytest.raises(
            UserError, match=f"clip 3 comes as stored latents, and conditioning '{kind}'"
        ):
            objective.encode_batch([stored], [kind], frame_masks([kind], 4, [0.5]))  # fmt: skip


# --- loss and sampler are one ---


def assert_the_exact_velocity_is_right() -> None:
    """For data that are one clip x the best velocity at z is (z - x) / t, by the definition of the path alone.

    It must have no loss in training, and lead the sampler from noise to x and nowhere else.
    """
    spec = mixed()[1].spec.replace(num_steps=5)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 16, 4, 4, 4, generator=generator, dtype=torch.float64)
    t_B = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    z = flow.interpolate(x, noise, t_B)
    exact = (z - x) / t_B.view(-1, 1, 1, 1, 1)
    assert float(flow.velocity_losses(exact, x, noise)[0].sum()) < 1e-20, (
        "the loss of the exact velocity"
    )

    def velocity(z: Tensor, t_BT: Tensor) -> Tensor:
        return (z - x) / t_BT[:, None, :, None, None].clamp_min(1e-9)

    torch.testing.assert_close(sample_ode(velocity, noise, spec), x)


def test_loss_and_sampler_agree_on_the_exact_velocity() -> None:
    assert_the_exact_velocity_is_right()


@pytest.mark.parametrize(
    "mutant", ["sign of v", "convention of the path", "convention of the grid"]
)
def test_a_wrong_sign_or_time_is_found(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    path, grid = flow.interpolate, timesteps.sampling_times
    if mutant == "sign of v":
        monkeypatch.setattr(flow, "velocity_target", lambda x, noise: x - noise)
    elif mutant == "convention of the path":
        monkeypatch.setattr(flow, "interpolate", lambda x, noise, t: path(x, noise, 1 - t))
    else:
        monkeypatch.setattr(timesteps, "sampling_times", lambda *how: 1 - grid(*how))
    with pytest.raises(AssertionError):
        assert_the_exact_velocity_is_right()


@torch.no_grad()
def assert_latents_are_standardised(vae: VideoVAE) -> None:
    """Latents of the clips that were measured have mean 0 and deviation 1 a channel, and decode as the raw ones do."""
    pixels = torch.cat([to_pixels([walking(row)], CPU) for row in range(4)])
    latents = vae.encode(pixels)
    flat = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(dim=1), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(flat.std(dim=1), torch.ones(16), atol=1e-2, rtol=0)
    raw = vae.autoencoder.encode(pixels, return_dict=False)[0].mean
    decoded = vae.autoencoder.decode(raw, return_dict=False)[0].clamp(-1, 1)
    torch.testing.assert_close(vae.decode(latents), decoded, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mutant", ["", "not standardised", "mean forgotten", "not restored"])
def test_a_wrong_normalisation_of_latents_is_found(
    monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    vae = VideoVAE.from_config(compose(["experiment=parity_tiny"]).config.vae)
    vae.set_latent_stats(
        *vae.measure_latent_stats([to_pixels([walking(row)], CPU) for row in range(4)])
    )
    if mutant == "not standardised":
        monkeypatch.setattr(VideoVAE, "standardise", lambda self, raw: raw)
    elif mutant == "mean forgotten":
        monkeypatch.setattr(VideoVAE, "standardise", lambda self, raw: raw / self._stats(raw)[1])
    elif mutant == "not restored":
        monkeypatch.setattr(VideoVAE, "_restore", lambda self, latents: latents)
    if not mutant:
        return assert_latents_are_standardised(vae)
    with pytest.raises(AssertionError):
        assert_latents_are_standardised(vae)


# --- each task can be learned ---


@pytest.mark.slow
def test_every_task_of_the_mix_is_learned_and_sampled_back() -> None:
    """One small model, all kinds: it makes the clip again from noise and condition frames, which it leaves alone.

    Text to video has one clip to learn. The other kinds have two and an empty caption, so only condition frames tell
    which one is meant: a model that looks elsewhere makes a mixture, which keeps half of the distance or more.
    """
    overrides = ["vae=tiny", "objective.num_steps=8", "objective.shift=3"]
    _, objective, model = built(*MIX, *overrides)
    first, spec = walking(size=16), objective.spec
    assert first.pixels is not None
    second = dataclasses.replace(first, pixels=np.ascontiguousarray(255 - first.pixels[::-1]))
    guided = [kind for kind in KINDS if kind != "t2v"]
    kinds = ["t2v"] * 8 + guided * 2  # t2v has nothing to hold on to, and takes more practice
    clips, size = [first] * (8 + len(guided)) + [second] * len(guided), len(kinds)
    mask_BT = frame_masks(kinds, 4, [0.6] * size)
    shown = objective.encode_batch(clips, kinds, mask_BT)
    x, mask_BT, condition_latents = shown.x, shown.mask_BT, shown.condition_latents
    assert condition_latents is not None
    told = mask_BT.sum(dim=1)
    assert not told[:8].any() and ((told[8:] > 0) & (told[8:] < x.shape[2])).all()
    prompts = [first.caption if kind == "t2v" else "" for kind in kinds]
    fps_B, steps = torch.full((size,), 8.0), 260
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        noise = torch.randn(x.shape, generator=generator)
        t_B = spec.training_times(torch.rand(size, generator=generator), x.shape[2:])
        batch = FlowBatch(
            x, noise, t_B, mask_BT, prompts, fps_B, condition_latents=condition_latents
        )
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        (batch.loss_sum(model) / size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    text, free = model.tokenize(prompts), (mask_BT == 0)[:, None, :, None, None].expand_as(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found = sample_ode(
            lambda z, t_BT: model(z, t_BT, text, mask_BT=mask_BT),
            noise, spec, condition_latents=condition_latents, mask_BT=mask_BT,
        )  # fmt: skip
    assert torch.equal(found[~free], condition_latents[~free]), "condition frames, unchanged"

    def distance(a: Tensor, b: int) -> float:
        return float((a[b] - x[b])[free[b]].square().mean())

    left = [distance(found, b) / distance(noise, b) for b in range(size)]
    assert np.median(left[:8]) < 0.15, f"t2v keeps {left[:8]} of the noise's distance to its clip"
    for kind, kept in zip(kinds[8:], left[8:], strict=True):
        assert kept < 0.15, f"{kind} keeps {kept} of the noise's distance to its clip"


# --- a noise level for each latent frame ---


def test_frames_of_one_level_lose_what_the_clip_loses() -> None:
    """Frame-wise levels and weights that are all alike give the per-clip formula."""
    g = torch.Generator().manual_seed(0)
    v, x, noise = (torch.randn(3, 2, 4, 2, 2, generator=g) for _ in range(3))
    counted = torch.tensor([[1.0, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    factor = torch.tensor([0.5, 2.0, 3.0])
    each = factor[:, None].expand(3, 4)
    whole = flow.velocity_losses(v, x, noise, counted, time_weight=factor)[0]
    torch.testing.assert_close(
        flow.velocity_losses(v, x, noise, counted, time_weight=each)[0], whole
    )
    torch.testing.assert_close(
        flow.frame_losses(v, x, noise, counted, each),
        flow.frame_losses(v, x, noise, counted, factor),
    )


def test_each_frame_is_weighted_by_its_own_level() -> None:
    """By hand: errors 1 and 4 with weights 10 and 1, and a third frame that does not count."""
    v = torch.tensor([1.0, 2.0, 9.0]).view(1, 1, 3, 1, 1)
    zero = torch.zeros_like(v)
    counted, weight = torch.tensor([[1.0, 1, 0]]), torch.tensor([[10.0, 1, torch.inf]])
    losses, weights = flow.velocity_losses(v, zero, zero, counted, time_weight=weight)
    assert losses.tolist() == [7.0] and weights.tolist() == [1.0]
    assert flow.frame_losses(v, zero, zero, counted, weight).tolist() == [[10.0, 4.0, 0.0]]


def test_levels_of_frames_are_keyed_by_sample_and_follow_the_law() -> None:
    """A share of the clips has a level a frame, whoever else is in the batch; the others keep theirs."""
    spec = mixed()[1].spec.replace(frame_noise_share=0.5, high_noise_share=0.0)
    keys = [(0, row) for row in range(400)]
    captions, size = ["said"] * 400, (5, 4, 4)
    plain = draw_samples(spec.replace(frame_noise_share=0.0), 3, keys, captions, size)
    found = draw_samples(spec, 3, keys, captions, size)
    assert plain.t_BT is None and found.t_BT is not None
    forced = found.t_BT.std(dim=1) > 0
    assert 160 < int(forced.sum()) < 240
    assert torch.equal(found.t_BT[~forced], plain.t_B[~forced, None].expand(-1, 5))
    assert torch.equal(found.t_B[~forced], plain.t_B[~forced])
    levels = found.t_BT[forced].flatten().double()
    u = torch.linspace(0, 1, 4001)[:-1] + 1 / 8000
    law = spec.training_times(u, size).double()
    for q in (0.1, 0.5, 0.9):
        assert abs(float(levels.quantile(q) - law.quantile(q))) < 0.05
    one = draw_samples(spec, 3, keys[7:8], captions[:1], size)
    assert torch.equal(one.t_BT[0], found.t_BT[7]) and one.t_B[0] == found.t_B[7]


def test_the_model_is_shown_each_frame_at_its_own_level() -> None:
    """Noise, level and condition of every latent frame as they were drawn."""
    levels = torch.tensor([[0.9, 0.2, 0.6]])
    x, noise = torch.randn(2, 1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1)).unbind()
    mask, fps = torch.tensor([[1.0, 0, 0]]), torch.ones(1)
    batch = FlowBatch(x, noise, levels.mean(1), mask, ["said"], fps, t_BT=levels)
    model = mixed()[2]
    seen = shown_to(model, lambda: batch.predict(model))
    assert torch.equal(seen["t"], torch.cat([torch.zeros(1, 1), levels[:, 1:]], dim=1))
    torch.testing.assert_close(seen["z"], flow.interpolate(x, noise, seen["t"]))
    assert torch.equal(seen["z"][:, :, 0], x[:, :, 0])

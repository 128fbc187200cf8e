"""Masks of every kind, condition frames in the phase of their place, and the layout of concatenated conditions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses
from torch import Tensor

from sora_train.config import ConditioningConfig
from sora_train.config.compose import compose
from sora_train.diffusion import condition_frames
from sora_train.diffusion.condition_frames import (
    condition_channels,
    encode_condition_frames,
    encode_whole,
    latent_mask,
    mask_channels,
    pixel_mask,
    there_and_back,
)
from sora_train.diffusion.condition_masks import (
    HEAD_KINDS,
    KINDS,
    STILL_KINDS,
    ends_mask,
    frame_mask,
    kind_for,
)
from sora_train.errors import ConfigError
from sora_train.models.vae.autoencoder import VideoVAE

FACTOR, STEP = 4, 4
DRAWS = [(i + 0.5) / 997 for i in range(997)]


def masks(kind: str, num_frames: int) -> set[str]:
    """Every mask of a kind, one digit a frame."""
    return {"".join(f"{int(m)}" for m in frame_mask(kind, num_frames, u)) for u in DRAWS}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("t2v", {"00000"}),
        ("i2v", {"10000"}),
        ("i2v_last", {"00001"}),
        ("i2v_both", {"10001"}),
        ("loop", {"10001"}),
        ("extend", {"10000", "11000", "11100", "11110"}),
        ("extend_back", {"00001", "00011", "00111", "01111"}),
        ("infill", {"10111", "10011", "10001", "11011", "11001", "11101"}),
        ("connect", {"10001", "11011"}),
        ("every_nth", {"10101", "10010", "10001"}),
    ],
)
def test_the_masks_of_each_kind(kind: str, expected: set[str]) -> None:
    assert masks(kind, 5) == expected


def test_random_gives_any_frames() -> None:
    assert masks("random", 4) == {f"{bits:04b}" for bits in range(1, 15)}
    assert masks("random", 30) != masks("random", 31)


@given(
    kind=st.sampled_from(KINDS), num_frames=st.integers(1, 20), u=st.floats(0, 1, exclude_max=True)
)
@settings(deadline=None, max_examples=200)
def test_something_is_given_and_something_is_left_to_learn(kind, num_frames, u) -> None:
    mask = frame_mask(kind, num_frames, u)
    assert mask.shape == (num_frames,) and set(mask.tolist()) <= {0.0, 1.0}
    assert num_frames - int(mask.sum()) > 0, "one frame is free"
    assert bool(mask.any()) == (kind_for(kind, num_frames) != "t2v")
    assert kind_for(kind, 1) == "t2v"
    if kind in HEAD_KINDS:
        assert not mask.diff().clamp_min(0).any(), "a head, and nothing after it"
    pixels = pixel_mask(kind, mask, FACTOR)
    assert len(pixels) == 1 + FACTOR * (num_frames - 1)
    assert torch.equal(latent_mask(pixels, FACTOR), mask)


def test_nothing_left_free_is_refused() -> None:
    assert ends_mask(5, 2, 1).tolist() == [1, 1, 0, 0, 1]
    for head, tail in ((3, 2), (5, 0), (-1, 0)):
        with pytest.raises(ValueError, match="latent frames given"):
            ends_mask(5, head, tail)
    with pytest.raises(ValueError, match="'tail9' is unknown"):
        frame_mask("tail9", 3, 0.0)


# --- condition frames, encoded in the phase of their place ---


def stamped(pixels: Tensor) -> Tensor:
    """A causal encoder that tells what it saw: per latent how many pixel frames it is made of, their mean, and the
    first frame it remembers."""
    groups = [part for part in pixels[:, :1].split([1, *[FACTOR] * (pixels.shape[2] // FACTOR)], 2)]
    assert (pixels.shape[2] - 1) % STEP == 0, "a length that the VAE takes"
    rows = [
        torch.stack([torch.full_like(g[:, 0, 0], g.shape[2]), g[:, 0].mean(1), pixels[:, 0, 0]], 1)
        for g in groups
    ]
    return torch.stack(rows, dim=2)


def numbered(num_latents: int, known: Tensor | None = None) -> Tensor:
    """Pixels (1, 3, F, 1, 1) whose value is the frame's number; NaN where a frame is not known."""
    frames = torch.arange(1 + FACTOR * (num_latents - 1)).float()
    if known is not None:
        frames = torch.where(known > 0, frames, torch.nan)
    return frames.view(1, 1, -1, 1, 1).repeat(1, 3, 1, 1, 1)


def assert_phases_agree(kind: str, mask_T: Tensor) -> None:
    """A given latent is made of as many pixel frames as its place holds, of those frames alone."""
    known = pixel_mask(kind, mask_T, FACTOR)
    latents = condition_frames.encode_condition_frames(
        stamped, numbered(len(mask_T), known), known, FACTOR, STEP
    )[0, :, :, 0, 0]
    for i, is_condition in enumerate(mask_T.tolist()):
        count, mean, first = latents[:, i].tolist()
        if not is_condition:
            assert count == mean == 0
            continue
        assert count == (1 if i == 0 else FACTOR), f"latent {i} of {kind} has the phase of another"
        last = FACTOR * i
        own = [0] if i == 0 else list(range(last - FACTOR + 1, last + 1))
        still = kind in STILL_KINDS
        if still:
            own = [last]
        assert mean == pytest.approx(sum(own) / len(own)), f"latent {i} of {kind}"
        begin = i
        while begin > 0 and mask_T[begin - 1] and not still:
            begin -= 1
        # A run is led in by its own first frame, a still by itself.
        led_in_by = own[0] if begin == i else max(0, FACTOR * (begin - 1) + 1)
        assert first == led_in_by, f"latent {i} of {kind} remembers another frame"


@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "t2v"]),
    num_frames=st.integers(2, 9),
    u=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=100)
def test_given_latents_have_the_phase_of_their_place(kind, num_frames, u) -> None:
    assert_phases_agree(kind, frame_mask(kind, num_frames, u))


def test_the_check_of_phases_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs encoded as they are, or cut from the whole clip, the check above speaks up."""

    def as_it_is(encode, pixels, mask_F, run, factor, frame_step):
        start, stop = run
        first = max(0, factor * (stop - 1) - factor * (stop - start - 1))
        return encode(pixels[:, :, first : factor * (stop - 1) + 1])

    def cut_from_the_clip(encode, pixels, mask_F, run, factor, frame_step):
        return encode(pixels)[:, :, run[0] : run[1]]

    for wrong in (as_it_is, cut_from_the_clip):
        monkeypatch.setattr(condition_frames, "_encode_run", wrong)
        with pytest.raises(AssertionError):
            assert_phases_agree("extend_back", ends_mask(5, 0, 2))


def test_a_frame_known_in_part_is_refused() -> None:
    known = torch.zeros(9)
    known[6:8] = 1
    with refuses(ValueError, "latent frame 2", "2"):
        encode_condition_frames(stamped, numbered(3), known, FACTOR, STEP)
    with refuses(ValueError, "no frame"):
        encode_condition_frames(stamped, numbered(3), torch.zeros(9), FACTOR, STEP)


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return VideoVAE.from_config(compose(["experiment=parity_tiny"]).config.vae)


@pytest.fixture(scope="module")
def trained_vae() -> VideoVAE:
    return VideoVAE.from_config(compose(["experiment=parity_tiny", "vae=tiny"]).config.vae)


def moving(frames: int = 13, size: int = 32) -> Tensor:
    """A bright square that walks over a gradient, (1, 3, frames, size, size) in [-1, 1]."""
    background = torch.linspace(-0.8, 0.2, size).expand(3, size, size)
    clip = background[:, None].repeat(1, frames, 1, 1)
    for f in range(frames):
        clip[0, f, 8:20, 1 + f : 11 + f] = 0.9
    return clip[None]


@torch.no_grad()
def test_a_given_head_is_what_the_clip_begins_with(vae: VideoVAE) -> None:
    """So training may take it from the clip's latents, and sampling encode it alone."""
    pixels = moving()
    whole = vae.encode(pixels)
    for k in (1, 2, 3):
        known = pixel_mask("extend", ends_mask(4, k), FACTOR)
        other = torch.where(known[:, None, None] > 0, pixels, torch.nan)
        alone = encode_condition_frames(vae.encode, other, known, FACTOR, STEP)
        torch.testing.assert_close(alone[:, :, :k], whole[:, :, :k])
        assert not alone[:, :, k:].any()


@torch.no_grad()
def test_given_latents_of_a_real_vae_are_near_the_clips_own(trained_vae: VideoVAE) -> None:
    """Nearer than those of the same frames encoded as they are, whose first latent has the wrong phase."""
    vae, pixels = trained_vae, moving()
    whole = vae.encode(pixels)
    known = pixel_mask("extend_back", ends_mask(4, 0, 2), FACTOR)
    led_in = encode_condition_frames(vae.encode, pixels, known, FACTOR, STEP)[:, :, 2:]
    as_it_is = vae.encode(pixels[:, :, -5:])
    errors = [float((one - whole[:, :, 2:]).square().mean()) for one in (led_in, as_it_is)]
    assert errors[0] < 0.5 * errors[1], errors


# --- the layout of Wan's image-to-video input ---


@pytest.mark.parametrize("kind", ["i2v", "i2v_both"])
@torch.no_grad()
def test_concatenated_channels_are_those_of_the_wan_pipeline(vae: VideoVAE, kind: str) -> None:
    from diffusers import WanImageToVideoPipeline

    pixels, generator = moving(), torch.Generator().manual_seed(0)
    z = torch.randn(1, 16, 4, 4, 4, generator=generator)
    pipeline = SimpleNamespace(
        vae=vae.autoencoder,
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        config=SimpleNamespace(expand_timesteps=False),
    )
    latents, condition = WanImageToVideoPipeline.prepare_latents(
        pipeline, pixels[:, :, 0], 1, 16, 32, 32, 13, torch.float32, torch.device("cpu"), None, z,
        last_image=pixels[:, :, -1] if kind == "i2v_both" else None,
    )  # fmt: skip
    known = pixel_mask(kind, frame_mask(kind, 4, 0.0), FACTOR)
    encoded = encode_whole(vae.encode, pixels, known)
    found = torch.cat([z, condition_channels(encoded, known[None], FACTOR)], dim=1)
    assert found.shape[1] == 36
    torch.testing.assert_close(found, torch.cat([latents, condition], dim=1))


def test_mask_channels_say_which_pixel_frame_is_known() -> None:
    known = torch.zeros(1, 9)
    known[0, [0, 6]] = 1
    assert mask_channels(known, 4)[0].tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("count", [1, 5, 8, 13])
def test_a_loop_ends_as_it_begins_at_its_own_speed(count: int) -> None:
    clip = there_and_back(torch.arange(count).view(1, -1), dim=1)[0]
    assert clip[0] == clip[-1] == 0 and len(clip) == count
    assert clip.tolist() == clip.flip(0).tolist()
    assert set(clip.diff().abs().tolist()) <= {0, 1}


# --- keys ---


def test_the_config_names_every_kind() -> None:
    assert set(ConditioningConfig.model_fields) == set(KINDS) - {"t2v"}
    mix = {f"objective.conditioning.{kind}": 0.05 for kind in KINDS if kind != "t2v"}
    cfg = compose(["experiment=parity_tiny", *[f"{k}={v}" for k, v in mix.items()]]).config
    shares = dict(cfg.objective.mix)
    assert set(shares) == set(KINDS)
    assert shares["t2v"] == pytest.approx(1 - 0.05 * (len(KINDS) - 1)) and sum(
        shares.values()
    ) == pytest.approx(1)


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (
            ["objective.conditioning.i2v=0.7", "objective.conditioning.loop=0.7"],
            ("adds up to 1.4",),
        ),
        (
            ["objective.cond_mode=concat", "objective.condition_noise_share=0.5"],
            ("condition_noise_share", "cond_mode=replace"),
        ),
        (
            ["objective.conditioning.i2v=0", "objective.conditioning.infill=0.5", "data.cache=latents"],
            ("data.cache=latents", "pixels"),
        ),
        (["validation.kinds=[connect]"], ("validation.kinds", "connect")),
    ],
)  # fmt: skip
def test_a_mix_that_cannot_be_is_refused_by_its_key(
    overrides: list[str], facts: tuple[str, ...]
) -> None:
    with refuses(ConfigError, *facts):
        compose(["experiment=parity_tiny", *overrides])


def test_channels_that_do_not_fit_are_refused(vae: VideoVAE) -> None:
    from sora_train.models.text_to_video import TextToVideo
    from sora_train.objectives.spec import check_channels

    cfg = compose(["experiment=parity_tiny"]).config
    model: Any = TextToVideo(cfg.model, cfg.text, seed=0)
    check_channels("replace", vae, model)
    with refuses(ConfigError, "model.in_channels=36"):
        check_channels("concat", vae, model)

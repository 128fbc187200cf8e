"""Windows of a clip that is too large for the model: they cover it, their weights are a partition of one, and what
they make of a known flow is exact, so that there is no seam to see."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.cli import run
from sora_train.config.compose import compose
from sora_train.data.decode.probe import ProbeRequest, probe_video
from sora_train.data.decode.video_io import encode_h264
from sora_train.diffusion.draws import draw_noise
from sora_train.errors import UserError
from sora_train.evaluation.metrics import seam_ratio
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives.spec import build_spec
from sora_train.sampling.operations import SampleRequest, prepare
from sora_train.sampling.pipeline import (
    ClipShape,
    ConditionLatents,
    GuidedVelocity,
    encode_conditions,
    sample_latents,
)
from sora_train.sampling.upscale import WHOLE, Place, Windows, axis_of


@settings(max_examples=40)
@given(
    window=st.integers(1, 12),
    more=st.integers(0, 40),
    overlap=st.integers(0, 11),
    step=st.sampled_from([1, 2, 4]),
)
def test_weights_of_all_windows_are_one_everywhere(
    window: int, more: int, overlap: int, step: int
) -> None:
    window, length = window * step, (window + more) * step
    overlap = min(overlap, window - step)
    axis = axis_of(length, window, overlap, step)
    total = torch.zeros(length, dtype=torch.float64)
    for part, weights in zip(axis.parts, axis.weights, strict=True):
        assert part.start % step == 0 and part.stop <= length
        total[part] += weights
    torch.testing.assert_close(total, torch.ones(length, dtype=torch.float64))
    assert (axis.weights > 0).all()
    apart = [b - a for a, b in zip(axis.starts, axis.starts[1:], strict=False)]
    assert all(0 < gap <= window - overlap for gap in apart)
    # No more than are needed.
    assert len(axis.starts) <= 1 + -(
        -(length - window) // max(step, (window - overlap) // step * step)
    )


def test_windows_that_do_not_move_are_refused() -> None:
    with pytest.raises(ValueError, match="do not move on"):
        axis_of(20, 8, 8)


def known_flow(z: torch.Tensor, t_BT: torch.Tensor, place: Place = WHOLE) -> torch.Tensor:
    """Of each latent by itself, nonlinear, and of its frame's noise level."""
    return torch.tanh(z) * (1 + t_BT[:, None, :, None, None]) + 0.3


def test_a_flow_that_looks_at_nothing_else_is_exact() -> None:
    """Whatever the windows, a velocity that depends on a latent alone is that of the whole clip."""
    z = torch.randn(2, 3, 9, 10, 14, generator=torch.Generator().manual_seed(0)).double()
    t_BT = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)).double()
    windows = Windows.over((9, 10, 14), (4, 4, 8), (1, 2, 2))
    assert windows.count > 8
    torch.testing.assert_close(windows.blend(known_flow)(z, t_BT), known_flow(z, t_BT))


def test_a_window_as_large_as_the_clip_is_the_plain_velocity() -> None:
    """Bit for bit: what is larger than the clip is cut to it."""
    z = torch.randn(1, 3, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    t_BT = torch.rand(1, 5, generator=torch.Generator().manual_seed(1))
    for window in ((5, 6, 8), (21, 60, 104)):
        windows = Windows.over((5, 6, 8), window, (1, 2, 2))
        assert windows.count == 1
        assert torch.equal(windows.blend(known_flow)(z, t_BT), known_flow(z, t_BT))


class LocalModel(torch.nn.Module):
    """A model that looks at nothing but each latent and its frame's noise level."""

    takes_mask = True

    def forward(self, z, t_BT, text, *, mask_BT=None, fps_B=None):
        return known_flow(z, t_BT) + mask_BT[:, None, :, None, None]

    def tokenize(self, prompts):
        return list(prompts)

    def embed(self, prompts, stored, sharing):
        raise AssertionError("nothing is embedded")

    def text_digest(self):
        return ""


def test_given_frames_are_shown_to_every_window_with_the_noise_of_its_place() -> None:
    """Under guidance by prompt and by given frames that carry noise, windows make what the whole clip would be."""
    draws = torch.Generator().manual_seed(0)
    noise, z = (torch.randn(2, 3, 5, 8, 8, generator=draws).double() for _ in range(2))
    mask_T = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).double()
    known = ConditionLatents(torch.zeros(1, 3, 5, 8, 8).double(), mask_T, None)
    cfg = compose(["experiment=parity_tiny", "model.mask_channel=true"]).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0)
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    spec = spec.replace(guidance_scale=3.0, condition_scale=2.0)
    velocity = GuidedVelocity(LocalModel(), spec, ["a", "b"], noise, 8.0, "", known, 0.2)
    t_BT = torch.full((2, 5), 0.7).double() * (1 - mask_T)
    windows = Windows.over((5, 8, 8), (5, 4, 4), (1, 2, 2))
    assert windows.count > 3
    torch.testing.assert_close(windows.blend(velocity)(z, t_BT), velocity(z, t_BT))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_windows_that_disagree_fade_into_each_other(axis: int) -> None:
    """Each window has a brightness of its own, the worst that a model can do: side by side their borders would be
    seen; blended none stands out from the slope between them."""
    size, window = [4, 8, 8], [4, 8, 8]
    size[axis], window[axis] = 64, 16
    windows = Windows.over(size, window, (1, 1, 1))
    levels = iter([20.0, 60.0] * windows.count)

    def own_level(z: torch.Tensor, t_BT: torch.Tensor, place: Place) -> torch.Tensor:
        return torch.full_like(z, next(levels))

    made = windows.blend(own_level)(torch.zeros(1, 3, *size), torch.zeros(1, size[0]))
    clip = made[0].permute(1, 2, 3, 0).clamp(0, 255).round().byte().numpy()
    assert clip.min() == 20 and clip.max() == 60
    seams = [seam for seam in windows.seams(axis) if 0 < seam < 64]
    cut = np.where((np.arange(64) // 16 % 2)[:, None, None, None], 60, 20).astype(np.uint8)
    assert seam_ratio(np.repeat(np.repeat(cut, 8, 1), 8, 2), [16, 32, 48]) == 40
    # A step of the fade is 40 levels over the 4 places or more that two windows share, and one more.
    assert seam_ratio(clip, seams, axis) <= 40 / 4 + 1


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames of 48x32 at 8 a second, in which edges move."""
    rows, columns = np.mgrid[:32, :48]
    frames = [128 + 100 * np.sin((columns + 2 * i) / 5) * np.cos(rows / 7) for i in range(10)]
    clip = np.repeat(np.stack(frames)[..., None], 3, -1).astype(np.uint8)
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    encode_h264(clip, 8, path)
    return path


def test_a_video_of_any_size_and_length_comes_back_as_asked(
    finished_run: Path, video: Path, tmp_path: Path
) -> None:
    """From the command on: sizes and lengths that neither VAE nor windows divide."""
    command = ["sample", "--ckpt", str(finished_run), "--prompt", "a", "--op", "upscale"]
    command += ["--video", str(video), "--size", "60x38", "--strength", "0.02", "--steps", "2"]
    run([*command, "--guidance-scale", "1", "--out", str(tmp_path)])
    made = tmp_path / "000.mp4"
    probe = probe_video(ProbeRequest(0, "a", str(made), 0, made.stat().st_size, "video"))
    assert (probe.frames, probe.width, probe.height, probe.fps) == (10, 60, 38, 8)


@pytest.fixture(scope="module")
def parts():
    """A small VAE, a small model whose output is not zero, and their spec."""
    cfg = compose(["experiment=parity_tiny"]).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text).eval()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return vae, model, build_spec(cfg, vae, model)


def test_windows_make_what_one_large_window_makes(parts, video: Path) -> None:
    """A clip no larger than a window is edited as it is without one, bit for bit."""
    vae, model, spec = parts
    shape = ClipShape(frames=17, height=64, width=64, fps=8)
    asked = SampleRequest(op="upscale", videos=(video,), size=(64, 48), strength=(0.4,))
    prepared = prepare(asked, shape, vae.geometry)
    frames = prepared.condition_frames
    assert frames.windows.count == 1 and prepared.shape == ClipShape(13, 48, 64, 8)
    conditions = encode_conditions(frames, vae, spec)
    noise = draw_noise(0, "sample", [(0, 0)], tuple(conditions.latents.shape[1:]))
    windowed = sample_latents(model, spec, ["a"], noise, 8.0, conditions=conditions)
    plain = replace(conditions, windows=None)
    assert torch.equal(windowed, sample_latents(model, spec, ["a"], noise, 8.0, conditions=plain))
    many = replace(conditions, windows=Windows.over(noise.shape[2:], (2, 4, 4), (1, 2, 2)))
    assert many.windows.count > 4
    other = sample_latents(model, spec, ["a"], noise, 8.0, conditions=many)
    assert not torch.equal(windowed, other) and other.isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": None}, ["--op upscale", "--size WxH"]),
        ({"size": (64, 48), "op": "edit"}, ["--op edit takes no --size"]),
        ({"size": (64, 48), "videos": ()}, ["--op upscale got", "--video FILE"]),
        ({"size": (64, 48), "frames_given": 4}, ["takes no --frames-given"]),
        ({"size": (64, 48), "strength": (1.5,)}, ["--strength is 1.5"]),
    ],
)
def test_what_cannot_be_upscaled_is_told(video: Path, change: dict, said: list[str]) -> None:
    with refuses(UserError, *said):
        SampleRequest(**{"op": "upscale", "videos": (video,), **change}).check()

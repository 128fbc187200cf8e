"""LPIPS: equal to a transcription of its formula in float64, a distance, frozen, and strict about its weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sentences import refuses
from torch.nn import functional as F

from sora_train.errors import ConfigError, UserError
from sora_train.models.vae.lpips import SCALE, SHIFT, WIDTHS, Lpips

CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Indices of the convolutions in torchvision's vgg16().features."""
LOOKED_AT = (2, 7, 14, 21, 28)
POOLED_AFTER = (2, 7, 14, 21)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random ones under the published names: no file of ours tells them."""
    generator = torch.Generator().manual_seed(0)
    named, before = {}, 3
    for index, width in zip(CONVS, [w for group in WIDTHS for w in group], strict=True):
        weight = torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        named[f"features.{index}.weight"] = weight
        named[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
        before = width
    for level, group in enumerate(WIDTHS):
        shape = (1, group[-1], 1, 1)
        named[f"lin{level}.model.1.weight"] = torch.rand(shape, generator=generator)
    return named


@pytest.fixture(scope="module")
def stored(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: VGG16 with its classifier in one file, the linear layers in another."""
    folder = tmp_path_factory.mktemp("lpips")
    vgg = {name: value for name, value in weights.items() if name.startswith("features")}
    torch.save(vgg | {"classifier.0.bias": torch.zeros(3)}, folder / "vgg16.pth")
    linear = {name: value for name, value in weights.items() if name.startswith("lin")}
    save_file(linear, folder / "vgg.safetensors")
    return folder


@pytest.fixture(scope="module")
def lpips(stored: Path) -> Lpips:
    return Lpips.load(str(stored))


def transcribed(weights: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Eq. 1 of arXiv:1801.03924 in float64."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)
    x, y = ((picture.double() - shift) / scale for picture in (a, b))
    total, level = torch.zeros(len(a)).double(), 0
    for index in CONVS:
        w, bias = (weights[f"features.{index}.{part}"].double() for part in ("weight", "bias"))
        x, y = (F.relu(F.conv2d(z, w, bias, padding=1)) for z in (x, y))
        if index in LOOKED_AT:
            f, g = (z / z.norm(dim=1, keepdim=True).clamp_min(1e-10) for z in (x, y))
            lin = weights[f"lin{level}.model.1.weight"].double().view(1, -1, 1, 1)
            total += (lin * (f - g) ** 2).sum(dim=1).mean(dim=(1, 2))
            level += 1
        if index in POOLED_AFTER:
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
    return total


def pictures(count: int, height: int = 32, width: int = 40) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_it_is_the_formula(lpips: Lpips, weights: dict[str, torch.Tensor]) -> None:
    a, b = pictures(4).chunk(2)
    assert torch.allclose(lpips(a, b).double(), transcribed(weights, a, b), rtol=1e-5)


def test_it_is_a_distance(lpips: Lpips) -> None:
    a, b = pictures(2).chunk(2)
    assert float(lpips(a, a)) == 0
    assert torch.allclose(lpips(a, b), lpips(b, a), rtol=1e-6)
    far, near = float(lpips(a, b)), float(lpips(a, a + 0.01 * b))
    assert 0 < near < far


def test_a_clip_is_the_mean_of_its_frames(lpips: Lpips) -> None:
    a, b = pictures(12).view(2, 2, 3, 3, 32, 40).transpose(2, 3)
    found = lpips.clips(a, b)
    frames = [[float(lpips(x[None], y[None])) for x, y in zip(*pair, strict=True)] for pair in
              zip(a.transpose(1, 2), b.transpose(1, 2), strict=True)]  # fmt: skip
    assert found.tolist() == pytest.approx([sum(clip) / 3 for clip in frames], rel=1e-5)


def test_only_the_pictures_get_a_gradient(lpips: Lpips) -> None:
    a, b = pictures(2, 16, 16).chunk(2)
    a = a.clone().requires_grad_()
    lpips.train().clips(a[:, :, None], b[:, :, None]).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in lpips.parameters())
    assert not lpips.training


def test_features_that_are_all_zero_have_a_finite_gradient(lpips: Lpips) -> None:
    """Where every channel is off, a plain root's gradient is infinite times zero."""
    dead = Lpips()
    dead.load_state_dict({name: torch.zeros_like(v) if "features" in name else v for name, v in
                          lpips.state_dict().items()})  # fmt: skip
    a = pictures(1, 16, 16).requires_grad_()
    dead(a, pictures(1, 16, 16)).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_the_digest_is_of_the_weights(lpips: Lpips, weights, stored: Path, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "one.safetensors")
    assert Lpips.load(str(tmp_path / "one.safetensors")).digest() == lpips.digest()
    other = weights | {"lin0.model.1.weight": weights["lin0.model.1.weight"] + 1}
    save_file(other, tmp_path / "two.safetensors")
    assert Lpips.load(str(tmp_path / "two.safetensors")).digest() != lpips.digest()


def test_constants_are_the_published_ones() -> None:
    assert SHIFT == (-0.030, -0.088, -0.188) and SCALE == (0.458, 0.448, 0.450)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda named: named.pop("lin3.model.1.weight"), ("lin3.model.1.weight", "missing")),
        (lambda named: named.pop("features.28.bias"), ("features.28.bias", "missing")),
        (lambda named: named.update({"features.30.bias": torch.ones(2)}), ("features.30.bias",)),
        (lambda named: named.update({"lin0.model.1.weight": torch.ones(1, 3, 1, 1)}),
         ("lin0.model.1.weight", "(1, 3, 1, 1)", "(1, 64, 1, 1)")),
        (lambda named: named.update({"lin1.model.1.weight": -named["lin1.model.1.weight"]}), ("below zero",)),
    ],
)  # fmt: skip
def test_weights_of_another_layout_are_refused(
    weights, tmp_path: Path, change, facts: tuple[str, ...]
) -> None:
    named = dict(weights)
    change(named)
    file = tmp_path / "lpips.pth"
    torch.save(named, file)
    with refuses(UserError, "vae_objective.lpips_path", *facts):
        Lpips.load(str(file))


def test_files_that_hold_none_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.pth"):
        with refuses(UserError, "lpips_path", "features.0.weight"):
            Lpips.load(str(path))
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    with refuses(UserError, "torn.safetensors", "cannot be read"):
        Lpips.load(str(tmp_path))
    torch.save([1, 2], tmp_path / "list.pth")
    with refuses(UserError, "list.pth", "tensors"):
        Lpips.load(str(tmp_path / "list.pth"))


def test_frames_too_small_for_it_are_told(lpips: Lpips) -> None:
    with refuses(ConfigError, "8x40", "too small"):
        lpips(pictures(1, 8), pictures(1, 8))

"""LPIPS: how different two pictures look, read off the features of a frozen VGG16.

d(a, b) = sum over five layers of the mean over positions of w_l . (f_l(a) - f_l(b))², with f_l of unit length at
each position (Zhang et al. 2018, arXiv:1801.03924, eq. 1). Names are those of the published files: torchvision's
VGG16 (`features.N.weight`, `features.N.bias`) and the linear layers (`lin0.model.1.weight` to `lin4...`).
"""

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sora_train.errors import ConfigError, UserError

WIDTHS: tuple[tuple[int, ...], ...] = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)
"""Output channels of the 13 convolutions, by resolution; the last of each is looked at."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of the pictures VGG16 was trained on, for pixels in [-1, 1]."""
EPS = 1e-10
SMALLEST = 2 ** (len(WIDTHS) - 1)
SUFFIXES = (".safetensors", ".pth", ".pt")
EXPECTED = (
    "the 13 convolutions of torchvision's VGG16 (features.0.weight, features.0.bias, ... features.28.bias) and the "
    "five linear layers (lin0.model.1.weight ... lin4.model.1.weight), as one .safetensors or .pth file or as two in "
    "a folder"
)


class Lpips(nn.Module):
    """Frozen, float32, and never put into a gradient: what it gives is differentiable in its inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        before = 3
        for widths in WIDTHS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        for number, widths in enumerate(WIDTHS):
            # As published: `model.0` is a dropout, which is off here.
            linear = nn.Module()
            linear.model = nn.Sequential(
                nn.Identity(), nn.Conv2d(widths[-1], 1, kernel_size=1, bias=False)
            )
            self.add_module(f"lin{number}", linear)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, path: str) -> "Lpips":
        """Strict: every weight is there in its shape, and nothing else but VGG16's classifier, which is left out.

        Raises UserError where it is not so, with what is missing.
        """
        weights = {
            name: value.float()
            for name, value in read_weights(path).items()
            if not name.startswith("classifier.")
        }
        with torch.device("meta"):
            expected = {name: value.shape for name, value in cls().state_dict().items()}
        wrong = [
            *(f"{name} is missing" for name in expected if name not in weights),
            *(f"{name} is left over" for name in weights if name not in expected),
            *(
                f"{name} is {tuple(weights[name].shape)}, not {tuple(shape)}"
                for name, shape in expected.items()
                if name in weights and weights[name].shape != shape
            ),
        ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError(
                f"vae_objective.lpips_path={path}: {', '.join(wrong[:5])}{more}; it has to hold {EXPECTED}"
            )
        negative = [name for name in weights if name.startswith("lin") and weights[name].min() < 0]
        if negative:
            raise UserError(
                f"vae_objective.lpips_path={path}: {negative[0]} has weights below zero, which make no distance; "
                "take the published linear layers"
            )
        lpips = cls()
        lpips.load_state_dict(weights)
        return lpips

    def digest(self) -> str:
        """SHA-256 of all weights, 64 hex digits."""
        sha = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            sha.update(name.encode())
            sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def train(self, mode: bool = True) -> "Lpips":
        """It stays as it is."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance (N,) of pictures (N, 3, H, W) in [-1, 1]. Raises ConfigError for frames under 16 pixels."""
        if min(a.shape[-2:]) < SMALLEST:
            raise ConfigError(
                f"vae_objective.lpips={a.shape[-2]}x{a.shape[-1]} frames are too small for VGG16, which halves them "
                f"four times; use buckets of at least {SMALLEST} pixels a side, or vae_objective.lpips=0"
            )
        distance = a.new_zeros(len(a))
        x, y = ((picture - self.shift) / self.scale for picture in (a, b))
        level = 0
        for number, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if number == self.taps[level]:
                weight = self.get_submodule(f"lin{level}.model.1").weight
                error = (unit(x) - unit(y)).square()
                distance = distance + F.conv2d(error, weight).mean(dim=(1, 2, 3))
                level += 1
        return distance

    def clips(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean distance (B,) over the frames of clips (B, 3, T, H, W)."""
        frames = a.shape[2]
        a, b = (clip.transpose(1, 2).flatten(0, 1).float() for clip in (a, b))
        distance: Tensor = self(a, b)
        return distance.view(-1, frames).mean(dim=1)


def unit(features: Tensor) -> Tensor:
    """Features of length one at each position. The root is kept off zero, where its gradient is not finite."""
    length = (features.square().sum(dim=1, keepdim=True) + EPS**2).sqrt()
    return features / (length + EPS)


def read_weights(path: str) -> dict[str, Tensor]:
    """All weights of a file, or of the files of a folder. Raises UserError where there are none to read."""
    place = Path(path).expanduser()
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise UserError(
            f"vae_objective.lpips_path={path} is no weights file ({', '.join(SUFFIXES)}) and no folder with such; it "
            f"has to hold {EXPECTED}"
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
        except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"vae_objective.lpips_path={path}: {file.name} cannot be read ({type(error).__name__}); copy it again"
            ) from error
        is_table = isinstance(tensors, dict) and all(
            isinstance(v, Tensor) for v in tensors.values()
        )
        if not is_table:
            raise UserError(
                f"vae_objective.lpips_path={path}: {file.name} is no table of tensors by name; it has to hold "
                f"{EXPECTED}"
            )
        weights |= tensors
    return weights

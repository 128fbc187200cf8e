"""Between frames as they are stored, uint8, and pixels as a VAE takes and gives them, float in [-1, 1]."""

import numpy as np
import torch
from torch import Tensor

from sora_train.device.transfer import to_device


def from_uint8(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, T, H, W, 3) -> pixels (B, 3, T, H, W), float32 in [-1, 1]."""
    moved = to_device(torch.from_numpy(frames), device)
    return moved.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_uint8(pixels_CTHW: Tensor) -> np.ndarray:
    """Pixels (3, T, H, W), those beyond [-1, 1] clamped -> uint8 (T, H, W, 3)."""
    scaled = (pixels_CTHW.float().clamp(-1, 1) + 1.0) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()

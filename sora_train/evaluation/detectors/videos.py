"""Features of whole clips by networks whose weights are given by path: I3D, and V-JEPA 2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.errors import UserError

I3D_FRAMES = 10
"""The fewest that its pooling takes."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pictures that V-JEPA was trained with."""


def i3d(clips: Sequence[np.ndarray], file: str) -> np.ndarray:
    """I3D's logits, (N, 400), by the TorchScript file that StyleGAN-V and most FVDs since use (i3d_torchscript.pt).

    Raises UserError where the file is none, or a clip has fewer than I3D_FRAMES frames.
    """
    import torch

    shortest = min(map(len, clips))
    if shortest < I3D_FRAMES:
        raise UserError(
            f"--i3d: FVD takes clips of {I3D_FRAMES} frames or more, and one has {shortest}; sample longer ones "
            "(--frames), or leave --i3d away"
        )
    network = i3d_network(file)
    rows = []
    with torch.inference_mode():
        for clip in clips:
            pixels = torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2)[None].float()
            rows.append(network(pixels, rescale=True, resize=True, return_features=True)[0])
    return torch.stack(rows).flatten(1).double().numpy()


@cache
def i3d_network(file: str) -> Any:
    """Raises UserError where the file is missing or no TorchScript."""
    import torch

    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"--i3d {file} does not exist; give the path of i3d_torchscript.pt")
    try:
        return torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"--i3d {file} cannot be loaded as TorchScript ({first}); give the path of i3d_torchscript.pt"
        ) from error


def vjepa(clips: Sequence[np.ndarray], folder: str) -> np.ndarray:
    """The mean of V-JEPA 2's tokens of each clip, (N, D), by a folder that transformers saved.

    A clip is stretched to the network's square, and of its frames as many are taken, evenly, as the network has had.
    """
    import torch

    network = vjepa_network(folder)
    side, most = network.config.crop_size, network.config.frames_per_clip
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    rows = []
    with torch.inference_mode():
        for clip in clips:
            count = max(2, min(most, len(clip)) // 2 * 2)
            places = np.linspace(0, len(clip) - 1, count).round().astype(int)
            pixels = torch.from_numpy(clip[places]).permute(0, 3, 1, 2).float() / 255
            pixels = torch.nn.functional.interpolate(
                pixels, (side, side), mode="bilinear", antialias=True
            )
            tokens = network.get_vision_features(((pixels - mean) / deviation)[None])
            rows.append(tokens[0].mean(dim=0))
    return torch.stack(rows).double().numpy()


@cache
def vjepa_network(folder: str) -> Any:
    """Raises UserError where the folder holds no V-JEPA 2."""
    from transformers import VJEPA2Model
    from transformers.utils import logging

    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise UserError(
            f"--vjepa {folder} is no folder with a config.json; give that of a V-JEPA 2"
        )
    logging.disable_progress_bar()
    try:
        return VJEPA2Model.from_pretrained(path, local_files_only=True).eval().float()
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--vjepa {folder} cannot be loaded: {first}") from error

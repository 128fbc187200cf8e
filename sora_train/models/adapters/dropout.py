"""Dropout before an adapter, drawn for each clip and layer by the clip's own key.

A clip's channels are dropped for all its tokens alike (Gal & Ghahramani 2016, arXiv:1512.05287, section 4), so the
mask is as large as a layer is wide, and the same however tokens are divided over ranks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.device.transfer import to_device
from sora_train.diffusion.draws import SampleKey, generator


class ChannelDropout(nn.Module):
    """x (B, ..., D) times a mask (B, D) that was set beforehand; outside training x itself."""

    def __init__(self, rate: float, width: int):
        super().__init__()
        self.rate, self.width = rate, width
        self.mask_BD: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.mask_BD is None:
            return x
        mask = self.mask_BD.to(x.dtype)
        return x * mask.view(len(mask), *[1] * (x.ndim - 2), self.width)


def draw_dropout(model: nn.Module, seed: int, samples: Sequence[SampleKey]) -> None:
    """Set the masks of the next forward pass, and of what backward repeats of it; nothing without dropout.

    All layers of one sample are drawn in one run of values, in the model's order.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, ChannelDropout)]
    if not layers:
        return
    rate, widths = layers[0].rate, [layer.width for layer in layers]
    uniform = np.stack(
        [
            generator(seed, "adapter_dropout", sample).random(sum(widths), dtype=np.float32)
            for sample in samples
        ]
    )
    kept = torch.from_numpy((uniform >= rate).astype(np.float32)) / (1.0 - rate)
    masks = to_device(kept, next(model.parameters()).device).split(widths, dim=1)
    for layer, mask_BD in zip(layers, masks, strict=True):
        layer.mask_BD = mask_BD

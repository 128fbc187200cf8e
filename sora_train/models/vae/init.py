"""First weights of a video autoencoder through which the picture reaches the latents and comes back.

With PyTorch's own first weights the part of a signal that differs between clips shrinks about
thirtyfold on its way through AutoencoderKLWan, while biases and norms keep the constant part:
thousands of steps pass before the decoder notices its input. Here every convolution on the straight
path keeps the variance of a single frame, residual branches start small, convolutions over time copy
or average, and the posterior starts narrow.
"""

import torch
from torch import Tensor, nn

from sora_train.models.transformer.layers import keyed_generator

BRANCH_SCALE = 0.1
POSTERIOR_LOG_VARIANCE = -6.0


@torch.no_grad()
def init_autoencoder(autoencoder: nn.Module, seed: int) -> None:
    """Fill the convolutions of an AutoencoderKLWan in place, each from (seed, its own name)."""
    for name, module in autoencoder.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            assert module.bias is not None
            module.bias.zero_()
            if name.endswith("time_conv"):
                _copy_in_time(module.weight)
            else:
                _keep_variance(module.weight, name, seed)
    channels = autoencoder.config.z_dim
    identity = torch.eye(channels)[:, :, None, None, None]
    autoencoder.quant_conv.weight.zero_()
    autoencoder.quant_conv.weight[:channels, :channels] = identity
    autoencoder.quant_conv.bias[channels:] = POSTERIOR_LOG_VARIANCE
    autoencoder.post_quant_conv.weight.copy_(identity)


def _keep_variance(weight: Tensor, name: str, seed: int) -> None:
    """Normal values for the newest frame's taps, zero for the older ones: at first each frame is on its own."""
    newest = weight[:, :, -1] if weight.ndim == 5 else weight
    fan_in = newest[0].numel()
    is_branch = name.endswith(("conv2", "proj"))
    values = torch.randn(newest.shape, generator=keyed_generator(seed, name))
    weight.zero_()
    newest.copy_(values * (BRANCH_SCALE if is_branch else 1.0) / fan_in**0.5)


def _copy_in_time(weight: Tensor) -> None:
    """Downsampling (as many channels out as in) averages two frames, upsampling shows a frame twice."""
    out_channels, in_channels = weight.shape[:2]
    weight.zero_()
    if out_channels == in_channels:
        for tap in (-1, -2):
            weight[:, :, tap, 0, 0] = 0.5 * torch.eye(in_channels)
        return
    for start in range(0, out_channels, in_channels):
        weight[start : start + in_channels, :, -1, 0, 0] = torch.eye(in_channels)

"""Validation: the loss on held-out clips at fixed noise and fixed noise levels, on the averaged weights.

The training loss says little, as each step meets other noise levels; this one can be compared from
step to step and run to run (Esser et al. 2024, arXiv:2403.03206, section 5: it follows quality).
Every clip counts the same, whatever `loss.reduce` says of training, so that two runs which differ
in it can be compared.
"""

from collections.abc import Sequence

import torch
from torch import nn

from sora_train.data.sample import Clip
from sora_train.diffusion.draws import draw_noise
from sora_train.objectives import (
    FlowBatch,
    TextToVideoObjective,
    VaeObjective,
    stored_text,
    to_pixels,
)

BATCH = 16


@torch.no_grad()
def validation_loss(
    model: nn.Module, objective: TextToVideoObjective, clips: list[Clip], times: Sequence[float]
) -> dict[str, float]:
    """`val/loss` and `val/loss/t0.10` ... over clips of any shapes, each clip counting the same."""
    sums = dict.fromkeys(times, 0.0)
    for batch in same_shape_batches(clips):
        x = objective.latents(batch)
        for t in times:
            keys = [(0, clip.row) for clip in batch]
            flow = FlowBatch(
                x=x,
                noise=draw_noise(objective.cfg.seed, f"validation {t}", keys, x.shape[1:]).to(
                    x.device
                ),
                t_B=torch.full((len(batch),), t, device=x.device),
                mask_BT=x.new_zeros(len(batch), x.shape[2]),
                prompts=[clip.caption for clip in batch],
                fps_B=torch.tensor([clip.fps for clip in batch], device=x.device),
                text=stored_text(batch, [clip.caption for clip in batch]),
            )
            sums[t] += float(flow.loss_sum(model))
    by_time = {f"val/loss/t{t:.2f}": total / len(clips) for t, total in sums.items()}
    return {"val/loss": sum(by_time.values()) / len(by_time), **by_time}


@torch.no_grad()
def validation_psnr(
    model: nn.Module, objective: VaeObjective, clips: list[Clip]
) -> dict[str, float]:
    """`val/psnr` in dB and `val/loss` (mean absolute error) of the VAE's reconstructions."""
    psnr, error = 0.0, 0.0
    for batch in same_shape_batches(clips):
        pixels = to_pixels(batch, objective.device)
        reconstruction = model(pixels, None)[0].clamp(-1, 1)
        mse_B = (reconstruction - pixels).square().flatten(1).mean(dim=1) / 4
        psnr += float((-10 * mse_B.clamp_min(1e-10).log10()).sum())
        error += float((reconstruction - pixels).abs().flatten(1).mean(dim=1).sum())
    return {"val/loss": error / len(clips), "val/psnr": psnr / len(clips)}


def same_shape_batches(clips: list[Clip]) -> list[list[Clip]]:
    """Batches of at most BATCH clips of one shape, in a fixed order."""
    by_shape: dict[tuple[int, ...], list[Clip]] = {}
    for clip in clips:
        array = clip.latents if clip.latents is not None else clip.pixels
        assert array is not None
        by_shape.setdefault(array.shape, []).append(clip)
    return [
        group[start : start + BATCH]
        for group in by_shape.values()
        for start in range(0, len(group), BATCH)
    ]

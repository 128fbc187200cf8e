"""Skips the blocks of the transformer in steps in which little changes (TeaCache, Liu et al. 2024, arXiv:2411.19108).

What the blocks add to their tokens changes slowly from step to step, and the first block's input, modulated by the
noise level, tells by how much: its relative L1 change from call to call is added up (without the polynomial that the
authors fit to each published model), and as long as the sum is below a threshold, what the blocks added last is added
again in their place. Patches, modulation and the output layer are computed in every step.

Each clip decides for itself, with and without its caption together, so it does not depend on the clips beside it.

Dimension key: B clips in each of their views (with caption, without), T latent frames, P tokens of a frame, S caption
tokens, I image tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sora_train.diffusion.sampler import Velocity
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.transformer.layers import at_least_fp32, modulate


@dataclass
class StepCache:
    """What the decisions of one batch of clips depend on, and what came of them."""

    clips: int
    threshold: float
    last: float
    """Noise level of the last step, which is computed in any case, as the first is."""
    must_compute: bool = False
    asked: int = 0
    """How often a clip came to the blocks, and how often it went through them."""
    computed: int = 0

    def around(self, velocity: Velocity) -> Velocity:
        """The same velocity, of whose noise levels the blocks hear."""

        def heard(z: Tensor, t_BT: Tensor) -> Tensor:
            self.must_compute = float(t_BT.max()) <= self.last
            return velocity(z, t_BT)

        return heard


class CachedBlocks(nn.Module):
    """Stands in the place of a transformer's blocks, as one that may answer from the call before."""

    def __init__(self, blocks: nn.ModuleList, cache: StepCache):
        super().__init__()
        self.inner, self.cache = blocks, cache
        self.seen: Tensor | None = None
        """The first block's modulated input at the call before."""
        self.added: Tensor | None = None
        """What the blocks added to the tokens of each clip when it was computed last."""
        self.change_B = torch.zeros(cache.clips)
        """How much the input has changed since then."""

    def forward(
        self,
        x_BTPD: Tensor,
        captions_BSD: Tensor,
        modulation_BT6D: Tensor,
        table: Tensor,
        key_mask_BS: Tensor | None,
        images_BID: Tensor | None = None,
    ) -> Tensor:
        skipped_B = self._decide(x_BTPD, modulation_BT6D)
        if not bool(skipped_B.any()):
            out_BTPD = self._through(
                x_BTPD, captions_BSD, modulation_BT6D, table, key_mask_BS, images_BID
            )
            self.added = out_BTPD - x_BTPD
            return out_BTPD
        assert self.added is not None
        computed_B = ~skipped_B.repeat(len(x_BTPD) // self.cache.clips).to(x_BTPD.device)
        if bool(computed_B.any()):
            out_BTPD = self._through(
                x_BTPD[computed_B],
                captions_BSD[computed_B],
                modulation_BT6D[computed_B],
                table,
                None if key_mask_BS is None else key_mask_BS[computed_B],
                None if images_BID is None else images_BID[computed_B],
            )
            self.added[computed_B] = out_BTPD - x_BTPD[computed_B]
        return x_BTPD + self.added

    def _decide(self, x_BTPD: Tensor, modulation_BT6D: Tensor) -> Tensor:
        """Which clips are skipped in this call, on the CPU."""
        cache, before = self.cache, self.seen
        self.seen = modulated_input(self.inner[0], x_BTPD, modulation_BT6D)
        # Where guidance begins or ends, there are other views than before.
        if before is None or before.shape != self.seen.shape or cache.must_compute:
            skipped_B = torch.zeros(cache.clips, dtype=torch.bool)
        else:
            self.change_B = self.change_B + relative_change(before, self.seen, cache.clips).cpu()
            skipped_B = self.change_B < cache.threshold
        self.change_B = torch.where(skipped_B, self.change_B, 0.0)
        cache.asked += cache.clips
        cache.computed += int((~skipped_B).sum())
        return skipped_B

    def _through(self, x_BTPD: Tensor, *others: Tensor | None) -> Tensor:
        for block in self.inner:
            x_BTPD = block(x_BTPD, *others)
        return x_BTPD


def modulated_input(block: nn.Module, x_BTPD: Tensor, modulation_BT6D: Tensor) -> Tensor:
    """What a block's self-attention sees of the tokens."""
    rows = (at_least_fp32(block.scale_shift_table) + modulation_BT6D).unsqueeze(3)
    shift, scale = rows[:, :, 0], rows[:, :, 1]
    return modulate(block.norm1(x_BTPD), shift, scale)


def relative_change(before: Tensor, after: Tensor, clips: int) -> Tensor:
    """Mean absolute difference over mean absolute value, of all views of each clip together, (clips,)."""
    difference_B = (after - before).abs().flatten(1).mean(1).view(-1, clips).sum(0)
    return difference_B / before.abs().flatten(1).mean(1).view(-1, clips).sum(0)


@contextmanager
def cached_steps(model: nn.Module, cache: StepCache) -> Iterator[None]:
    """Inside the block the model answers from the step before where that is near enough; a threshold of 0 is off."""
    if not cache.threshold:
        yield
        return
    assert isinstance(model, TextToVideo), "what is skipped are the blocks of our transformer"
    both = [one for one in (model.transformer, model.transformer_2) if one is not None]
    blocks = [one.blocks for one in both]
    try:
        for one in both:
            one.blocks = nn.ModuleList([CachedBlocks(one.blocks, cache)])
        yield
    finally:
        for one, own in zip(both, blocks, strict=True):
            one.blocks = own

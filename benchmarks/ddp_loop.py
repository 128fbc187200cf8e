"""The training loop that one would write in an afternoon: what `sora bench all` compares a step of the Trainer with.

The model is ours, so that what differs is the loop: DistributedDataParallel around it, torch's fused AdamW, clipping,
an average of the weights, and random latents, noise and captions that are made where they are needed. It does not mask,
weigh, record, judge, resume or read a clip.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sora_train.models.transformer.dit import VideoDiT


class DdpLoop:
    """One process group must be there. `shapes` are those of the latents of each micro-batch of a step."""

    def __init__(self, model: VideoDiT, shapes: list[tuple[int, ...]], caption: int, lr: float):
        self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        self.average = [p.detach().clone() for p in model.parameters()]
        self.shapes, self.caption, self.width = shapes, caption, model.cfg.text_dim

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for shape in self.shapes:
            yield torch.randn(shape), torch.randn(shape[0], self.caption, self.width)

    def step(self) -> float:
        total = 0.0
        for number, (x, captions) in enumerate(self.batches()):
            noise, t = torch.randn_like(x), torch.rand(len(x))
            z = torch.lerp(x, noise, t[:, None, None, None, None])
            self.model.require_backward_grad_sync = number == len(self.shapes) - 1
            v = self.model(z, t[:, None].expand(-1, x.shape[2]), captions)
            loss = (v - (noise - x)).square().mean() / len(self.shapes)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            weights = [p.detach() for p in self.model.parameters()]
            torch._foreach_lerp_(self.average, weights, 0.01)
        return total

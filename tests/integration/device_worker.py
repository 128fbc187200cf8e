"""The loss of a micro-batch and its gradients on fake tensors of another device than the host's: run by
test_devices.py in a process of its own, since PyTorch keeps the device that is registered here for as long as it lives.

Prints what came of each setting, and of each tensor that was left on the host, as JSON.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import TextToVideoObjective
from sora_train.objectives.spec import build_spec

CPU = torch.device("cpu")
NAME = "card"
LEFT = ("x", "noise", "t_B", "mask_BT", "fps_B")
GIVEN = ["objective.conditioning.i2v=0.5", "objective.condition_noise_share=0.5"]
SETTINGS = {
    "given frames": GIVEN,
    "per token, frame rates": ["loss.reduce=per_token", "model.fps_embed=true"],
    "padded as Wan": ["text.padding=wan", "model.attention=sdpa"],
}


def built(*overrides: str) -> tuple[TextToVideoObjective, TextToVideo]:
    cfg = compose(["experiment=parity_tiny", *overrides]).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0)
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    return TextToVideoObjective(cfg, spec, vae, CPU), model


def micro_batch(rows: int = 12) -> ClipBatch:
    pixels = np.zeros((13, 32, 32, 3), np.uint8)
    entry = MicroBatch(0, Bucket(13, 32, 32), 0, tuple(range(rows)), (0,) * rows)
    clips = [Clip(row, 0, pixels, None, 8.0, "a red square walks", "") for row in range(rows)]
    return ClipBatch(entry, clips, [], float(rows))


@contextmanager
def on_another_device(
    objective: TextToVideoObjective, model: TextToVideo, batch: ClipBatch
) -> Iterator[None]:
    """On the device are the weights of the networks and what the objective puts there."""
    # Draws are made on the host and read there.
    objective.draws(batch)
    keys = [(clip.epoch, clip.row) for clip in batch.clips]
    noise = objective.noise.take(keys, (objective.vae.channels, *objective.latent_size(batch)))
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        patch.setattr(objective, "device", torch.device(NAME, 0))
        # Small tensors of known values would be computed for real, on the device too.
        patch.setattr(FakeTensorMode, "may_turn_const", lambda mode, t: False)
        # And so would a copy of a tensor that was made before.
        to = Tensor.to

        def copied(x: Tensor, *where: object, **how: object) -> Tensor:
            ours = _get_current_dispatch_mode() is mode and not isinstance(x, FakeTensor)
            return to(mode.from_tensor(x) if ours else x, *where, **how)

        patch.setattr(Tensor, "to", copied)
        patch.setattr(objective, "noise", SimpleNamespace(take=lambda *asked: noise))
        for network in (model, objective.vae):
            for module in network.modules():
                for places in (module._parameters, module._buffers):
                    for name, tensor in places.items():
                        if tensor is not None:
                            patch.setitem(places, name, as_fake(tensor))
        yield


def as_fake(tensor: Tensor) -> Tensor:
    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=torch.device(NAME, 0))
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def loss(
    objective: TextToVideoObjective, model: TextToVideo, batch: ClipBatch, left: str = ""
) -> str:
    """The device of the loss after its backward pass, or the error; the tensor `left` stays on the host."""
    with on_another_device(objective, model, batch):
        flow = objective.flow_batch(batch)
        if left:
            flow = dataclasses.replace(flow, **{left: torch.zeros(getattr(flow, left).shape)})
        per_token = objective.cfg.loss.reduce == "per_token"
        try:
            found = (flow.frame_losses if per_token else flow.losses)(model).sum()
            found.backward()
        except RuntimeError as error:
            return str(error)
        grads = [p.grad.device for p in model.parameters() if p.grad is not None]
        assert grads and set(grads) == {found.device}
        return str(found.device)


def stored(batch: ClipBatch) -> ClipBatch:
    """The batch with latents and captions of a cache in place of pixels."""
    latents, text = np.zeros((16, 4, 4, 4), np.float32), np.zeros((7, 64), np.float32)
    clips = [dataclasses.replace(c, latents=latents, pixels=None, text=text) for c in batch.clips]
    return dataclasses.replace(batch, clips=clips)


def register() -> None:
    """A device without memory or kernels of its own, under PyTorch's name for those of others."""

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> object:
            return torch._C._autograd.DeviceType.PrivateUse1

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return True

        def is_built(self) -> bool:
            return True

        def has_primary_context(self, index: int) -> bool:
            return True

    torch.utils.rename_privateuse1_backend(NAME)
    torch._C._acc.register_python_privateuseone_device_guard(Guard())
    torch._C._acc.register_python_privateuseone_hook(Hooks())
    # Tensors of lists are made on the host, then moved, which the fakes see.
    torch._C._set_only_lift_cpu_tensors(True)
    answers = {
        "is_initialized": True,
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "_is_in_bad_fork": False,
        "manual_seed_all": None,
    }
    module = {
        name: staticmethod(lambda *a, answer=answer: answer) for name, answer in answers.items()
    }
    torch._register_device_module(NAME, type("Device", (), module))


def main() -> None:
    register()
    told = {name: loss(*built(*keys), micro_batch()) for name, keys in SETTINGS.items()}
    cached = built(
        "text.trainable=false", "objective.caption_dropout=0.0", "objective.conditioning.i2v=0"
    )
    told["stored"] = loss(*cached, stored(micro_batch(2)))
    parts = built(*GIVEN, "model.fps_embed=true")
    told |= {left: loss(*parts, micro_batch(), left) for left in LEFT}
    print(json.dumps(told))


if __name__ == "__main__":
    main()

"""A step asks the device for its numbers once: every place where the host would wait is known by name.

On a CPU nothing waits, so what is counted is the calls that would, by the line of this package that makes them.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sora_train
from sora_train.device.transfer import ToHost, to_device
from sora_train.diffusion.draws import draw_noise
from sora_train.objectives.noise_ahead import NoiseAhead
from sora_train.training.trainer import Trainer

ROOT = Path(sora_train.__file__).parent
WAITING = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "nonzero")
ON_HOST = {
    # What chance decides is drawn on the host and lies there.
    "diffusion/condition_masks.py",
    "diffusion/draws.py",
    "diffusion/timesteps.py",
    "objectives/sample_draws.py",
    "objectives/text_to_video.py:describe",
    "objectives/text_to_video.py:counted_tokens",
    "data/latents/cache.py",
    "training/resilience/outcome.py:unjudged_part",
    # Numbers that are on their way to other ranks over gloo.
    "runtime/control_plane.py",
    # Of tensors that have arrived on the host.
    "training/outputs/step_metrics.py",
    # Captions as the tokenizer gives them.
    "models/text/encoder.py:tokenize",
}
THE_ONE_WAIT = "training/resilience/outcome.py:read"


@contextmanager
def counted(found: Counter[str]) -> Iterator[None]:
    """Inside the block each call of a method in WAITING counts for the nearest function of this package."""
    kept = {name: getattr(Tensor, name) for name in WAITING}

    def watching(name: str) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame and not frame.f_code.co_filename.startswith(str(ROOT)):
                frame = frame.f_back
            if frame:
                file = Path(frame.f_code.co_filename).relative_to(ROOT)
                found[f"{file}:{frame.f_code.co_name}"] += 1
            return kept[name](tensor, *args, **kwargs)

        return call

    for name in WAITING:
        setattr(Tensor, name, watching(name))
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Tensor, name, method)


@pytest.mark.parametrize(
    "options",
    [
        ("parallel.param_dtype=float32",),
        ("parallel.param_dtype=bfloat16", "ema.more=[0.9]", "data.latents=sample"),
    ],
    ids=str,
)
def test_a_step_waits_for_the_device_once(parity_config: Callable, options: tuple) -> None:
    trainer = Trainer(
        parity_config(
            *options, "optim=adamw", "text.trainable=false", "data.cache=latents", "train.steps=8"
        )
    )
    try:
        # An epoch, in which captions are stored as they are met.
        for _ in range(4):
            trainer.train_step()
        found: Counter[str] = Counter()
        drawers: list[str] = []
        ahead = trainer.objective.noise
        draw, ahead._draw = (
            ahead._draw,
            lambda *batch: drawers.append(name_of_thread()) or draw(*batch),
        )
        with counted(found):
            trainer.train_step()
            trainer.train_step()
    finally:
        trainer.close()
    unknown = {
        place: calls
        for place, calls in found.items()
        if place not in ON_HOST and place.partition(":")[0] not in ON_HOST
    }
    assert unknown == {THE_ONE_WAIT: 2}
    # All noise had been foreseen.
    assert drawers and {name.partition("_")[0] for name in drawers} == {"noise"}


def name_of_thread() -> str:
    return threading.current_thread().name


def test_noise_that_was_foreseen_is_the_noise_that_was_not() -> None:
    drawn: list[tuple] = []

    def draw(samples: Any, shape: Any) -> Tensor:
        drawn.append((samples, shape))
        return draw_noise(3, "noise", samples, shape)

    ahead = NoiseAhead(draw)
    first, second = (((0, 4), (1, 7)), (2, 3, 4, 5)), (((0, 9),), (2, 1, 4, 4))
    ahead.expect([first, second])
    assert torch.equal(ahead.take(*first), draw_noise(3, "noise", *first))
    # A clip failed, so the micro-batch is another than was foreseen.
    other = (first[0][:1], first[1])
    assert torch.equal(ahead.take(*other), draw_noise(3, "noise", *other))
    ahead.expect([second])
    assert torch.equal(ahead.take(*second), draw_noise(3, "noise", *second))
    assert drawn.count(second) == 1 and drawn.count(first) == 1


def test_what_is_read_is_what_was_there_when_the_copy_began() -> None:
    """The update that is queued behind it may change the tensor."""
    tensor = torch.arange(4.0, dtype=torch.float64)
    copy = ToHost(tensor)
    tensor.zero_()
    assert copy.read().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert to_device(tensor, "cpu") is tensor

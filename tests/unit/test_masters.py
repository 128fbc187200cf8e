"""One rank computes with copies of its float32 masters: the arithmetic, what lies in memory, and what a run keeps."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import LiveBytes
from sora_train.parallel.memory.masters import Masters

BF16 = torch.bfloat16
SIZES = ((64, 48), (48, 32))


def build() -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in SIZES))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) / 8)
    return model


def clips() -> Iterator[Tensor]:
    draws = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(5, 64, generator=draws).to(BF16)


def test_gradients_of_copies_add_up_in_float32() -> None:
    """Each micro-batch's gradient is bfloat16's, their sum is not rounded to it."""
    model = build()
    masters = Masters(dict(model.named_parameters()), BF16)
    for x in clips():
        model(x).float().square().sum().backward()
    plain = build().to(BF16)
    sums = {name: torch.zeros(p.shape) for name, p in plain.named_parameters()}
    rounded = 0
    for x in clips():
        plain.zero_grad()
        plain(x).float().square().sum().backward()
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad.float()
    taken = masters.take_gradients()
    assert taken.keys() == sums.keys()
    for name, grad in taken.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, sums[name])
        rounded += not torch.equal(sums[name].to(BF16).float(), sums[name])
    assert rounded
    assert all(p.grad is None for p in model.parameters())
    assert masters.take_gradients() == {}


def test_gradients_in_float64_are_rounded_once() -> None:
    model = build()
    masters = Masters(dict(model.named_parameters()), torch.float64)
    for x in clips():
        model(x.double()).square().sum().backward()
    plain = build().double()
    for x in clips():
        plain(x.double()).square().sum().backward()
    for name, grad in masters.take_gradients().items():
        exact = plain.get_parameter(name).grad
        assert exact is not None and torch.equal(grad, exact.float())


def test_copies_follow_their_masters_and_masters_lose_nothing() -> None:
    first = {name: p.detach().clone() for name, p in build().named_parameters()}
    model = build()
    masters = Masters(dict(model.named_parameters()), BF16)
    for name, master in masters.named_parameters():
        assert torch.equal(master, first[name])
    with torch.no_grad():
        for master in masters.named.values():
            master.add_(2**-12)
    masters.copy_to_model()
    for name, copy in model.named_parameters():
        assert copy.dtype == BF16
        assert torch.equal(copy, (first[name] + 2**-12).to(BF16))


def test_frozen_weights_are_copied_and_get_no_gradient() -> None:
    model = build()
    model[0].requires_grad_(False)
    masters = Masters(dict(model.named_parameters()), BF16)
    model(next(clips())).float().sum().backward()
    assert masters.take_gradients().keys() == {"1.weight", "1.bias"}


def test_no_second_copy_of_weights_or_gradients_is_made_in_backward() -> None:
    """Above weights and copies: float32 gradients once, and the bfloat16 gradient of one weight at a time."""
    width, layers = 256, 8
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    masters = Masters(dict(model.named_parameters()), BF16)
    x = torch.ones(1, width, dtype=BF16)
    with LiveBytes() as live:
        model(x).float().sum().backward()
        highest = live.peak
    assert highest < (4 * layers + 2 * 2) * width * width
    assert len(masters.take_gradients()) == layers


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_in_bfloat16_goes_on_from_its_masters(parity_config: Callable, offload: bool) -> None:
    """Interrupted after 3 of 6 steps and resumed, it ends bit for bit where the undisturbed run does."""
    from sora_train.training.trainer import Trainer

    options = [
        "parallel.param_dtype=bfloat16",
        f"parallel.offload_optimizer={str(offload).lower()}",
        "optim.warmup_steps=0",
    ]
    whole = Trainer(parity_config(*options, "train.steps=6", name="whole"))
    whole.train()
    Trainer(parity_config(*options, "train.steps=3", name="parts")).train()
    rest = Trainer(parity_config(*options, "train.steps=6", name="parts"))
    rest.train()
    wanted, found = whole.engine.model_state(), rest.engine.model_state()
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, found[name]), name
    # The weights are no bfloat16 numbers: small updates are not lost.
    assert any(not torch.equal(w, w.to(BF16).float()) for w in wanted.values())

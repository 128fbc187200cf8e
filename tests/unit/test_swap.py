"""Blocks whose frozen matrices live on the host: the same numbers, two blocks at a time, in the order of the passes."""

import copy

import pytest
import torch
from torch import nn

from sora_train.config import Config, ModelConfig
from sora_train.models.quantised.linear import quantise_base
from sora_train.models.transformer.dit import VideoDiT
from sora_train.parallel.memory.activations import prepare_blocks
from sora_train.parallel.memory.swap import swap_blocks

CPU = torch.device("cpu")
CFG = ModelConfig(
    num_layers=8,
    num_heads=2,
    head_dim=32,
    ffn_dim=128,
    in_channels=4,
    text_dim=16,
    attention="math",
)
INPUTS = (
    torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
    torch.full((1, 2), 0.4),
    torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)),
)


def model_of(kind: str = "compute") -> VideoDiT:
    """Frozen but for one matrix of each block, whose gradients are compared."""
    model = VideoDiT(CFG)
    model.init_weights(0)
    nn.init.normal_(model.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    model.requires_grad_(False)
    for block in model.blocks:
        block.attn1.to_v.requires_grad_(True)
    quantise_base(model, kind)
    return model


def losses(model: nn.Module, steps: int = 3) -> list[float]:
    """Of a few steps of plain descent."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for _ in range(steps):
        loss = model(*INPUTS).square().mean()
        for weight, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            weight.data.sub_(grad, alpha=10.0)
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", ["compute", "nf4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_checkpointing": "full"},
        {
            "activation_checkpointing": "selective",
            "checkpoint_every": 2,
            "offload_activations": True,
        },
    ],
    ids=lambda options: ", ".join(map(str, options.values())) or "nothing",
)
@pytest.mark.parametrize("count", [3, 8])
def test_losses_are_bit_for_bit_those_without(kind: str, options: dict, count: int) -> None:
    cfg = Config()
    cfg = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=options)})
    plain = losses(model_of(kind))
    model = model_of(kind)
    prepare_blocks(model, cfg, CPU)
    swap_blocks(model, count, CPU)
    assert losses(model) == plain and len(set(plain)) == 3


def test_each_block_comes_once_a_pass_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    swapper = swap_blocks(model, 4, CPU)
    there: list[tuple[int, ...]] = []
    need = swapper.need

    def seen(place: int, after: int) -> None:
        need(place, after)
        there.append(tuple(n for n, each in enumerate(swapper.swapped) if each.present))

    monkeypatch.setattr(swapper, "need", seen)
    losses(model, 2)
    # Forward, backward; at each turn the two blocks that are needed again are still there.
    assert there == 2 * [(0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (1, 2), (0, 1), (0, 1)]
    assert swapper.fetched == [0, 1, 2, 3, 1, 0, 2, 3, 1, 0]
    with torch.no_grad():
        model(*INPUTS)
    assert there[-1] == (0, 3), "without gradients the first block comes after the last"


def test_the_device_holds_two_of_the_swapped_blocks() -> None:
    model = model_of()
    weights = {
        p.untyped_storage()._cdata: p.untyped_storage().nbytes()
        for block in model.blocks
        for p in block.parameters()
        if p.ndim == 2 and not p.requires_grad
    }
    one = sum(weights.values()) // 8
    swapper = swap_blocks(model, 6, CPU)
    losses(model, 1)
    held = sum(
        p.untyped_storage().nbytes()
        for block in model.blocks
        for p in block.parameters()
        if p.ndim == 2 and not p.requires_grad
    )
    assert held == (8 - 6 + 2) * one
    assert sum(host.nbytes for each in swapper.swapped for host in each.hosts) == 6 * one


def test_weights_without_memory_are_made_on_the_host_and_filled_there() -> None:
    whole = model_of()
    empty = copy.deepcopy(whole).to("meta")
    swap_blocks(empty, 8, CPU)
    given = {name for name, p in empty.named_parameters() if not p.is_meta}
    assert given == {
        name
        for name, p in whole.named_parameters()
        if name.startswith("blocks") and p.ndim == 2 and not p.requires_grad
    }

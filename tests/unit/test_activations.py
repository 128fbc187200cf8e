"""What blocks keep for backward: the same gradients, the same names, fewer bytes; in float64."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.memory import LiveBytes
from sora_train.config.sections.model import ModelConfig
from sora_train.models.transformer.dit import VideoDiT
from sora_train.parallel.compile import compile_blocks, graphs_compiled
from sora_train.parallel.memory import offload as offloading
from sora_train.parallel.memory.activations import checkpoint_blocks, chunk_mlps
from sora_train.parallel.memory.offload import offload_blocks

SIZES = dict(num_layers=3, num_heads=2, head_dim=16, ffn_dim=96, in_channels=4, text_dim=8)
MODES = ("none", "full", "selective")


def build(**changes: object) -> VideoDiT:
    model = VideoDiT(ModelConfig(**(SIZES | changes)))
    model.init_weights(0)
    torch.nn.init.normal_(model.proj_out.weight, generator=torch.Generator().manual_seed(1))
    return model.double()


def forward(model: VideoDiT, grid: tuple[int, int, int] = (2, 4, 4)) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    frames, rows, columns = grid
    latents = torch.randn(2, 4, frames, rows, columns, generator=draws).double()
    t_BT = torch.rand(2, frames, generator=draws).double()
    captions = torch.randn(2, 6, 8, generator=draws).double()
    return model(latents, t_BT, captions, torch.arange(6).expand(2, 6) < 4)


def step(model: VideoDiT, grid: tuple[int, int, int] = (2, 4, 4)) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    velocity = forward(model, grid)
    velocity.square().sum().backward()
    return [velocity.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def held(model: VideoDiT) -> int:
    """Bytes alive between forward and backward, what lies on the host left out."""
    offloader = offload_blocks(model) if getattr(model, "offload", False) else None
    with LiveBytes() as live:
        velocity = forward(model, (2, 16, 16))
        found = live.now - (offloader.bytes_moved if offloader else 0)
    del velocity
    return found


@pytest.mark.parametrize("attention", ["sdpa", "gemm"])
def test_gradients_are_bit_for_bit_those_of_keeping_everything(attention: str):
    """Fails where a block is computed again from another input or with other weights."""
    expected = step(build(attention=attention))
    for mode, every, keep in [
        ("full", 1, ()),
        ("full", 2, ()),
        ("selective", 1, ("attention",)),
        ("selective", 2, ("attention", "matmul")),
    ]:
        model = build(attention=attention)
        names = list(model.state_dict())
        checkpoint_blocks(model, mode, every, keep)
        assert list(model.state_dict()) == names
        for found in (step(model), step(model)):
            assert all(map(torch.equal, found, expected)), (mode, every, keep)


@pytest.mark.parametrize("mode", MODES)
def test_offloaded_gradients_are_the_same_bit_for_bit(mode: str, monkeypatch: pytest.MonkeyPatch):
    """Everything goes to the host, however small; two passes, so that stashes of a dead graph are met."""
    monkeypatch.setattr(offloading, "SMALLEST", 1)
    expected, model = step(build()), build()
    names = list(model.state_dict())
    checkpoint_blocks(model, mode)
    offloader = offload_blocks(model)
    assert list(model.state_dict()) == names
    for found in (step(model), step(model)):
        assert all(map(torch.equal, found, expected))
    assert offloader.bytes_moved > 0


def test_two_graphs_at_once_and_a_second_backward_pass_find_their_own_activations():
    plain, model = build(), build()
    offload_blocks(model)
    results = []
    for net in (plain, model):
        net.zero_grad(set_to_none=True)
        one, two = forward(net), forward(net, (3, 6, 4))
        one.square().sum().backward(retain_graph=True)
        two.square().sum().backward()
        one.square().sum().backward()
        results.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *results))


def test_what_a_backward_pass_has_read_is_let_go_block_by_block():
    model = build()
    offload_blocks(model)
    with LiveBytes() as live:
        velocity = forward(model, (2, 16, 16))
        before = live.now
        velocity.sum().backward()
        assert live.peak < 2 * before and live.now < before / 2


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_an_mlp_in_parts_computes_the_same(parts: int):
    expected, model = step(build()), build()
    names = list(model.state_dict())
    chunk_mlps(model, parts)
    assert list(model.state_dict()) == names
    for mine, theirs in zip(step(model), expected, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 * scale)
    with torch.no_grad():
        torch.testing.assert_close(forward(model), expected[0], rtol=1e-12, atol=1e-12)


def test_parts_of_no_tokens_do_no_harm():
    model = build()
    chunk_mlps(model, 1000)
    torch.testing.assert_close(step(model)[0], step(build())[0], rtol=1e-12, atol=1e-12)


def test_every_option_holds_fewer_bytes():
    """The order of what users are told in docs/memory.md."""
    found = {}
    for mode, parts, offload in itertools.product(MODES, (1, 4), (False, True)):
        model = build(ffn_dim=256)
        chunk_mlps(model, parts)
        checkpoint_blocks(model, mode)
        model.offload = offload
        found[mode, parts, offload] = held(model)
    nothing = found["none", 1, False]
    assert found["full", 1, False] < 0.2 * nothing
    assert found["full", 1, False] < found["selective", 1, False] < 0.6 * nothing
    assert found["none", 4, False] < 0.9 * nothing
    assert found["none", 1, True] < 0.6 * nothing
    assert found["full", 1, True] < found["full", 1, False]


def test_every_second_block_holds_what_lies_between():
    sizes = {}
    for every in (1, 2, 3):
        model = build()
        checkpoint_blocks(model, "full", every)
        sizes[every] = held(model)
    assert sizes[1] < sizes[2] < sizes[3] < held(build())


def note(saved: dict[int, int], x: Tensor) -> Tensor:
    saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x


@pytest.mark.slow
def test_a_memory_budget_keeps_less_and_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    """Partitioned as the code generator has it, and run as it is."""
    compile_ = torch.compile
    backend = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, backend=backend, **k))
    kept, found = {}, {}
    for budget in (1.0, 0.5, 0.1):
        torch._dynamo.reset()
        model = build()
        compile_blocks(model, "dynamic", budget)
        found[budget] = step(model)
        saved: dict[int, int] = {}
        with saved_tensors_hooks(partial(note, saved), lambda x: x):
            forward(model)
        kept[budget] = sum(saved.values())
    assert kept[0.1] < kept[0.5] < kept[1.0]
    for other in (0.5, 0.1):
        for mine, theirs in zip(found[other], found[1.0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
    compile_blocks(build(), "dynamic")


@pytest.mark.slow
def test_compiled_checkpoints_share_one_graph(monkeypatch: pytest.MonkeyPatch):
    """Traced with their guards and run as they are: code generation would take minutes."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, backend="eager", **k))
    torch._dynamo.reset()
    for mode, parts, offload in [("full", 1, True), ("selective", 1, False), ("full", 2, False)]:
        expected = build()
        model = build()
        for net in (expected, model):
            chunk_mlps(net, parts)
        checkpoint_blocks(model, mode)
        recompiles = compile_blocks(model, "dynamic")
        if offload:
            offload_blocks(model)
        before = graphs_compiled()
        for grid in ((2, 4, 4), (3, 4, 6)):
            for mine, theirs in zip(step(model, grid), step(expected, grid), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        assert graphs_compiled() - before <= 2 and recompiles.count == 0, (mode, parts)
    torch._dynamo.reset()

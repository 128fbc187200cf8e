"""Compiled blocks: the same numbers, one graph a kind of block, no new graph once warm, no way back unseen."""

import pytest
import torch
from sentences import refuses

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.config.sections.model import ModelConfig
from sora_train.errors import ConfigError, Fault
from sora_train.models.transformer.dit import Block, VideoDiT
from sora_train.parallel import compile as compiling
from sora_train.parallel.compile import (
    check_compiler,
    compile_blocks,
    graphs_compiled,
    resolve_compile,
)
from sora_train.training.card import compiled

CPU = torch.device("cpu")
SIZES = dict(num_layers=2, num_heads=2, head_dim=16, ffn_dim=48, in_channels=4, text_dim=8)
GRIDS = [(2, 4, 4), (3, 4, 6), (5, 6, 4), (2, 8, 8)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    keys = (
        "suppress_errors",
        "fail_on_recompile_limit_hit",
        "recompile_limit",
        "accumulated_recompile_limit",
    )
    before = {key: getattr(torch._dynamo.config, key) for key in keys}
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    for key, value in before.items():
        setattr(torch._dynamo.config, key, value)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch):
    """Graphs are traced with their guards and run as they are: all but the minutes of code generation."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, backend="eager", **k))


def build(**changes: object) -> VideoDiT:
    model = VideoDiT(ModelConfig(**(SIZES | changes)))
    model.init_weights(0)
    torch.nn.init.normal_(model.proj_out.weight, generator=torch.Generator().manual_seed(1))
    return model


def step(model: VideoDiT, grid: tuple[int, int, int], clips: int = 2, masked: bool = True):
    draws = torch.Generator().manual_seed(0)
    frames, rows, columns = grid
    latents = torch.randn(clips, 4, frames, rows, columns, generator=draws)
    t_BT = torch.rand(clips, frames, generator=draws)
    captions = torch.randn(clips, 6, 8, generator=draws)
    mask = torch.arange(6).expand(clips, 6) < 4 if masked else None
    model.zero_grad(set_to_none=True)
    found = model(latents, t_BT, captions, mask)
    found.square().sum().backward()
    return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("attention", "dtype"), [("math", torch.float32), ("gemm", torch.bfloat16)], ids=str
)
def test_dynamic_blocks_share_one_graph_and_never_compile_again(
    attention: str, dtype: torch.dtype, traced_only: None
):
    plain, compiled = build(attention=attention).to(dtype), build(attention=attention).to(dtype)
    names = list(compiled.state_dict())
    recompiles = compile_blocks(compiled, "dynamic")
    assert list(compiled.state_dict()) == names
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    before = graphs_compiled()
    for grid in GRIDS:
        for a, b in zip(step(compiled, grid), step(plain, grid), strict=True):
            scale = float(b.float().abs().max())
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=tolerance * scale)
        assert graphs_compiled() == before + 1, "two blocks, one graph, whatever the clip"
    assert recompiles.count == 0


def test_static_compiles_once_a_size_and_stands_still_once_warm(traced_only: None):
    model = build()
    recompiles = compile_blocks(model, "static")
    before = graphs_compiled()
    for grid in GRIDS[:2]:
        step(model, grid)
    warm = graphs_compiled()
    assert warm == before + 2
    for grid in GRIDS[:2]:
        step(model, grid)
    assert graphs_compiled() == warm
    assert recompiles.count == 0, "a size that was not met before is no fault of theirs"


def test_compiling_again_for_what_was_met_is_counted(traced_only: None):
    model = build(attention="sdpa")
    recompiles = compile_blocks(model, "static")
    # Two blocks of one kind that differ in what the graph holds as a constant: one graph for each of them.
    model.blocks[1].attn1.core.backend = "math"
    step(model, GRIDS[0])
    assert recompiles.count == 1


@pytest.mark.slow
def test_buckets_of_images_and_single_clips_are_warm_after_their_first_step(traced_only: None):
    model = build()
    compile_blocks(model, "dynamic")
    shapes = [(GRIDS[0], 2), (GRIDS[1], 3), ((1, 4, 4), 2), ((1, 6, 8), 3), (GRIDS[2], 1)]
    for grid, clips in shapes:
        step(model, grid, clips)
    warm = graphs_compiled()
    for grid, clips in reversed(shapes):
        step(model, grid, clips)
    assert graphs_compiled() == warm


@pytest.mark.slow
def test_real_code_is_generated_and_computes_the_same():
    model, plain = build(num_layers=1), build(num_layers=1)
    compile_blocks(model, "dynamic")
    for grid in GRIDS[:2]:
        for a, b in zip(step(model, grid), step(plain, grid), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


def test_a_block_that_breaks_the_graph_is_an_error(
    traced_only: None, monkeypatch: pytest.MonkeyPatch
):
    forward = Block.forward

    def breaking(self: Block, *inputs: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(self, *inputs)

    monkeypatch.setattr(Block, "forward", breaking)
    model = build()
    compile_blocks(model, "dynamic")
    with refuses(Fault, "Block", "model.compile=off"):
        step(model, GRIDS[0])


def test_compiling_again_and_again_is_an_error_and_not_eager(
    traced_only: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(compiling.MAX_GRAPHS, "static", 2)
    model = build()
    compile_blocks(model, "static")
    step(model, GRIDS[0])
    step(model, GRIDS[1])
    with refuses(Fault, "Block", "2", "model.compile=dynamic"):
        step(model, GRIDS[2])


def test_off_leaves_the_model_alone():
    model = build()
    compile_blocks(model, "off")
    assert "forward" not in vars(model.blocks[0])


def test_a_missing_compiler_is_told_at_start(monkeypatch: pytest.MonkeyPatch):
    check_compiler(wanting("dynamic"), CPU)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    check_compiler(wanting("off"), CPU)
    with refuses(ConfigError, "model.compile=dynamic", "C++"):
        check_compiler(wanting("dynamic"), CPU)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with refuses(ConfigError, "model.compile=static", "triton"):
        check_compiler(wanting("static"), torch.device("cuda"))


def wanting(compile: str, **parallel: object) -> Config:
    cfg = compose(["experiment=parity_tiny", f"model.compile={compile}"]).config
    return cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=parallel)})


@pytest.mark.parametrize(
    ("compile", "parallel", "facts"),
    [
        ("off", {}, ("model.compile=off", "model.compile=dynamic")),
        ("dynamic", {"engine": "zero3"}, ("parallel.engine=zero3",)),
        ("dynamic", {"activation_checkpointing": "full"}, ("activation_checkpointing=full", "one")),
    ],
)
def test_a_memory_budget_that_nothing_keeps_is_refused(compile: str, parallel: dict, facts: tuple):
    cfg = wanting(compile, activation_memory_budget=0.5, **parallel)
    with refuses(ConfigError, "parallel.activation_memory_budget=0.5", *facts):
        check_compiler(cfg, CPU)


def test_auto_compiles_on_a_gpu_only():
    cuda = torch.device("cuda")
    assert [resolve_compile("auto", device) for device in (CPU, cuda)] == ["off", "dynamic"]
    assert [resolve_compile(mode, cuda) for mode in ("off", "static")] == ["off", "static"]
    assert compiled("auto", CPU) == "no (chosen by auto)"
    assert compiled("dynamic", CPU) == "every block, dynamic"


@pytest.mark.slow
def test_a_run_trains_compiled_to_the_losses_of_eager(parity_config, traced_only: None):
    from sora_train.monitoring.metrics import read_metrics
    from sora_train.training.trainer import Trainer

    rows = {}
    for mode in ("off", "dynamic"):
        cfg = parity_config(f"model.compile={mode}", "train.steps=6", name=mode)
        trainer = Trainer(cfg)
        trainer.train()
        rows[mode] = read_metrics(trainer.folder.path / "metrics.jsonl")
    losses = {mode: [row["train/loss"] for row in found] for mode, found in rows.items()}
    assert losses["dynamic"] == pytest.approx(losses["off"], rel=1e-5)
    # Images and videos, full and short micro-batches, captions of two lengths, validation in between.
    assert [row["train/recompiles"] for row in rows["dynamic"]] == [0.0] * 6
    assert not any("train/recompiles" in row for row in rows["off"])

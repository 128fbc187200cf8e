"""The model of memory against what autograd saves and what the networks really hold."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.memory import LiveBytes
from sora_train.config import Config, OptimConfig, ParallelConfig
from sora_train.config.sections.model import ModelConfig, TextConfig
from sora_train.diffusion.flow import velocity_losses
from sora_train.models.memory import (
    ClipSize,
    clip_bytes,
    compute_bytes,
    fixed_bytes,
    kept_bytes,
    moment_copies,
    precise_bytes,
    saved_bytes,
    text_parameters,
    transformer_parameters,
)
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.transformer.cpu_kernels import Kernels, using
from sora_train.objectives.flow_batch import blank_inputs
from sora_train.parallel.memory.activations import prepare_blocks
from sora_train.parallel.memory.moments import moments_of
from sora_train.training.optim.optim import build_optimizer

WITHIN = 0.08
"""Share by which the model may miss the measured bytes."""
TEXT = TextConfig(d_model=64, num_layers=2, num_heads=4, d_kv=16, d_ff=128, max_length=64)


def model_config(**sizes: object) -> ModelConfig:
    base = {"num_layers": 2, "num_heads": 3, "head_dim": 32, "ffn_dim": 256, "text_dim": 64,
            "compile": "off"}  # fmt: skip
    return ModelConfig(**{**base, **sizes})


def measured_bytes(
    model: ModelConfig, text: TextConfig, rows: int, dtype: torch.dtype, clips: int = 1
) -> int:
    """Bytes of the storages saved by a forward pass of clips of 3 latent frames; parameters left out."""
    net = TextToVideo(model, text).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    found: dict[int, int] = {}
    alive = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or a freed address would be counted for another tensor
        return tensor

    x = torch.randn(clips, 16, 3, rows, 8)
    images = blank_inputs(model, clips, (3, rows, 8)).get("images")
    prompts = ["x" * (text.max_length - 1)] * clips
    with saved_tensors_hooks(save, lambda tensor: tensor):
        v = net(
            x,
            torch.full((clips, 3), 0.5),
            net.tokenize(prompts),
            fps_B=torch.full((clips,), 8.0),
            images_BIE=images,
        )
        velocity_losses(v, x, torch.randn_like(x), torch.ones(clips, 3))
    return sum(found.values())


def clip_of(rows: int) -> ClipSize:
    return ClipSize(tokens=3 * rows // 2 * 4, frames=3, caption=TEXT.max_length)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "gemm", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_those_that_autograd_saves(
    dtype: torch.dtype, attention: str, trainable: bool
):
    model = model_config(attention=attention)
    text = TEXT.model_copy(update={"trainable": trainable})
    for rows, clips in ((16, 1), (64, 1), (16, 3)):
        predicted = clips * saved_bytes(
            model, text, clip_of(rows), dtype.itemsize, core_wide=attention == "auto"
        )
        predicted += precise_bytes(model, dtype.itemsize)
        with using(Kernels(attention_in_float32=True)):
            found = measured_bytes(model, text, rows, dtype, clips)
        assert predicted == pytest.approx(found, rel=WITHIN), (rows, clips, predicted / found)


@pytest.mark.parametrize(
    "sizes",
    [
        {"qk_norm": False},
        {"mask_channel": True, "fps_embed": True},
        {"num_layers": 4, "ffn_dim": 64},
        {"num_heads": 8, "ffn_dim": 1024},
        {"image_dim": 48, "image_tokens": 40},
    ],
    ids=str,
)
def test_saved_bytes_follow_the_sizes_of_the_model(sizes: dict):
    model = model_config(attention="sdpa", **sizes)
    predicted = saved_bytes(model, TEXT, clip_of(32), 4)
    assert predicted == pytest.approx(measured_bytes(model, TEXT, 32, torch.float32), rel=WITHIN)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "full", "checkpoint_every": 2},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "selective", "checkpoint_keep": ("attention",)},
        {"activation_checkpointing": "selective", "mlp_chunks": 4},
        {"mlp_chunks": 4},
    ],
    ids=str,
)
def test_what_is_kept_with_memory_options_is_what_is_alive_after_a_forward_pass(options: dict):
    model, parallel = model_config(num_layers=4, attention="sdpa"), ParallelConfig(**options)
    cfg = Config().model_copy(update={"model": model, "parallel": parallel})
    net = TextToVideo(model, TEXT.model_copy(update={"trainable": False}))
    prepare_blocks(net, cfg, torch.device("cpu"))
    x, captions = torch.randn(1, 16, 3, 64, 8), net.tokenize(["x" * (TEXT.max_length - 1)])
    with LiveBytes() as live:
        v = net(x, torch.full((1, 3), 0.5), captions, fps_B=torch.full((1,), 8.0))
        velocity_losses(v, x, torch.randn_like(x), torch.ones(1, 3))
    text = TEXT.model_copy(update={"trainable": False})
    predicted = saved_bytes(model, text, clip_of(64), 4, parallel=parallel)
    assert predicted == pytest.approx(live.now, rel=0.12), predicted / live.now


def test_offloading_counts_two_blocks_and_moments_on_the_host_count_nothing():
    model, clip = model_config(num_layers=8), clip_of(64)
    offload = ParallelConfig(offload_activations=True)
    per_block = kept_bytes(model, ParallelConfig(), clip, 4) / 8
    assert kept_bytes(model, offload, clip, 4) == pytest.approx(2 * per_block)
    assert fixed(offload_optimizer=True) == pytest.approx(fixed(moments=0))


@pytest.mark.parametrize(("budget", "gb"), [(1.0, 3.45), (0.7, 2.2), (0.5, 1.59)])
def test_a_compiled_block_keeps_what_was_partitioned_for_hopper(budget: float, gb: float):
    """Bytes that torch 2.11's partitioner saves of a block of wan_1_3b at 32,760 tokens, its input of 0.2 GB added."""
    wan = ModelConfig(num_layers=1, num_heads=12, head_dim=128, ffn_dim=8960, text_dim=4096)
    clip, parallel = ClipSize(32_760, 21, 512), ParallelConfig(activation_memory_budget=budget)
    assert kept_bytes(wan, parallel, clip, 2, compiled=True) == pytest.approx(gb * 1e9, rel=0.02)


def test_compiled_blocks_count_where_they_are_compiled_and_a_smaller_budget_keeps_less():
    clip = clip_of(64)

    def of(compile: str, device: str, budget: float = 1.0) -> float:
        parallel = ParallelConfig(activation_memory_budget=budget)
        return clip_bytes(model_config(compile=compile), TEXT, clip, 2, device, parallel)

    assert of("auto", "cpu") > of("auto", "cuda") == of("dynamic", "cuda") < of("off", "cuda")
    rising = [of("dynamic", "cuda", budget / 10) for budget in range(1, 11)]
    assert rising == sorted(rising) and rising[0] < 0.6 * rising[-1]


def test_activations_are_linear_in_tokens_but_for_kept_scores():
    model = model_config()
    for kept in (False, True):
        one, two, three = (
            saved_bytes(model, TEXT, clip_of(rows), 4, scores_kept=kept) for rows in (16, 32, 48)
        )
        assert (three - two > (two - one) * 1.01) is kept


def test_a_core_that_keeps_its_scores_is_counted_with_them():
    model = model_config(attention="math")
    predicted = saved_bytes(model, TEXT, clip_of(64), 4, scores_kept=True)
    assert predicted == pytest.approx(measured_bytes(model, TEXT, 64, torch.float32), rel=WITHIN)
    assert clip_bytes(model, TEXT, clip_of(64), 4, "cpu") > clip_bytes(
        model_config(attention="sdpa"), TEXT, clip_of(64), 4, "cpu"
    )


def test_a_core_that_computes_in_float32_counts_where_it_is_taken():
    clip = clip_of(64)
    auto = {
        (w, device): clip_bytes(model_config(), TEXT, clip, w, device)
        for w, device in itertools.product((2, 4), ("cpu", "cuda"))
    }
    gemm, sdpa = (
        clip_bytes(model_config(attention=name), TEXT, clip, 2, "cpu") for name in ("gemm", "sdpa")
    )
    assert auto[2, "cpu"] > gemm == sdpa == auto[2, "cuda"]
    assert auto[4, "cpu"] == auto[4, "cuda"]


@pytest.mark.parametrize(
    "extras", [{}, {"mask_channel": True}, {"fps_embed": True, "qk_norm": False}], ids=str
)
def test_parameters_are_those_of_the_networks(extras: dict):
    model = model_config(**extras)
    net = TextToVideo(model, TEXT)
    whole, block = transformer_parameters(model)
    assert net.text_encoder is not None
    assert whole == count(net.transformer)
    assert block == count(net.transformer.blocks[0])
    assert text_parameters(TEXT) == count(net.text_encoder)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fixed(
    text: TextConfig = TEXT,
    *,
    w: int = 4,
    moments: float = 2,
    micro_batches: int = 1,
    **parallel: object,
) -> float:
    return fixed_bytes(
        model_config(num_layers=8), text, ParallelConfig(**parallel),
        w=w, moments=moments, micro_batches=micro_batches,
    )  # fmt: skip


def test_fixed_bytes_count_masters_gradients_moments_and_average():
    trained = transformer_parameters(model_config(num_layers=8))[0] + text_parameters(TEXT)
    assert fixed() == 20 * trained
    assert fixed(moments=0) == 12 * trained
    frozen = TEXT.model_copy(update={"trainable": False})
    assert fixed() - fixed(frozen) == 16 * text_parameters(TEXT)
    once = precise_bytes(model_config(num_layers=8), 2)
    assert fixed(w=2) == (20 + 2) * trained + once > 22 * trained, "one rank keeps copies of all"
    assert fixed(w=2, micro_batches=4) == fixed(w=2), "gradients are added up in the masters'"


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(), OptimConfig(name="sgd"), OptimConfig(name="muon"), OptimConfig(name="schedule_free"),
        OptimConfig(state="int8"), OptimConfig(state="fp8"),
    ],
    ids=lambda optim: f"{optim.name} {optim.state}",
)  # fmt: skip
def test_moments_are_as_large_as_what_an_optimizer_keeps(optim: OptimConfig, trainable: bool):
    model = model_config(num_layers=4, num_heads=8, ffn_dim=1024)
    text = TEXT.model_copy(update={"trainable": trainable})
    net = TextToVideo(model, TEXT)
    named = {
        n: p for n, p in net.named_parameters() if trainable or not n.startswith("text_encoder.")
    }
    optimizer = build_optimizer(optim, named, named)
    kept = [
        state for p in named.values() for state in moments_of(optimizer, p).values() if state.ndim
    ]
    trained = sum(parameter.numel() for parameter in named.values())
    found = sum(state.nbytes for state in kept)
    assert moment_copies(optim, model, text) * 4 * trained == pytest.approx(found, rel=0.01)


def test_fixed_bytes_fall_with_the_shards_and_not_with_the_replicas():
    trained = transformer_parameters(model_config(num_layers=8))[0] + text_parameters(TEXT)
    four, eight = fixed(w=2, dp_shard=4), fixed(w=2, dp_shard=8)
    assert four - eight == 20 * trained * (1 / 4 - 1 / 8)
    assert fixed(w=2, dp_shard=4, dp_replicate=2) == four
    assert fixed(w=2, dp_shard=4, micro_batches=4) == four, "a micro-batch a rank adds nothing up"
    assert fixed(w=2, dp_shard=4, micro_batches=5) == four + 4 * trained
    assert fixed(w=2, dp_shard=4, micro_batches=5, accumulate="sharded") == four


def test_the_plan_does_not_ask_the_machine_for_its_precision():
    assert compute_bytes("auto", "cuda") == 2
    assert compute_bytes("auto", "auto") == compute_bytes("auto", "cpu") == 4
    assert compute_bytes("bfloat16", "auto") == 2 and compute_bytes("float64", "cuda") == 8

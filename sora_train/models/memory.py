"""What one rank keeps in memory while it trains, from the sizes alone: nothing is built.

Two parts. The fixed one is weights, gradients, moments and average. The other grows with the clips
of a micro-batch: the tensors that autograd saves for the backward pass, counted from the code of
`dit.py`, `attention.py` and `layers.py`, and the gradients of one block while its backward runs.

This is the one estimate from sizes: `data.memory_gb`, `sora bench memory` and the search of `sora plan` call it. The
plan then counts the layouts it recommends on fake tensors of the real model (tools/plan/memory), which knows the
engine's buffers and published encoders as well but takes seconds a layout.

The count is that of eager PyTorch with the SDPA core, whose memory is linear in the tokens. Compiled blocks
(`model.compile`) save the share COMPILED of it, and less with `parallel.activation_memory_budget`: both are measured on
the graphs of one model, not derived. Left out: the batch itself, the frozen VAE, kernels' workspaces and what an
allocator wastes.

Symbols: S video tokens, L caption tokens, T latent frames, D model width, F feed-forward width, w
bytes of the compute precision, f = max(4, w) bytes of norms and the residual stream.
"""

import itertools
import math
from dataclasses import dataclass

from sora_train.config import Config
from sora_train.config.sections.model import ModelConfig, TextConfig
from sora_train.config.sections.optim import OptimConfig
from sora_train.config.sections.parallel import ParallelConfig
from sora_train.models.quantised.sizes import FrozenSizes

COMPUTE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
MASTER = 4
CODED = 0.25 + 1 / 256
"""Of a float32 moment: its code of a byte, and its part of the float32 scale of 256."""
COMPILED = 0.84
"""What a compiled block saves, its input included, of what eager PyTorch saves: torch 2.11 partitioned a block of
`wan_1_3b` at 32,760 tokens for sm_90 so that it saves 3.25 GB and its input of 0.2 GB, where eager saves 4.10 GB."""
BUDGET_KEPT = ((0.0, 0.06), (0.5, 0.46), (0.7, 0.64), (1.0, 1.0))
"""`parallel.activation_memory_budget` -> the share of that which is kept: of the same block 1.39 GB at 0.5 and 2.0 GB
at 0.7, its input of 0.2 GB included; between them a straight line, at 0 the input."""
VOCABULARY = 384
RELATIVE_BUCKETS = 32


@dataclass(frozen=True)
class ClipSize:
    """The sizes of one clip: S video tokens in T latent frames, and L caption tokens."""

    tokens: int
    frames: int
    caption: int


def compute_bytes(param_dtype: str, device: str) -> int:
    """Bytes of a number in which weights compute.

    `auto` counts as bfloat16 only where `run.device` is `cuda`: a plan must not depend on the
    machine it is made on, so `run.device=auto` counts as the larger float32.
    """
    if param_dtype != "auto":
        return COMPUTE_BYTES[param_dtype]
    return 2 if device == "cuda" else 4


def transformer_parameters(cfg: ModelConfig) -> tuple[int, int]:
    """(all parameters of the transformer, those of one block)."""
    d, patch = cfg.dim, math.prod(cfg.patch_size)
    attention = 4 * (d * d + d) + (2 * d if cfg.qk_norm else 0)
    block = 2 * attention + 2 * d + (2 * d * cfg.ffn_dim + cfg.ffn_dim + d) + 6 * d
    image = 0
    if cfg.image_dim:
        e = cfg.image_dim
        block += 2 * (d * d + d) + (d if cfg.qk_norm else 0)
        image = 2 * e + (e * e + e) + (d * e + d) + 2 * d
        image += 2 * cfg.image_tokens * e if cfg.image_pair else 0
    embedding = cfg.in_channels * patch * d + d
    time = (cfg.freq_dim * d + d) + (d * d + d) + (6 * d * d + 6 * d)
    text = (cfg.text_dim * d + d) + (d * d + d)
    out = (d + 1) * cfg.velocity_channels * patch + 2 * d
    extras = (patch * d if cfg.mask_channel else 0) + (cfg.freq_dim * d if cfg.fps_embed else 0)
    return cfg.num_layers * block + embedding + time + text + image + out + extras, block


def text_parameters(cfg: TextConfig) -> int:
    """Parameters of the UMT5 encoder."""
    inner, d = cfg.num_heads * cfg.d_kv, cfg.d_model
    layer = 4 * d * inner + 3 * d * cfg.d_ff + 2 * d + RELATIVE_BUCKETS * cfg.num_heads
    return VOCABULARY * d + cfg.num_layers * layer + d


def moment_copies(optim: OptimConfig, model: ModelConfig, text: TextConfig) -> float:
    """What the optimizer keeps for a trained weight, on average, in float32 values.

    Two moments; Muon one for matrices of the blocks and the patch embedding; a byte a moment and its part of a scale
    where matrices are coded. Biases outside of the blocks count as matrices, of which they are a thousandth.
    """
    if optim.name == "sgd":
        return 0.0
    if optim.name != "muon" and optim.state == "float32":
        return 2.0
    transformer, block = transformer_parameters(model)
    trained = transformer + (text_parameters(text) if text.trainable else 0)
    in_block = 8 * model.dim**2 + 2 * model.dim * model.ffn_dim
    matrices = model.num_layers * in_block
    if optim.name == "muon":
        matrices += model.in_channels * math.prod(model.patch_size) * model.dim
        return 2.0 - matrices / trained
    matrices = trained - model.num_layers * (block - in_block)
    return 2.0 - matrices / trained * 2 * (1 - CODED)


def block_bytes(
    cfg: ModelConfig,
    clip: ClipSize,
    w: int,
    *,
    scores_kept: bool = False,
    core_wide: bool = False,
    frozen: FrozenSizes | None = None,
) -> float:
    """Bytes that one block saves for the backward pass of one clip.

    In f: the residual stream before each of the three branches, the outputs of both modulated
    norms and of the two gated branches, and the input of each RMS-normalised query or key. In w:
    the inputs of the matrix products and of both attention cores, and the MLP's inner width before
    and after its GELU. A frame adds its modulation (8 D).

    Of a `frozen` block nothing is saved for gradients of weights: in f the inputs of the three norms and of the
    RMS-normalised ones; in w queries, keys, values and answers of both cores, and the MLP's inner width before its
    GELU. An adapter adds the inputs of its layers, and its rank.

    Args:
        scores_kept: the attention core is `math`, which saves the softmax of every score.
        core_wide: what enters and leaves the attention core is saved in f.
    """
    f, d = max(MASTER, w), cfg.dim
    normed = d * f if cfg.qk_norm else 0
    statistics = (9 if cfg.qk_norm else 6) * f + 2 * cfg.num_heads * f
    token = 7 * d * f + 9 * d * w + 3 * normed + 2 * cfg.ffn_dim * w + statistics
    caption = normed + 2 * d * w
    images = cfg.images * cfg.image_tokens
    if images:
        # The result of the second attention core and its statistics.
        token += d * w + cfg.num_heads * f
    if frozen is not None:
        token -= (4 * d * f + 3 * d * w) + cfg.ffn_dim * w
        token += frozen.attention * 2 * d * w + frozen.mlp * (d + cfg.ffn_dim) * w
        token += frozen.ranks * w
    if core_wide:
        token += 6 * d * (f - w)
        caption += 2 * d * (f - w)
    # The tokens of images are keys and values as a caption's are.
    keys = clip.caption + images
    total = clip.tokens * token + keys * caption + clip.frames * 8 * d * f
    if scores_kept:
        score = cfg.num_heads * (f + (w if w < f else 0))
        total += clip.tokens * (clip.tokens + keys) * score
    return float(total)


def kept_bytes(
    cfg: ModelConfig,
    parallel: ParallelConfig,
    clip: ClipSize,
    w: int,
    *,
    scores_kept: bool = False,
    core_wide: bool = False,
    compiled: bool = False,
    frozen: FrozenSizes | None = None,
) -> float:
    """Bytes that all blocks together keep on the device for one clip, with the memory options of `parallel`.

    `compiled` blocks keep the share COMPILED, and of that what `parallel.activation_memory_budget` leaves.

    An MLP in parts keeps its input instead of its inner width. A checkpointed block keeps its input (D f a
    token) and, where it is selective, the results of its products ((7 D + F) w a token, 2 D w a caption
    token) and of its attention cores (2 D w a token and their statistics). Of what is offloaded two blocks
    are on the device, the one at work and the one that is fetched; what a selective checkpoint keeps is not
    offloaded.
    """
    f, d = max(MASTER, w), cfg.dim
    whole = block_bytes(cfg, clip, w, scores_kept=scores_kept, core_wide=core_wide, frozen=frozen)
    if parallel.mlp_chunks > 1 and frozen is None:
        whole -= clip.tokens * (2 * cfg.ffn_dim * w - d * (f - w))
    elif parallel.mlp_chunks > 1 and frozen is not None:
        whole -= clip.tokens * ((1 + frozen.mlp) * cfg.ffn_dim * w + frozen.mlp * d * w - d * f)
    if compiled:
        whole *= COMPILED * budget_kept(parallel.activation_memory_budget)
    mode, layers = parallel.activation_checkpointing, cfg.num_layers
    short = -(-layers // parallel.checkpoint_every) if mode != "none" else 0
    entry, results, product = float(clip.tokens * d * f), 0.0, f if core_wide else w
    if mode == "selective" and "matmul" in parallel.checkpoint_keep:
        results += (clip.tokens * (7 * d + cfg.ffn_dim) + clip.caption * 2 * d) * product
    if mode == "selective" and "attention" in parallel.checkpoint_keep and not scores_kept:
        results += clip.tokens * 2 * (d * product + cfg.num_heads * f)
    if parallel.offload_activations:
        blocks = min(2, layers) * (entry if short == layers else whole)
        return blocks + short * results
    return (layers - short) * whole + short * (entry + results)


def budget_kept(budget: float) -> float:
    """Share of a compiled block's bytes that `parallel.activation_memory_budget` keeps (BUDGET_KEPT)."""
    for (low, kept_low), (high, kept_high) in itertools.pairwise(BUDGET_KEPT):
        if budget <= high:
            return kept_low + (kept_high - kept_low) * (budget - low) / (high - low)
    return 1.0


def compiles(cfg: ModelConfig, parallel: ParallelConfig, device: str) -> bool:
    """Whether `model.compile` compiles the blocks on a device of this kind, `cuda` or `cpu`; ZeRO-3 runs them as they
    are."""
    wanted = cfg.compile in ("dynamic", "static") or (cfg.compile == "auto" and device == "cuda")
    return wanted and parallel.engine != "zero3"


def ends_bytes(cfg: ModelConfig, clip: ClipSize, w: int) -> float:
    """Bytes saved outside the blocks: patches, the last norm, the loss, time and text embeddings."""
    f, d, patch = max(MASTER, w), cfg.dim, cfg.in_channels * math.prod(cfg.patch_size)
    token = 2 * d * f + d * w + patch * (w + f) + 2 * f
    if cfg.mask_channel:
        token += math.prod(cfg.patch_size) * w
    caption = (cfg.text_dim + 3 * d) * w
    frame = (cfg.freq_dim + 5 * d) * f
    return float(clip.tokens * token + clip.caption * caption + clip.frames * frame)


def precise_bytes(cfg: ModelConfig, w: int) -> int:
    """Bytes of the float32 copies of the noise level's weights (`PreciseLinear`) that are saved once a
    forward pass, whatever the clips, where weights arrive in less."""
    d = cfg.dim
    weights = cfg.freq_dim * d + 7 * d * d + (cfg.freq_dim * d if cfg.fps_embed else 0)
    return weights * MASTER if w < MASTER else 0


def text_bytes(cfg: TextConfig, caption: int, w: int) -> float:
    """Bytes that a trainable text encoder saves for one caption; transformers computes its attention
    eagerly, so the scores are among them, with the table of relative positions."""
    f, inner = max(MASTER, w), cfg.num_heads * cfg.d_kv
    norms = 2 * cfg.d_model * (2 * f + w + (w if w < f else 0))
    layer = caption * (norms + (4 * inner + 7 * cfg.d_ff) * w)
    scores = caption * caption * (cfg.num_heads * f + 8)
    return float(cfg.num_layers * (layer + scores) + 2 * caption * cfg.d_model * f)


def saved_bytes(
    model: ModelConfig,
    text: TextConfig,
    clip: ClipSize,
    w: int,
    *,
    scores_kept: bool = False,
    core_wide: bool = False,
    compiled: bool = False,
    parallel: ParallelConfig | None = None,
    frozen: FrozenSizes | None = None,
) -> float:
    """Bytes that the forward pass of one clip saves for its backward pass, parameters left out."""
    blocks = kept_bytes(
        model,
        parallel or ParallelConfig(),
        clip,
        w,
        scores_kept=scores_kept,
        core_wide=core_wide,
        compiled=compiled,
        frozen=frozen,
    )
    encoder = text_bytes(text, clip.caption, w) if text.trainable else 0.0
    return blocks + ends_bytes(model, clip, w) + encoder


def clip_bytes(
    model: ModelConfig,
    text: TextConfig,
    clip: ClipSize,
    w: int,
    device: str,
    parallel: ParallelConfig | None = None,
    frozen: FrozenSizes | None = None,
) -> float:
    """Bytes that one more clip in a micro-batch takes: what is saved, one block's gradients, and where blocks are
    checkpointed, what one of them computes again."""
    parallel = parallel or ParallelConfig()
    kept = model.attention == "math"
    # What a CPU is found to be fastest at may be float32, and what is planned must not depend on that.
    wide = device == "cpu" and model.attention == "auto"
    compiled = compiles(model, parallel, device)
    saved = saved_bytes(
        model, text, clip, w, scores_kept=kept, core_wide=wide, compiled=compiled, parallel=parallel,
        frozen=frozen,
    )  # fmt: skip
    block = block_bytes(model, clip, w, scores_kept=kept, core_wide=wide, frozen=frozen)
    block *= COMPILED if compiled else 1
    return saved + block * (1 if parallel.activation_checkpointing == "none" else 2)


def adapter_bytes(
    cfg: Config, sizes: FrozenSizes, *, w: int, moments: float, averages: int, shards: int = 1
) -> float:
    """Bytes of a rank before any clip where an adapter is trained beside a frozen base.

    Of the adapter float32 weights, gradients, `moments` and `averages`, and its copies in the compute precision; the
    base as `memory` keeps it, and what widening its largest matrix takes. Over `shards` ranks each has its part, and
    two blocks with what is no block are gathered.
    """
    moments = 0 if cfg.parallel.offload_optimizer else moments
    trained = sizes.trained * MASTER * (2 + averages + moments) / shards
    copies = sizes.trained * w if w < MASTER else 0
    memory = cfg.memory
    base: float = sizes.resident_bytes(memory.base, memory.swap_blocks, w)
    if shards > 1:
        base = base / shards + 2 * sizes.block_bytes(memory.base, w) + sizes.rest * w
    wide = sizes.widened_bytes(memory.base, w) + precise_bytes(cfg.model, w)
    return trained + copies + base + wide


def fixed_bytes(
    model: ModelConfig,
    text: TextConfig,
    parallel: ParallelConfig,
    *,
    w: int,
    moments: float,
    micro_batches: int,
    averages: int = 1,
) -> float:
    """Bytes of a rank before any clip.

    float32 weights, gradients, `moments` and `averages` over the shards; the weights of the blocks at
    work, gathered in the compute precision (one rank: of all), and the noise level's in float32; and whole gradients,
    where a rank adds up several of the step's `micro_batches` before they are sharded (`parallel.accumulate`).

    The shards are those of `parallel.dp_shard`; -1 counts as one rank that holds everything, as
    what is planned must not depend on the number of ranks.
    """
    transformer, block = transformer_parameters(model)
    encoder = text_parameters(text)
    experts = 2 if model.expert == "both" else 1
    trained = experts * transformer + (encoder if text.trainable else 0)
    shards = max(1, parallel.dp_shard)
    ranks = max(1, parallel.dp_replicate) * shards
    on_device = 2 + averages + (0 if parallel.offload_optimizer else moments)
    total = trained * MASTER * on_device / shards
    if not text.trainable:
        total += encoder * MASTER
    total += precise_bytes(model, w)
    if ranks == 1:
        # Nothing is gathered; copies in the compute precision stand beside the masters.
        return total + (trained * w if w < MASTER else 0)
    # A block is gathered ahead of the one at work.
    at_work = trained - (experts * model.num_layers - 2) * block
    total += 2 * min(at_work, trained) * w  # weights, and their gradients before they are reduced
    if micro_batches > ranks and parallel.accumulate == "whole":
        total += trained * max(MASTER, w)
    return total

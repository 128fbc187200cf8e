"""The parallel section: which engine, and how the ranks divide weights, samples and tokens."""

from typing import Annotated, Literal

from pydantic import Field

from sora_train.config.sections.base import Section


class ParallelConfig(Section):
    engine: Literal["fsdp", "zero1", "zero2", "zero3"] = "fsdp"
    """`fsdp`: FSDP2, which is also one process, DDP and HSDP; `zero1`, `zero2`, `zero3`: DeepSpeed's stages."""
    dp_replicate: int = Field(1, ge=-1)
    """Replicas of the sharded model (HSDP; with dp_shard=1, DDP); -1: the ranks that the other degrees leave."""
    dp_shard: int = Field(-1, ge=-1)
    """Data-parallel ranks over which weights are sharded, together with the ranks of context parallelism; -1: the ranks
    that the other degrees leave."""
    ulysses: int = Field(1, ge=1, le=60)
    """Ranks that share a clip's tokens and exchange tokens for heads around attention; it divides model.num_heads."""
    ring: int = Field(1, ge=1, le=60)
    """Ranks, or groups of `ulysses` ranks, that share a clip's tokens and pass keys and values around a ring."""
    param_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision of the weights in forward and backward; `auto`: bfloat16 on GPU, float32 on CPU. Master weights are
    always float32."""
    debug_every: int = Field(0, ge=0)
    """Steps between two debug steps, in which ranks compare block by block what they compute: calls, clips, draws,
    weights (docs/debugging.md). 1: every step; 0: never, at no cost."""
    accumulate: Literal["whole", "sharded"] = "whole"
    """How a rank adds up the gradients of its micro-batches with `fsdp`. `whole`: unsharded, and reduced once a step;
    it takes 4 bytes on every rank for each weight of the model. `sharded`: reduced after each micro-batch, with as
    many times the traffic."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments, with ZeRO the float32 master weights too, in the host's memory and step there. It
    is slower, and saves 8 or 12 bytes on the device for each weight."""
    offload_params: bool = False
    """Keep the sharded weights in the host's memory too and bring each layer to the device when it computes; `zero3`
    only."""
    deepspeed_json: str = ""
    """A DeepSpeed configuration file that is merged into ours, for the engines `zero1`, `zero2` and `zero3`: bucket
    sizes, prefetching and the like (docs/engines.md). A setting that contradicts another key is refused."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What blocks recompute in backward: nothing, everything (`full`), or all but `parallel.checkpoint_keep`
    (`selective`)."""
    checkpoint_every: int = Field(1, ge=1)
    """Checkpoint every k-th block, beginning with the first; the others keep everything."""
    checkpoint_keep: Annotated[tuple[Literal["attention", "matmul"], ...], Field(strict=False)] = (
        "attention",
        "matmul",
    )
    """Results that `selective` checkpointing keeps: those of attention, those of matrix products."""
    activation_memory_budget: float = Field(1.0, gt=0, le=1)
    """Share of what compiled blocks would keep for backward that they may keep: the compiler computes again what costs
    least time for its bytes. 1: they keep all of it. It stands in the place of `parallel.activation_checkpointing`."""
    offload_activations: bool = False
    """Keep what blocks save for backward in the host's memory, and fetch it one block ahead; for a checkpointed block
    that is its input."""
    mlp_chunks: int = Field(1, ge=1)
    """Number of parts in which a block's MLP processes its tokens, so that its wide inner activations are never held
    for all tokens at once."""
    self_test: bool = True
    """At the start of a run on several ranks, train a tiny model for one step in this layout and compare loss, gradient
    norm and gradients with one process. It takes about a second; a difference ends the run."""

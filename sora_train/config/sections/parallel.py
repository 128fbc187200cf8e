"""The parallel section: which engine, and how the ranks divide weights, samples and tokens."""

from typing import Annotated, Literal

from pydantic import Field

from sora_train.config.sections.base import Section


class ParallelConfig(Section):
    engine: Literal["fsdp", "zero1", "zero2", "zero3"] = "fsdp"
    """`fsdp`: FSDP2, which is also one process, DDP and HSDP; `zero1`, `zero2`, `zero3`: DeepSpeed's stages."""
    dp_replicate: int = Field(1, ge=-1)
    """Replicas of the sharded model (HSDP; with dp_shard=1 DDP); -1: what the other degrees leave."""
    dp_shard: int = Field(-1, ge=-1)
    """Ranks each weight is split over, times those of context parallelism; -1: what the other degrees leave."""
    ulysses: int = Field(1, ge=1, le=60)
    """Ranks that share a clip's tokens and exchange them for heads around attention; divides model.num_heads."""
    ring: int = Field(1, ge=1, le=60)
    """Ranks, or groups of `ulysses` ranks, that share a clip's tokens and pass keys and values round."""
    param_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision in which weights reach compute; `auto`: bfloat16 on GPU, float32 on CPU. Masters are always float32."""
    debug_every: int = Field(0, ge=0)
    """Steps between two in which ranks compare what they do while they do it, block by block: calls, clips, draws,
    weights (docs/debugging.md); 1: every step; 0: never, at no cost."""
    accumulate: Literal["whole", "sharded"] = "whole"
    """Gradients of a rank's micro-batches of one step are added up `whole`, and reduced once: 4 bytes on every rank for
    each weight of the model; or `sharded`: reduced after each, with as many times the traffic. `fsdp`."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in the host's memory and step there, with ZeRO the float32 masters too: slower, and
    8 or 12 bytes less on the device for each weight."""
    offload_params: bool = False
    """Keep the sharded weights in host memory as well and bring each layer to the device when it computes; `zero3`."""
    deepspeed_json: str = ""
    """A DeepSpeed configuration file merged into ours, for the engines `zero1`, `zero2` and `zero3`: sizes of buckets,
    prefetching and the like (docs/engines.md). What contradicts another key here is refused."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What blocks forget and compute again in backward: nothing, all but their input, or all but `checkpoint_keep`."""
    checkpoint_every: int = Field(1, ge=1)
    """Every k-th block is checkpointed, the first one among them; the others keep everything."""
    checkpoint_keep: Annotated[tuple[Literal["attention", "matmul"], ...], Field(strict=False)] = (
        "attention",
        "matmul",
    )
    """Results that `activation_checkpointing=selective` keeps: those of attention cores, of matrix products."""
    offload_activations: bool = False
    """Keep what blocks save for backward in the host's memory, of a checkpointed block its input; fetched a block
    ahead."""
    mlp_chunks: int = Field(1, ge=1)
    """Parts that a block's MLP takes its tokens in; its inner width is then never held for all of them at once."""
    self_test: bool = True
    """At the start of a run on several ranks, take one step of a tiny model in this layout and compare it with one
    process: loss, gradient norm, gradients. It takes about a second; a difference ends the run."""

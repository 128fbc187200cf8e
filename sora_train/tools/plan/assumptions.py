"""What a plan assumes where nothing can be counted: efficiencies, overlap, latencies, restarts. Set by
`plan.key=value`."""

from pydantic import Field

from sora_train.config.sections.base import Section


class Assumptions(Section):
    gemm: float = Field(0.65, gt=0, le=1)
    """Share of the peak that matrix products of the blocks reach."""
    passes: float = Field(2.5, ge=0)
    """How often the bytes that a block saves for backward cross the card's memory in a step, where norms, gates and
    activations read and write them: once written, once read, and gradients; fused kernels of torch.compile save
    some."""
    attention_forward: float = Field(0.0, ge=0, le=1)
    """Share of the peak in attention's forward pass; 0: that of the card and of `model.attention`."""
    attention_backward: float = Field(0.0, ge=0, le=1)
    """The same in backward."""
    measured: bool = False
    """data.cost_a and data.cost_b are seconds that `sora bench cost` measured on this card: compute is taken from
    them."""
    convolution: float = Field(0.25, gt=0, le=1)
    """Share of the peak (of the VAE's precision) that the frozen VAE's convolutions reach."""
    network: float = Field(0.8, gt=0, le=1)
    """Share of the links' bandwidth that collectives reach."""
    latency_us: float = Field(5.0, ge=0)
    """Microseconds of a collective for each node it goes through."""
    overlap: float = Field(0.9, ge=0, le=1)
    """Share of compute behind which gathering weights and reducing gradients can hide."""
    data_wait: float = Field(0.01, ge=0, lt=1)
    """Share of a step that waits for data."""
    step_seconds: float = Field(0.1, ge=0)
    """Seconds of a step besides: control plane, norm of the gradients, logging, Python."""
    reserve: float = Field(0.03, ge=0, lt=1)
    """Share of a card's memory left free, beside what the count allows the CUDA context, NCCL and the allocator."""
    storage_gb_s: float = Field(5.0, gt=0)
    """GB/s that the whole job writes to and reads from the file system of its checkpoints."""
    restart_minutes: float = Field(5.0, ge=0)
    """Minutes from a failure to the next step, reading the checkpoint left out."""
    mix: dict[str, float] = {}
    """Share of the clips of each bucket or class of buckets, by name; empty: classes by their probability, and within
    a class all buckets alike."""
    keep_layout: bool = False
    """Plan the layout and the memory options of the config instead of looking for the best."""
    counted: int = Field(1, ge=0)
    """How many of the fastest layouts of a stage have their memory counted on fake tensors, some 10 to 30 s each;
    that of the others is estimated from the sizes (models/memory.py), 0: of all."""

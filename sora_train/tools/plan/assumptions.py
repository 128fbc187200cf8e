"""What a plan assumes where nothing can be counted: efficiencies, overlap, latencies, restarts. Set by
`plan.key=value`."""

from pydantic import Field

from sora_train.config.sections.base import Section


class Assumptions(Section):
    gemm: float = Field(0.65, gt=0, le=1)
    """Share of the peak that matrix products of the blocks reach."""
    passes: float = Field(3.8, ge=0)
    """How often the bytes that a block saves for backward cross the card's memory in a step, where norms, gates and
    activations read and write them: 13.2 GB for 3.45 GB, counted in the compiled block of `wan_1_3b`."""
    bandwidth: float = Field(0.9, gt=0, le=1)
    """Share of the bandwidth of the card's memory that kernels reach; measured where `plan.results` has it."""
    attention_forward: float = Field(0.0, ge=0, le=1)
    """Share of the peak in attention's forward pass; 0: what was measured or published of the kernel that
    `model.attention` comes to."""
    attention_backward: float = Field(0.0, ge=0, le=1)
    """The same in backward, which counts five products for the forward's two."""
    cross: float = Field(0.45, gt=0, le=1)
    """Share of the peak in attention to captions, whose few keys leave a kernel little to do."""
    flash4: bool = True
    """FlashAttention-4's package is installed, so that `model.attention=auto` takes it on Hopper; else cuDNN."""
    results: str = ""
    """The ceilings.json of `benchmarks/gpu_suite.sh`; empty: that of the checkout. What it measured on a card of the
    cluster's name stands in for what is published."""
    measured: bool = False
    """data.cost_a and data.cost_b are seconds that `sora bench cost` measured on this card: compute is taken from
    them."""
    convolution: float = Field(0.09, gt=0, le=1)
    """Share of the peak (of the VAE's precision) that the frozen VAE's convolutions reach: Wan's encoder at 480p and 81
    frames is taken for 1.8 s of an H200."""
    captions: float = Field(0.4, gt=0, le=1)
    """Share of the peak that the frozen text encoder reaches, 12 ms of umT5-XXL on an
    H200 for a caption of 512 tokens."""
    clips: int = Field(0, ge=0)
    """Clips of the source, which decide whether a cache pays; 0: a tenth of those that the stage trains."""
    disk_gb: float = Field(0.0, ge=0)
    """GB that a cache may take; 0: as many as it likes."""
    caption_tokens: int = Field(128, ge=1)
    """Tokens of an average caption, of which a cache stores no padding; encoded together, captions are padded to the
    longest, which is taken for twice as long."""
    network: float = Field(0.8, gt=0, le=1)
    """Share of the links' bandwidth that collectives reach."""
    latency_us: float = Field(5.0, ge=0)
    """Microseconds of a collective for each node it goes through."""
    overlap: float = Field(0.9, ge=0, le=1)
    """Share of compute behind which gathering weights and reducing gradients can hide."""
    data_wait: float = Field(0.01, ge=0, lt=1)
    """Share of a step that waits for data."""
    step_seconds: float = Field(0.05, ge=0)
    """Seconds at the end of a step in which the card is idle: Python over all weights, control plane, logging."""
    micro_batch_seconds: float = Field(0.01, ge=0)
    """Seconds of a micro-batch in which the card is idle: noise that is drawn on the host, copies from pageable
    memory."""
    ceiling: float = Field(0.8, gt=0, le=1)
    """Share of the peak that the best kernel reaches within the card's power: what remains above it is no gap."""
    bar: float = Field(0.5, gt=0, le=1)
    """MFU that a plan is measured by: what stands between is named with its milliseconds."""
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

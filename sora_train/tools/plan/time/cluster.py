"""What a plan knows of the machines: `8xH100` or `64xmy_gpu.yaml`, and numbers set by `cluster.key=value`.

Peaks are those of dense bfloat16 matrix products, as the makers state them without sparsity; prices are what
public clouds ask by the hour and GPU (rounded), which a contract changes: set `cluster.price`.
"""

from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import Field, create_model

from sora_train.config.messages import validated
from sora_train.config.schema import closest, did_you_mean
from sora_train.config.sections.base import Section
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import ConfigError

S = TypeVar("S", bound=Section)
GB = 1e9
GIB = 2**30


class Gpu(Section):
    """One GPU and the node it stands in."""

    tflops: float = Field(gt=0)
    """Dense bfloat16 TFLOP/s, the maker's peak."""
    tflops_fp32: float = Field(gt=0)
    """The same in float32, where weights compute in it."""
    memory_gib: float = Field(gt=0)
    """Memory of a GPU in GiB, as the driver shows it."""
    memory_gb_s: float = Field(gt=0)
    """Bandwidth of its memory, GB/s."""
    nvlink_gb_s: float = Field(gt=0)
    """Bandwidth between GPUs of a node, one direction, GB/s a GPU."""
    network_gb_s: float = Field(gt=0)
    """Bandwidth between nodes, one direction, GB/s a GPU."""
    host_gb_s: float = Field(gt=0)
    """Bandwidth between GPU and host memory, one direction, GB/s."""
    gpus_per_node: int = Field(ge=1)
    """GPUs of a node."""
    price: float = Field(ge=0)
    """US dollars for an hour of one GPU."""
    mtbf_hours: float = Field(gt=0)
    """Hours between failures that stop a run, of one GPU with its share of the node."""
    attention_forward: float = Field(gt=0, le=1)
    """Share of the peak that PyTorch's flash attention reaches in forward."""
    attention_backward: float = Field(gt=0, le=1)
    """The same in backward."""


# Meta's Llama 3 run (arXiv:2407.21783, table 5) met 419 unforeseen interruptions in 54 days on 16,384 H100:
# 16384 * 54 * 24 h / 419 = 50,700 hours a GPU. Nothing comparable is published for the others.
_MTBF = 50_000.0
# FlashAttention-2 (arXiv:2307.08691, fig. 4-7) at head width 128: 225 of 312 TFLOP/s forward and backward together on
# A100, forward alone up to 230. FlashAttention-3 (arXiv:2407.08608, fig. 5-6) measures FlashAttention-2 on H100:
# about 370 of 989 TFLOP/s forward, 320 backward. That is the kernel PyTorch ships.
_AMPERE = {"attention_forward": 0.70, "attention_backward": 0.60}
_HOPPER = {"attention_forward": 0.37, "attention_backward": 0.32}

TABLE: dict[str, Gpu] = {
    # nvidia.com/en-us/data-center/h100, SXM: 989 TFLOP/s bf16 dense, 67 fp32, 80 GB, 3.35 TB/s, NVLink 900 GB/s both
    # ways. DGX H100: 8 ConnectX-7 of 400 Gb/s = 50 GB/s a GPU; PCIe 5 x16. Price: lambda.ai and runpod.io, 2025, 2-3
    # dollars.
    "H100": Gpu(
        tflops=989, tflops_fp32=67, memory_gib=79.1, memory_gb_s=3350, nvlink_gb_s=450, network_gb_s=50,
        host_gb_s=55, gpus_per_node=8, price=2.5, mtbf_hours=_MTBF, **_HOPPER,
    ),
    # nvidia.com/en-us/data-center/h200, SXM: H100's processor with 141 GB at 4.8 TB/s.
    "H200": Gpu(
        tflops=989, tflops_fp32=67, memory_gib=139.8, memory_gb_s=4800, nvlink_gb_s=450, network_gb_s=50,
        host_gb_s=55, gpus_per_node=8, price=3.3, mtbf_hours=_MTBF, **_HOPPER,
    ),
    # nvidia.com/en-us/data-center/a100, SXM 80 GB: 312 TFLOP/s bf16, 19.5 fp32, 2.04 TB/s, NVLink 600 GB/s both ways.
    # DGX A100: 8 ConnectX-6 of 200 Gb/s; PCIe 4 x16.
    "A100-80": Gpu(
        tflops=312, tflops_fp32=19.5, memory_gib=79.2, memory_gb_s=2039, nvlink_gb_s=300, network_gb_s=25,
        host_gb_s=25, gpus_per_node=8, price=1.6, mtbf_hours=_MTBF, **_AMPERE,
    ),
    # nvidia.com/en-us/data-center/dgx-b200: 36 PFLOP/s dense fp8 / 2 = 2,250 TFLOP/s bf16 a GPU, 180 GB usable, 8
    # TB/s,
    # NVLink 1.8 TB/s both ways, ConnectX-7 of 400 Gb/s. Attention: no published figure of PyTorch's own; as Hopper.
    "B200": Gpu(
        tflops=2250, tflops_fp32=75, memory_gib=178.4, memory_gb_s=8000, nvlink_gb_s=900, network_gb_s=50,
        host_gb_s=55, gpus_per_node=8, price=5.0, mtbf_hours=_MTBF, **_HOPPER,
    ),
    # nvidia.com/en-us/data-center/l40s: 362 TFLOP/s bf16 dense, 91.6 fp32, 48 GB, 864 GB/s, no NVLink: PCIe 4 x16.
    # Ada runs FlashAttention-2 as Ampere does. Network: one 200 Gb/s adapter for four GPUs (OVX L40S).
    "L40S": Gpu(
        tflops=362, tflops_fp32=91.6, memory_gib=44.4, memory_gb_s=864, nvlink_gb_s=25, network_gb_s=6.25,
        host_gb_s=25, gpus_per_node=4, price=1.0, mtbf_hours=_MTBF, **_AMPERE,
    ),
    # images.nvidia.com, Ada whitepaper, appendix A: 165.2 TFLOP/s bf16 with fp32 sums, 82.6 fp32, 24 GB, 1,008 GB/s,
    # PCIe 4 without peer access (through the host, about half). Network: 100 Gb/s for eight GPUs.
    "4090": Gpu(
        tflops=165.2, tflops_fp32=82.6, memory_gib=23.5, memory_gb_s=1008, nvlink_gb_s=12, network_gb_s=1.5,
        host_gb_s=25, gpus_per_node=8, price=0.4, mtbf_hours=20_000, **_AMPERE,
    ),
    # images.nvidia.com, RTX Blackwell whitepaper, appendix A: 209.5 TFLOP/s bf16 with fp32 sums, 104.8 fp32, 32 GB,
    # 1,792 GB/s, PCIe 5. Attention: FlashAttention-2, as on Ada.
    "5090": Gpu(
        tflops=209.5, tflops_fp32=104.8, memory_gib=31.4, memory_gb_s=1792, nvlink_gb_s=25, network_gb_s=1.5,
        host_gb_s=50, gpus_per_node=8, price=0.7, mtbf_hours=20_000, **_AMPERE,
    ),
    # Ada whitepaper, appendix B: 97.5 TFLOP/s bf16 with fp32 sums, 48.7 fp32, 16 GB, 717 GB/s.
    "4080": Gpu(
        tflops=97.5, tflops_fp32=48.7, memory_gib=15.6, memory_gb_s=717, nvlink_gb_s=12, network_gb_s=1.5,
        host_gb_s=25, gpus_per_node=8, price=0.25, mtbf_hours=20_000, **_AMPERE,
    ),
    # nvidia.com, GeForce RTX 4070: 58.3 TFLOP/s bf16 with fp32 sums, 29.1 fp32, 12 GB, 504 GB/s.
    "4070": Gpu(
        tflops=58.3, tflops_fp32=29.1, memory_gib=11.6, memory_gb_s=504, nvlink_gb_s=12, network_gb_s=1.5,
        host_gb_s=25, gpus_per_node=8, price=0.15, mtbf_hours=20_000, **_AMPERE,
    ),
    # A core or two of a common server, as docs/parity.md measured one: 55 GFLOP/s a core in float32, bf16 no faster.
    "cpu": Gpu(
        tflops=0.055, tflops_fp32=0.055, memory_gib=8, memory_gb_s=10, nvlink_gb_s=3, network_gb_s=1,
        host_gb_s=10, gpus_per_node=64, price=0.05, mtbf_hours=100_000,
        attention_forward=0.4, attention_backward=0.4,
    ),
}  # fmt: skip


BY_MEMORY = {
    "12GB": "4070",
    "16GB": "4080",
    "24GB": "4090",
    "32GB": "5090",
    "48GB": "L40S",
    "80GB": "H100",
}
"""What a card is taken for of which only the memory is told."""


class Cluster(Section):
    """So many GPUs of one kind."""

    name: str
    """Of the GPU."""
    gpus: int = Field(ge=1)
    """How many."""
    gpu: Gpu
    """Its numbers."""

    def __str__(self) -> str:
        return f"{self.gpus}x{self.name}"

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpu.gpus_per_node)

    @property
    def device(self) -> str:
        return "cpu" if self.name == "cpu" else "cuda"

    @property
    def memory(self) -> float:
        """Bytes of one GPU."""
        return self.gpu.memory_gib * GIB


def parse_cluster(text: str, settings: dict[str, Any]) -> Cluster:
    """The cluster of `8xH100` or `16xmy_gpu.yaml`; `settings` are `cluster.key=value` by their key.

    Raises:
        ConfigError: no such name, no number, a node half used, or a setting that there is not.
    """
    count, cross, name = text.partition("x")
    if not cross or not count.isdigit() or int(count) < 1 or not name:
        raise ConfigError(
            f"cluster={text} is not NUMBERxNAME, such as cluster=8xH100; names are {', '.join(TABLE)}"
        )
    gpu, name = _gpu(name)
    gpu = read_settings("cluster", Gpu, {**gpu.model_dump(), **settings})
    cluster = Cluster(name=name, gpus=int(count), gpu=gpu)
    per_node = cluster.gpu.gpus_per_node
    if cluster.gpus > per_node and cluster.gpus % per_node:
        low = cluster.gpus // per_node * per_node
        raise ConfigError(
            f"cluster={text}: a node has {per_node} GPUs, and {cluster.gpus} do not fill nodes; take {low} or "
            f"{low + per_node}, or set cluster.gpus_per_node"
        )
    return cluster


def _gpu(name: str) -> tuple[Gpu, str]:
    if name.endswith((".yaml", ".yml")):
        return validated(Gpu, load_yaml(Path(name))), Path(name).stem
    by_lower = {known.lower(): known for known in TABLE}
    known = BY_MEMORY.get(name.upper()) or by_lower.get(name.lower())
    if known is None:
        near = closest(name.lower(), by_lower)
        remedy = f"did you mean {by_lower[near]}? " if near else ""
        raise ConfigError(
            f"cluster: there is no '{name}'; {remedy}there are {', '.join(TABLE)}, or by their memory "
            f"{', '.join(BY_MEMORY)}, or name a file of your own, such as cluster=8xmy_gpu.yaml"
        )
    return TABLE[known], known


def read_settings(section: str, cls: type[S], values: dict[str, Any]) -> S:
    """`cls` of the values that `section.key=value` sets. Raises ConfigError for a wrong one, named by that key."""
    unknown = sorted(set(values) - set(cls.model_fields))
    if unknown:
        hint = did_you_mean(unknown[0], cls.model_fields, f"{section}.")
        raise ConfigError(
            f"{section}.{unknown[0]} does not exist; {hint}there are {', '.join(cls.model_fields)}"
        )
    fields: dict[str, Any] = {section: (cls, ...)}
    whole = validated(create_model("Settings", __base__=Section, **fields), {section: values})
    return cast(S, getattr(whole, section))

"""What the fullest rank holds at the height of a training step, in any layout, from the model's own code.

The step is taken by the engine that trains, on tensors that have sizes and no memory, over a process
group that sends nothing (memory_step.py), in a process of its own (memory_worker.py). Deep models are
counted at two depths: what equal blocks hold is affine in their number.

For `cuda` the attention core is PyTorch's fused one, which keeps no scores, weights compute in
bfloat16 unless told otherwise, and nothing is compiled; what compiled blocks spare is taken off by the caller
(`with_memory` in search.py). What CUDA, NCCL and the allocator take beside tensors is an allowance, `ALLOWANCE` and
`SLACK`.
"""

import atexit
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, cast

from sora_train.config import Config
from sora_train.data.sample import Bucket
from sora_train.errors import ConfigError, Fault
from sora_train.models.memory import compute_bytes
from sora_train.models.quantised.sizes import frozen_sizes
from sora_train.parallel.degrees import resolve_degrees
from sora_train.tools.plan.memory.worker import DEPTHS

GIB = 2**30
ALLOWANCE = int(1.5 * GIB)
"""On a GPU, beside tensors: CUDA's context (about 0.6 GiB), NCCL's buffers, workspaces of kernels."""
SLACK = 0.03
"""On a GPU, of what is not held from step to step: what the allocator cannot hand out, in pieces between others."""
SECONDS = 600.0
"""How long one count may take."""
KINDS = ("weights", "gradients", "optimizer", "ema", "activations", "buffers", "encoders")
SECTIONS = {"model", "text", "vae", "parallel", "adapter", "memory", "optim", "ema", "train"}
"""Of the config: what memory depends on."""
Peaks = dict[str, dict[str, int]]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the fullest rank at the peak of a training step."""

    weights: int
    """Masters, and where an engine keeps them besides, the weights that compute."""
    gradients: int
    optimizer: int
    ema: int
    activations: int
    """Latents, what blocks keep for backward, and what the one at work computes."""
    buffers: int
    """Gathered weights, and on a GPU the allowance."""
    encoders: int
    """The frozen VAE and text encoder, and at `encode` what they compute."""
    peak: int
    """What is held at the same time at the worst moment: the sum of the parts."""
    when: str
    """The moment: `encode`, `forward`, `backward` or `step`."""


def memory_of(
    cfg: Config, world: int, bucket: Bucket, clips: int, device: str = "cuda"
) -> MemoryPlan:
    """The plan of one micro-batch of `clips` clips of this bucket in the layout of cfg.parallel over `world` ranks.

    `device` is what is planned for, `cuda` or `cpu`; nothing of it need be here.

    Raises:
        ConfigError: the degrees do not fill the ranks, or the task is not text_to_video.
        Fault: the process that counts failed or took longer than SECONDS.
    """
    if cfg.task != "text_to_video":
        raise ConfigError(f"task={cfg.task} is not planned; plan an experiment of text_to_video")
    cfg, world = smallest_alike(planned_for(cfg, device), world)
    peaks = peaks_of(cfg, world, bucket, clips)
    frozen = ask(cfg, 1, bucket, clips, "encoders")
    if cfg.memory.encode_first:
        return plan_of(peaks, 0, frozen["apart"], device, first=True)
    return plan_of(peaks, frozen["weights"], frozen["encode"], device)


def planned_for(cfg: Config, device: str) -> Config:
    """The config with what `auto` would be on that device written out, and without what a count cannot do."""
    model, parallel = {"compile": "off"}, dict[str, Any](activation_memory_budget=1.0)
    if device == "cuda":
        if cfg.model.attention != "math":
            model["attention"] = "sdpa"
        if cfg.parallel.param_dtype == "auto":
            parallel["param_dtype"] = "bfloat16"
    return cfg.model_copy(
        update={
            "model": cfg.model.model_copy(update=model),
            "parallel": cfg.parallel.model_copy(update=parallel),
        }
    )


def smallest_alike(cfg: Config, world: int) -> tuple[Config, int]:
    """The same shards, tokens and accumulation with at most two replicas, whose ranks all hold the same."""
    degrees = resolve_degrees(cfg.parallel, world)
    replicas = min(2, degrees.dp_replicate)
    accumulated = min(2, -(-cfg.train.micro_batches // (degrees.dp_replicate * degrees.dp_shard)))
    parallel = {"dp_replicate": replicas, "dp_shard": degrees.dp_shard}
    train = {"micro_batches": accumulated * replicas * degrees.dp_shard}
    alike = cfg.model_copy(
        update={
            "parallel": cfg.parallel.model_copy(update=parallel),
            "train": cfg.train.model_copy(update=train),
        }
    )
    return alike, replicas * degrees.dp_shard * degrees.cp


def peaks_of(cfg: Config, world: int, bucket: Bucket, clips: int) -> Peaks:
    """Bytes by kind at the height of each moment, at the model's depth."""
    layers, every = cfg.model.num_layers, cfg.parallel.checkpoint_every
    low = DEPTHS[0] + (layers - DEPTHS[0]) % every
    step = -(-(DEPTHS[1] - DEPTHS[0]) // every) * every
    if layers <= low + step:
        return at_depth(cfg, layers, world, bucket, clips)
    if cfg.memory.swap_blocks:
        return _without_swapped(cfg, world, bucket, clips)
    some, more = (at_depth(cfg, depth, world, bucket, clips) for depth in (low, low + step))
    return {
        moment: {
            kind: some[moment].get(kind, 0)
            + (more[moment].get(kind, 0) - some[moment].get(kind, 0)) * (layers - low) // step
            for kind in {*some[moment], *more[moment]}
        }
        for moment in some
    }


def _without_swapped(cfg: Config, world: int, bucket: Bucket, clips: int) -> Peaks:
    """The peaks of a deep model of which blocks are swapped: those of the whole, less what is elsewhere."""
    swapped = cfg.memory.swap_blocks
    memory = cfg.memory.model_copy(update={"swap_blocks": 0})
    peaks = peaks_of(cfg.model_copy(update={"memory": memory}), world, bucket, clips)
    w = compute_bytes(cfg.parallel.param_dtype, "cpu")
    away = (swapped - 2) * frozen_sizes(cfg).block_bytes(memory.base, w)
    return {
        moment: {**parts, "weights": parts["weights"] - away} for moment, parts in peaks.items()
    }


def at_depth(cfg: Config, layers: int, world: int, bucket: Bucket, clips: int) -> Peaks:
    model = cfg.model.model_copy(update={"num_layers": layers})
    answer = ask(cfg.model_copy(update={"model": model}), world, bucket, clips, "step")
    return cast(Peaks, answer["peaks"])


def plan_of(peaks: Peaks, frozen: int, encode: int, device: str, first: bool = False) -> MemoryPlan:
    """The worst moment, encoding and the device's own needs added; `first`: the model is placed after encoding."""
    lasting = {kind: peaks["forward"].get(kind, 0) for kind in ("weights", "optimizer", "ema")}
    moments = {moment: {**parts, "encoders": frozen} for moment, parts in peaks.items()}
    moments["encode"] = {**({} if first else lasting), "encoders": frozen + encode}
    if device == "cuda":
        for parts in moments.values():
            passing = sum(parts.get(kind, 0) for kind in ("activations", "buffers", "gradients"))
            parts["buffers"] = parts.get("buffers", 0) + ALLOWANCE + int(SLACK * passing)
    when = max(moments, key=lambda moment: sum(moments[moment].values()))
    parts = {kind: moments[when].get(kind, 0) for kind in KINDS}
    return MemoryPlan(**parts, peak=sum(parts.values()), when=when)


def ask(cfg: Config, world: int, bucket: Bucket, clips: int, part: str) -> dict[str, Any]:
    """The answer of the counting process. Each answer is kept by what memory depends on."""
    sections = cfg.model_dump(mode="json", include=SECTIONS)
    if part == "encoders":
        sections = {name: sections[name] for name in ("model", "text", "vae")}
        sections["model"] = {"in_channels": cfg.model.in_channels}
    size = bucket.frames, bucket.height, bucket.width
    question = {"bucket": size, "world": world, "clips": clips, "part": part}
    key = json.dumps([sections, question], sort_keys=True)
    if key not in _ANSWERS:
        answer = Counter.shared().ask(json.dumps(question | {"config": cfg.model_dump_json()}))
        if "error" in answer:
            if answer.get("user"):
                raise ConfigError(answer["error"])
            raise Fault(f"memory could not be counted: {answer['error']}")
        _ANSWERS[key] = answer
    return _ANSWERS[key]


_ANSWERS: dict[str, dict[str, Any]] = {}


class Counter:
    """The process that counts; started when it is first asked, and there until this one ends."""

    _shared: "Counter | None" = None

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sora_train.tools.plan.memory.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        atexit.register(self.close)

    @classmethod
    def shared(cls) -> "Counter":
        if cls._shared is None or cls._shared.process.poll() is not None:
            cls._shared = cls()
        return cls._shared

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to one question. Raises Fault where none comes."""
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], SECONDS)
            answer = process.stdout.readline() if ready else b""
        except BrokenPipeError:
            answer = b""
        if not answer:
            ended = process.poll() is not None
            self.close()
            failure = "ended" if ended else f"gave no answer within {SECONDS:.0f} s"
            raise Fault(f"the process that counts memory {failure}; plan again")
        return cast(dict[str, Any], json.loads(answer))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

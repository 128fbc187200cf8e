"""An adapter's training step beside diffusers' and peft's, on the same base, adapter and sizes of clips, in turns.

    python -m benchmarks.lora_peer [--repeats N] [--rank R] [--pixels P]

The peer is the loop of diffusers' examples for LoRA (train_cogvideox_lora.py): `add_adapter(LoraConfig)` on frozen
weights, latents and embeddings that are encoded already, noise, the flow-matching loss, clipping, torch's AdamW. It
does not read clips, mask, weigh, judge, average or record, and its latents are drawn beforehand, so clips are the same
in number and size alone. Ours is `Trainer.train_step` on stored clips, on one thread, whose own time counts: other
programs add little to it. Memory is the most bytes of tensors alive in a step, with weights, optimizer and averages of
each; frozen encoders are left out of both, and so are the clips that are read ahead.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.memory import LiveBytes
from benchmarks.model import diffusers_model, take_turns
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.device.measuring import Stats
from sora_train.models.transformer.cpu_kernels import clock
from sora_train.training.components import Components
from sora_train.training.trainer import Trainer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
"""What the examples adapt; ours is `adapter.targets=[attention]`."""
CHECKPOINTING = (("none", "none"), ("selective", "none"), ("full", "full"))
"""Ours and the peer's, which has no other kinds."""
SIZES = [
    "experiment=parity_tiny", "optim=adamw", "text.trainable=false", "text.padding=wan", "data.cache=latents",
    "buckets.max_upscale=16", "data.shapes_image_share=0", "objective.caption_dropout=0",
    "objective.conditioning={}", "model.num_layers=4", "model.num_heads=4", "model.head_dim=64",
    "model.ffn_dim=1024", "model.mask_channel=false", "model.fps_embed=false", "train.steps=1000",
    "checkpoint.every=0", "validation.every=0", "tracker=none",
]  # fmt: skip


class DiffusersLoop:
    """One step of the examples' loop on micro-batches of these latents and embeddings."""

    def __init__(
        self,
        wan: WanTransformer3DModel,
        cfg: Config,
        checkpointing: str,
        batches: list[tuple[Tensor, Tensor]],
    ):
        wan.requires_grad_(False)
        rank = cfg.adapter.rank
        lora = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=TARGETS)
        wan.add_adapter(lora)
        if checkpointing == "full":
            wan.enable_gradient_checkpointing()
        self.wan, self.batches = wan, batches
        self.trained = [parameter for parameter in wan.parameters() if parameter.requires_grad]
        beta1, beta2 = cfg.optim.betas
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=cfg.optim.lr, betas=(beta1, beta2), eps=cfg.optim.eps
        )

    def step(self) -> float:
        total = 0.0
        for latents, captions in self.batches:
            noise, t = torch.randn_like(latents), torch.rand(len(latents))
            noisy = torch.lerp(latents, noise, t[:, None, None, None, None])
            v = self.wan(noisy, t * 1000, captions, return_dict=False)[0]
            loss = (v.float() - (noise - latents)).square().mean() / len(self.batches)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def state(self) -> Iterator[Tensor]:
        yield from self.wan.parameters()
        for kept in self.optimizer.state.values():
            yield from (value for value in kept.values() if isinstance(value, Tensor))


def state_of(parts: Components) -> Iterator[Tensor]:
    """The transformer's weights, the adapter's masters, moments and averages."""
    yield from parts.engine.model.transformer.parameters()
    yield from parts.engine.model_state().values()
    yield from parts.engine.optimizer_state().values()
    for shadows in parts.ema.shadows.values():
        yield from shadows.values()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def peak(step: Callable[[], object], state: Callable[[], Iterable[Tensor]]) -> int:
    """Bytes of what stays between steps and of the most that one makes."""
    with LiveBytes() as live:
        step()
    return bytes_of(state()) + live.peak


@contextmanager
def adapter_run(overrides: list[str]) -> Iterator[Trainer]:
    """A trainer of an adapter on a base of random weights."""
    with tempfile.TemporaryDirectory(prefix="sora_bench_") as folder:
        whole = [override for override in overrides if not override.startswith("adapter.")]
        Trainer(compose([*SIZES, *whole, f"run.dir={folder}/base", "train.steps=1"]).config).train()
        adapted = [f"run.dir={folder}/run", f"init.run={folder}/base", "init.weights=live"]
        trainer = Trainer(compose([*SIZES, *overrides, *adapted]).config)
        try:
            yield trainer
        finally:
            trainer.close()


def compare(own: str, theirs: str, options: argparse.Namespace) -> dict[str, Stats]:
    """How many times as fast as the peer, and the share of its memory."""
    bucket = f"[{{name: b, pixels: {options.pixels**2}, frames: [9], aspect_ratios: ['1:1']}}]"
    overrides = [
        f"buckets.classes={bucket}", f"adapter.rank={options.rank}", f"adapter.alpha={options.rank}",
        "adapter.targets=[attention]", f"parallel.activation_checkpointing={own}",
    ]  # fmt: skip
    with adapter_run(overrides) as trainer:
        cfg = trainer.cfg
        (entry, *_) = trainer.data.micro_batches_at(0)
        shape = trainer.vae.latent_shape(
            entry.bucket.frames, entry.bucket.height, entry.bucket.width
        )
        draws = torch.Generator().manual_seed(cfg.seed)
        batches = [
            (
                torch.randn(len(entry.rows), *shape, generator=draws),
                torch.randn(
                    len(entry.rows), cfg.text.max_length, cfg.model.text_dim, generator=draws
                ),
            )
            for _ in range(cfg.train.micro_batches)
        ]
        base = {
            name.replace(".base_layer.", "."): value.detach().clone()
            for name, value in trainer.engine.model.transformer.named_parameters()
            if ".lora_" not in name
        }
        peer = DiffusersLoop(diffusers_model(cfg.model, base, torch.float32), cfg, theirs, batches)
        taken = take_turns(
            {"ours": lambda: _nothing(trainer.train_step()), "peer": lambda: _nothing(peer.step())},
            3,
            options.repeats,
            clock(),
        )
        mine = peak(trainer.train_step, lambda: state_of(trainer.parts))
        others = peak(peer.step, peer.state)
    tokens = math.prod(shape[1:]) // math.prod(cfg.model.patch_size)
    what = f"{len(batches)} x {len(entry.rows)} clips of {tokens} tokens, checkpointing {own} beside {theirs}"
    ratios = [b / a for a, b in zip(taken["ours"], taken["peer"], strict=True)]
    seconds = Stats.of(taken["ours"]).median
    print(f"{what}: {seconds:.3f} s a step, {mine / 2**20:.1f} MiB and {others / 2**20:.1f} MiB")
    return {
        f"{what}: times as fast": Stats.of(ratios),
        f"{what}: share of its memory": Stats.of([mine / others]),
    }


def _nothing(value: object) -> None:
    """A step whose result is not looked at."""


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=128, help="a side of a clip")
    options = parser.parse_args()
    found: dict[str, Stats] = {}
    for own, theirs in CHECKPOINTING:
        found |= compare(own, theirs, options)
    for name, stats in found.items():
        print(f"{name}: {stats.median:.2f} ({stats.p10:.2f}-{stats.p90:.2f})")


if __name__ == "__main__":
    main()

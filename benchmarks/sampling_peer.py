"""Guided sampling beside diffusers' WanPipeline: the same weights, scheduler, steps, embeddings and noise, in turns.

    sora bench sampling [--repeats N] [--steps N] [--threads N] [--clips NAME,..] [--dtypes NAME,..]

Seconds a step are those of the whole call over its steps: what is done once a clip is in them. Both leave latents, and
each says how far they lie from the peer's in float32; decoding is the same autoencoder for both. Memory is the most
bytes of tensors alive beyond the weights. With one thread its own time counts, to which other programs add little.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from torch import Tensor

from benchmarks.memory import LiveBytes
from benchmarks.model import diffusers_model, take_turns
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.transformer.cpu_kernels import clock
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives.spec import build_spec
from sora_train.sampling.pipeline import sample_latents

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT, SHIFT, SCALE, FPS = "a cat walks over a table", 3.0, 5.0, 8.0
SCHEDULERS = {
    "euler": ("flow_match_euler", "none"),
    "unipc": ("unipc", "truncate"),
}
"""Solver -> the time grid and rounding of diffusers' scheduler for it."""


@dataclass(frozen=True)
class Clip:
    """What is sampled, and by how wide a model of Wan's kind."""

    latents: tuple[int, int, int]
    layers: int
    heads: int
    solver: str
    captions: int = 512
    """Tokens of a caption, padded: Wan's pipelines have 512."""

    @property
    def tokens(self) -> int:
        return math.prod(self.latents) // 4

    def __str__(self) -> str:
        width = 128 * self.heads
        return (
            f"{self.tokens:,} tokens, {self.layers} layers of {width}, captions of {self.captions}"
        )


CLIPS = {
    "image": Clip((1, 32, 32), 6, 4, "unipc"),
    "short": Clip((3, 32, 32), 6, 4, "unipc"),
    "short_text": Clip((3, 32, 32), 6, 4, "euler", captions=128),
    "long": Clip((5, 40, 40), 4, 4, "unipc"),
}


def config_of(clip: Clip) -> Config:
    return compose(
        [
            "experiment=parity_tiny", "text.trainable=false", "text.padding=wan", f"text.max_length={clip.captions}",
            f"model.num_layers={clip.layers}", f"model.num_heads={clip.heads}", "model.head_dim=128",
            f"model.ffn_dim={512 * clip.heads}", "model.in_channels=16", "model.out_channels=16",
            "model.mask_channel=false", "model.fps_embed=false", "tracker=none",
        ]
    ).config  # fmt: skip


def random_model(cfg: Config) -> TextToVideo:
    """One whose last layer is not zero: it would hide every difference."""
    model = TextToVideo(cfg.model, cfg.text, seed=0).eval()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.transformer.proj_out.weight
        weight.copy_(torch.randn(weight.shape, generator=draws) / weight.shape[1] ** 0.5)
    # As `sora_train.load` leaves it.
    model.stays = True
    return model


def peer(
    ours: TextToVideo, cfg: Config, spec: DiffusionSpec, noise: Tensor, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """WanPipeline's call, from embeddings to latents."""
    scheduler = (
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=spec.shift
        )
        if spec.solver == "unipc"
        else FlowMatchEulerDiscreteScheduler(shift=spec.shift)
    )
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=diffusers_model(cfg.model, ours.transformer.state_dict(), dtype).eval(),
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        embedded, empty = (ours.tokenize([prompt])[0] for prompt in (PROMPT, ""))
    height, width = (8 * size for size in noise.shape[-2:])

    def call() -> Tensor:
        made: Tensor = pipeline(
            prompt_embeds=embedded, negative_prompt_embeds=empty, height=height, width=width,
            num_frames=1 + 4 * (noise.shape[2] - 1), num_inference_steps=spec.num_steps,
            guidance_scale=spec.guidance_scale, latents=noise, output_type="latent", return_dict=False,
        )[0]  # fmt: skip
        return made

    return call


def peak(call: Callable[[], Tensor]) -> float:
    """MiB of the most tensors that are alive at once in a call."""
    with LiveBytes() as live:
        call()
    return live.peak / 2**20


def compare(clip: Clip, dtype: str, options: argparse.Namespace) -> str:
    """A row of the table."""
    cfg = config_of(clip)
    ours = random_model(cfg)
    spec = build_spec(cfg, VideoVAE.from_config(cfg.vae), ours)
    assert spec is not None
    grid, rounding = SCHEDULERS[clip.solver]
    spec = spec.replace(
        solver=clip.solver, time_grid=grid, time_rounding=rounding, num_steps=options.steps, shift=SHIFT,
        shift_rule="constant", guidance_scale=SCALE,
    )  # fmt: skip
    noise = torch.randn(1, 16, *clip.latents, generator=torch.Generator().manual_seed(0))
    expected = peer(ours, cfg, spec, noise, torch.float32)()
    theirs = peer(ours, cfg, spec, noise, DTYPES[dtype])
    # As `sora_train.load` does it.
    ours.transformer.to(DTYPES[dtype])

    def mine() -> Tensor:
        return sample_latents(ours, spec, [PROMPT], noise, FPS)

    def apart(made: Tensor) -> float:
        return float((made.float() - expected).norm() / expected.norm())

    calls = {"ours": lambda: _nothing(mine()), "peer": lambda: _nothing(theirs())}
    taken = take_turns(calls, 0, options.repeats, clock())
    ratios = sorted(a / b for a, b in zip(taken["ours"], taken["peer"], strict=True))
    ours_s, peer_s = (sorted(taken[name])[len(ratios) // 2] / spec.num_steps for name in calls)
    middle = ratios[len(ratios) // 2]
    return (
        f"| {clip}, {clip.solver}, {dtype} | {ours_s:.3f} | {peer_s:.3f} | "
        f"{middle:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) | "
        f"{peak(mine):.0f} | {peak(theirs):.0f} | {apart(mine()):.1e} | {apart(theirs()):.1e} |"
    )


def _nothing(value: object) -> None:
    """A call whose result is not looked at."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clips", default=",".join(CLIPS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    options = parser.parse_args(arguments)
    for flag, known in (("clips", CLIPS), ("dtypes", DTYPES)):
        unknown = [name for name in getattr(options, flag).split(",") if name not in known]
        if unknown:
            raise UserError(f"--{flag} has no '{unknown[0]}'; choose among {', '.join(known)}")
    torch.set_num_threads(options.threads)
    print(
        "| clip | ours, s a step | WanPipeline | ratio (least-most) | MiB | WanPipeline | off | WanPipeline |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for name in options.clips.split(","):
        for dtype in options.dtypes.split(","):
            print(compare(CLIPS[name], dtype, options), flush=True)
    return 0


if __name__ == "__main__":
    main()

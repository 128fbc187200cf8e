"""A training step written out in float64, from the clips to the weights, by code that is not the package's.

The networks are those of diffusers (`WanTransformer3DModel`) and transformers (`UMT5EncoderModel`); the two inputs that
the package adds to Wan, the mask of given frames and the frame rate, are hooks of a few lines. What chance decides,
the path, the loss, AdamW, the averages and the sampler are written from the formulas of the papers. Of the package only
two things are used: the primitive draws, one sample at a time (test_draws.py pins their values), and the clips as the
loader delivers them.

Dimension key: C latent channels, T, H, W latent frames, rows, columns, L video tokens.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import diffusers.models.embeddings as embeddings
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from sora_train.config import Config
from sora_train.data.sample import Clip
from sora_train.diffusion.draws import draw_noise, draw_uniform

# Of two dimensions or more, and still not decayed: tables and embeddings.
TABLES = ("scale_shift_table", "shared.weight", "relative_attention_bias.weight")


@contextmanager
def float64_kept() -> Iterator[None]:
    """diffusers' casts to float32, and its float32 sinusoid, lifted inside the block."""
    to_float, sine = torch.Tensor.float, embeddings.get_timestep_embedding

    def keep(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if x.dtype == torch.float64 else to_float(x, *args, **kwargs)

    torch.Tensor.float = keep  # type: ignore[assignment, method-assign]
    embeddings.get_timestep_embedding = lambda x, width, **_: sinusoid(x, width)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.Tensor.float = to_float  # type: ignore[method-assign]
        embeddings.get_timestep_embedding = sine


def sinusoid(x: Tensor, width: int) -> Tensor:
    """cos and sin of x at frequencies from 1 down to 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2).double() / (width // 2))
    angles = x.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Model(nn.Module):
    """The text encoder and the transformer of a config, in float64."""

    def __init__(self, cfg: Config):
        super().__init__()
        m, text = cfg.model, cfg.text
        self.wan = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=m.num_heads, attention_head_dim=m.head_dim,
            in_channels=m.in_channels, out_channels=m.in_channels, text_dim=m.text_dim,
            freq_dim=m.freq_dim, ffn_dim=m.ffn_dim, num_layers=m.num_layers, rope_max_seq_len=64,
        )  # fmt: skip
        self.t5 = UMT5EncoderModel(UMT5Config(
            vocab_size=384, d_model=text.d_model, num_layers=text.num_layers, num_heads=text.num_heads,
            d_kv=text.d_kv, d_ff=text.d_ff, dropout_rate=0.0,
        ))  # fmt: skip
        dim, self.freq_dim, self.max_length = m.num_heads * m.head_dim, m.freq_dim, text.max_length
        self.mask_proj = nn.Parameter(torch.zeros(dim, 1, 1, 2, 2))
        self.fps_proj = nn.Parameter(torch.zeros(dim, m.freq_dim))
        self.double()
        self.mask = self.fps = torch.zeros(0)
        self.wan.patch_embedding.register_forward_hook(
            lambda _, __, out: out + F.conv3d(self.mask, self.mask_proj, stride=(1, 2, 2))
        )
        self.wan.condition_embedder.time_embedder.register_forward_hook(
            lambda _, __, out: out + F.linear(sinusoid(self.fps, self.freq_dim), self.fps_proj)
        )

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters under the names that a run has for them."""
        found = {f"transformer.{name}": p for name, p in self.wan.named_parameters()}
        found["transformer.mask_proj.weight"] = self.mask_proj
        found["transformer.fps_proj.weight"] = self.fps_proj
        return found | {f"text_encoder.model.{name}": p for name, p in self.t5.named_parameters()}

    @torch.no_grad()
    def fill(self, weights: dict[str, np.ndarray]) -> None:
        named = self.named()
        assert named.keys() == weights.keys()
        for name, value in weights.items():
            named[name].copy_(torch.from_numpy(value))

    def caption(self, text: str) -> Tensor:
        """Embeddings (1, S, E) of UTF-8 bytes and an end mark; alone, a caption needs no padding."""
        ids = [byte + 3 for byte in text.encode()][: self.max_length - 1] + [1]
        found: Tensor = self.t5(input_ids=torch.tensor([ids])).last_hidden_state
        return found

    def forward(self, z: Tensor, t_T: Tensor, text: str, mask_T: Tensor, fps: float) -> Tensor:
        """Velocity (1, C, T, H, W) from z of that shape, a noise level and a mask of each latent frame."""
        _, _, _, rows, columns = z.shape
        self.mask = mask_T.double().view(1, 1, -1, 1, 1).expand(-1, -1, -1, rows, columns)
        self.fps = torch.tensor(fps).double()
        tokens = rows // 2 * (columns // 2)
        with float64_kept():
            levels_L = (t_T.double() * 1000).repeat_interleave(tokens)[None]
            return self.wan(z.double(), levels_L, self.caption(text), return_dict=False)[0]


def latents(vae: AutoencoderKLWan, pixels: np.ndarray) -> Tensor:
    """Standardised latents (1, C, T, H, W), float64, of a clip uint8 (F, height, width, 3)."""
    moved = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
    with torch.no_grad():
        mean = vae.encode(moved).latent_dist.mean.double()
    centre, spread = (
        torch.tensor(values).double().view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (mean - centre) / spread


# --- what chance decides ---


@dataclass(frozen=True)
class Draws:
    """Of one clip."""

    kind: str
    mask_T: Tensor
    t: float
    is_high: bool
    t_cond: float
    prompt: str


def draws_of(cfg: Config, clip: Clip, size: tuple[int, int, int]) -> Draws:
    """Every draw has a stream of its own, keyed by the clip's epoch and row. Kinds: t2v and i2v."""
    goal, key = cfg.objective, [(clip.epoch, clip.row)]

    def u(stream: str) -> float:
        return float(draw_uniform(cfg.seed, stream, key))

    given = goal.conditioning.i2v
    is_i2v = (
        size[0] > 1 and u("cond_kind") >= 1 - given and u("cond_dropout") >= goal.condition_dropout
    )
    mask_T = torch.zeros(size[0])
    mask_T[0] = float(is_i2v)
    t, is_high = noise_level(cfg, u("timestep"), size)
    noisy = u("cond_noise") < goal.condition_noise_share
    return Draws(
        kind="i2v" if is_i2v else "t2v",
        mask_T=mask_T,
        t=t,
        is_high=is_high,
        t_cond=u("cond_noise_level") * goal.condition_noise_max if noisy else 0.0,
        prompt="" if u("caption_dropout") < goal.caption_dropout else clip.caption,
    )


def noise_level(cfg: Config, u: float, size: tuple[int, int, int]) -> tuple[float, bool]:
    """The logit-normal law, shifted; above it a share of the clips at high noise. Also whether it is one of these."""
    goal = cfg.objective
    kept = 1 - goal.high_noise_share
    if u >= kept:
        start = goal.high_noise_from
        return start + (1 - start) * (u - kept) / goal.high_noise_share, True
    logit = goal.time_mean + goal.time_std * NormalDist().inv_cdf(u / kept)
    return shifted(1 / (1 + math.exp(-logit)), shift_of(cfg, size)), False


def shift_of(cfg: Config, size: tuple[int, int, int]) -> float:
    frames, rows, columns = size
    frame = 1 + 2 * (rows * columns / 4 - 256) / (4096 - 256)
    rules = {"constant": 1.0, "length": math.sqrt(frames), "frame": frame}
    return cfg.objective.shift * rules[cfg.objective.shift_rule]


def shifted(t: float, s: float) -> float:
    """Esser et al. 2024, arXiv:2403.03206, eq. 23."""
    return s * t / (1 + (s - 1) * t)


# --- the loss ---


def time_weight(cfg: Config, t: float) -> float:
    match cfg.objective.weighting:
        case "min_snr":
            return min((1 - t) ** 2, cfg.objective.min_snr_gamma * t**2)
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * t + 2 * t * t))
    return 1.0


def clip_loss(
    cfg: Config, model: Model, clip: Clip, x: Tensor, draws: Draws
) -> tuple[Tensor, float]:
    """A clip's part of the loss's sum, and its part of the sum's weight."""
    given_T = draws.mask_T
    noise = draw_noise(cfg.seed, "noise", [(clip.epoch, clip.row)], x.shape[1:]).double()
    t_T = torch.where(given_T > 0, draws.t_cond, draws.t).double()
    z = (1 - t_T.view(1, 1, -1, 1, 1)) * x + t_T.view(1, 1, -1, 1, 1) * noise
    v = model(z, t_T, draws.prompt, given_T, clip.fps)
    errors_T = (v - (noise - x)).square().mean(dim=(0, 1, 3, 4))[given_T == 0]
    weight = time_weight(cfg, draws.t)
    if cfg.loss.reduce == "per_sample":
        return weight * errors_T.mean(), 1.0
    tokens = x.shape[3] // 2 * (x.shape[4] // 2)
    return weight * errors_T.sum() * tokens, float(len(errors_T) * tokens)


# --- the optimizer and the averages ---


def learning_rate(cfg: Config, number: int) -> float:
    """Of step `number`, counted from 1: a linear rise, then a linear fall over the steps after it."""
    optim, steps = cfg.optim, cfg.train.steps
    if number <= optim.warmup_steps:
        return optim.lr * number / optim.warmup_steps
    done = (number - 1 - optim.warmup_steps) / (steps - optim.warmup_steps)
    return optim.lr * (1 - done * (1 - optim.final_lr_fraction))


def is_decayed(name: str, value: np.ndarray) -> bool:
    return value.ndim >= 2 and not name.endswith(TABLES)


class AdamW:
    """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, with a rate and a decay for each tensor."""

    def __init__(self, cfg: Config, weights: dict[str, np.ndarray]):
        self.cfg, self.number = cfg.optim, 0
        self.m = {name: np.zeros_like(value) for name, value in weights.items()}
        self.v = {name: np.zeros_like(value) for name, value in weights.items()}

    def step(self, weights: dict[str, np.ndarray], grads: dict[str, np.ndarray], lr: float) -> None:
        cfg, (b1, b2) = self.cfg, self.cfg.betas
        self.number += 1
        for name, g in grads.items():
            rate = lr * (cfg.text_lr_scale if name.startswith("text_encoder.") else 1.0)
            m, v = self.m[name], self.v[name]
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            m_hat, v_hat = m / (1 - b1**self.number), v / (1 - b2**self.number)
            decay = cfg.weight_decay if is_decayed(name, g) else 0.0
            weights[name] -= rate * (m_hat / (np.sqrt(v_hat) + cfg.eps) + decay * weights[name])


def ramped(decay: float, number: int) -> float:
    """What is kept of an average in step `number`, counted from 1: min(decay, number / (9 + number))."""
    return min(decay, number / (9 + number))


def power(sigma_rel: float, number: int) -> float:
    """Karras et al. 2024, arXiv:2312.02696, eq. 127, with the exponent of eq. 123 found by halving an interval."""
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        width = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))
        low, high = (gamma, high) if width > sigma_rel else (low, gamma)
    return (1 - 1 / number) ** (low + 1)


# --- sampling ---


def sample(cfg: Config, model: Model, prompt: str, z: Tensor, fps: float) -> Tensor:
    """Euler's method down the shifted grid, with guidance from the empty caption."""
    goal, frames = cfg.objective, z.shape[2]
    shift = shift_of(cfg, tuple(z.shape[2:]))
    times = [shifted(1 - i / goal.num_steps, shift) for i in range(goal.num_steps + 1)]
    none_T = torch.zeros(frames)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        levels_T = torch.full((frames,), t).double()
        with torch.no_grad():
            told, null = (model(z, levels_T, text, none_T, fps) for text in (prompt, ""))
        z = z + (t_next - t) * (null + goal.guidance_scale * (told - null))
    return z

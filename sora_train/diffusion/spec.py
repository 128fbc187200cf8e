"""The diffusion spec: everything loss and sampler must agree on, in one frozen object stored in
every checkpoint.

It has no defaults: values come from the config in training and from the checkpoint afterwards.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_train.diffusion import timesteps
from sora_train.diffusion.condition_masks import KINDS

_CHOICES = {
    "prediction": ("velocity",),
    "time_law": timesteps.TIME_LAWS,
    "shift_rule": timesteps.SHIFT_RULES,
    "solver": ("euler", "heun", "unipc"),
    "time_grid": timesteps.TIME_GRIDS,
    "time_rounding": timesteps.TIME_ROUNDINGS,
    "text_padding": ("wan", "masked"),
    "weighting": timesteps.WEIGHTINGS,
    "cond_mode": ("replace", "concat"),
    "vae_normalisation": ("per_channel", "scale"),
    "expert": ("", "high", "low", "both"),
}

_SHARES = (
    "caption_dropout",
    "high_noise_share",
    "high_noise_from",
    "condition_noise_share",
    "condition_noise_max",
    "condition_dropout",
    "frame_noise_share",
    "history_noise",
    "guidance_from",
    "guidance_to",
    "guidance_rescale",
)

VERSION = 4
"""Version of what `to_dict` writes; files without a version are of version 1."""

_SINCE: dict[int, dict[str, Any]] = {
    2: {
        "high_noise_share": 0.0,
        "high_noise_from": 0.98,
        "weighting": "uniform",
        "min_snr_gamma": 5.0,
        "cond_mode": "replace",
        "condition_noise_share": 0.0,
        "condition_noise_max": 0.1,
        "condition_dropout": 0.0,
        "condition_scale": 1.0,
        "guidance_from": 0.0,
        "guidance_to": 1.0,
        "guidance_rescale": 0.0,
        "time_grid": "even",
        "time_rounding": "none",
        "vae_dtype": "float32",
        "vae_normalisation": "per_channel",
        "text_dtype": "float32",
    },
    3: {
        "image_digest": "",
        "image_dtype": "float32",
        "expert": "",
        "boundary": 0.0,
        "guidance_scale_2": 0.0,
    },
    4: {
        "folded_guidance": 0.0,
        "frame_noise_share": 0.0,
        "history_frames": 13,
        "history_noise": 0.02,
        "history_shift": 0.0,
    },
}
"""Fields by the version that brought them, each with what all earlier checkpoints did. Whoever adds
a field after a release adds a version, so that a lost field and one that did not exist yet
are not the same."""


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec:
    """See the fields. Raises ValueError when a value is impossible."""

    prediction: str
    """What the model predicts: `velocity`, noise - x."""
    time_law: str
    """Distribution of t in training: `uniform`, `logit_normal` or `mode`."""
    time_mean: float
    """Mean of logit(t) under `logit_normal`."""
    time_std: float
    """Standard deviation of logit(t) under `logit_normal`."""
    mode_scale: float
    """Scale s of the `mode` law."""
    shift: float
    """Time shift, in training and sampling alike."""
    shift_rule: str
    """`constant`: `shift` for every clip; others: times `timesteps.shift_factor` of the clip."""
    high_noise_share: float
    """Share of samples trained at a noise level uniform in [high_noise_from, 1], after the shift."""
    high_noise_from: float
    """Where high noise begins."""
    expert: str
    """Noise levels that the model computes: `high` from `boundary` on, `low` those below, `both` all of them by a
    transformer for each; empty: all by one transformer."""
    boundary: float
    """Noise level, after the shift, at which the experts meet; 0 without experts."""
    weighting: str
    """Factor on the loss by noise level: `timesteps.loss_weight`."""
    min_snr_gamma: float
    """Gamma of `weighting: min_snr`."""
    num_steps: int
    """Sampler steps."""
    guidance_scale: float
    """Classifier-free guidance; 1 is none."""
    guidance_scale_2: float
    """The same below `boundary`; 0: `guidance_scale` there too."""
    folded_guidance: float
    """Guidance that distillation has put into the weights, which are then sampled without any; 0: they were not
    distilled."""
    condition_scale: float
    """The same for condition frames, against a clip without them; 1 is none."""
    guidance_from: float
    """Lowest noise level t with guidance."""
    guidance_to: float
    """Highest noise level t with guidance."""
    guidance_rescale: float
    """Share of the spread that guidance adds to the velocity and that is taken back."""
    solver: str
    """ODE solver: `euler`, `heun` or `unipc`."""
    time_grid: str
    """Times of the sampler's steps: see `timesteps.sampling_times`."""
    time_rounding: str
    """How these times are rounded for the model: `none` or `truncate`."""
    latent_channels: int
    """Channels of the latents."""
    vae_digest: str
    """Digest of the VAE: weights, sizes and latent normalisation."""
    vae_dtype: str
    """Precision in which the VAE computed the latents."""
    vae_normalisation: str
    """Its convention: `per_channel` (mean and deviation) or `scale` (shift and factor)."""
    text_digest: str
    """Digest of the text encoder."""
    text_dtype: str
    """Precision in which the text encoder computes."""
    image_digest: str
    """Digest of the image encoder; empty: the model has none."""
    image_dtype: str
    """Precision in which the image encoder computes."""
    text_padding: str
    """`wan` (attend to zero padding) or `masked`."""
    caption_dropout: float
    """Share of samples trained on the empty caption."""
    conditioning: tuple[tuple[str, float], ...]
    """(kind, probability) of the condition frames; probabilities sum to 1."""
    cond_mode: str
    """How condition frames reach the model: `replace` puts them into the noisy latents, `concat` beside
    them as further channels (Wan 2.1's image-to-video layout)."""
    condition_noise_share: float
    """Share of samples whose condition frames carry noise."""
    condition_noise_max: float
    """Their noise levels are uniform in [0, condition_noise_max)."""
    condition_dropout: float
    """Share of samples from which the condition frames are withheld, drawn apart from the captions'."""
    frame_noise_share: float
    """Share of samples of which each latent frame has a noise level of its own (diffusion forcing)."""
    history_frames: int
    """Frames of a long video that each next window is shown."""
    history_noise: float
    """Noise level at which they are shown."""
    history_shift: float
    """Time shift of windows that are shown some; 0: `shift`."""

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"diffusion spec: {key} is {getattr(self, key)!r}; choose one of "
                    f"{', '.join(choices)}"
                )
        positive = [
            key
            for key in (
                "time_std",
                "shift",
                "num_steps",
                "latent_channels",
                "min_snr_gamma",
                "history_frames",
            )
            if getattr(self, key) <= 0
        ]
        if positive:
            raise ValueError(
                f"diffusion spec: {positive[0]} is {getattr(self, positive[0])}; it must be above 0"
            )
        if self.folded_guidance and self.guidance_scale != 1:
            raise ValueError(
                f"diffusion spec: guidance_scale is {self.guidance_scale:g}, and guidance of "
                f"{self.folded_guidance:g} is in the distilled weights already; it must be 1"
            )
        for key in ("guidance_scale", "condition_scale", "folded_guidance", "history_shift"):
            if getattr(self, key) < 0:
                raise ValueError(f"diffusion spec: {key} ({getattr(self, key)}) must be 0 or more")
        if self.guidance_from > self.guidance_to:
            raise ValueError(
                f"diffusion spec: guidance_from ({self.guidance_from}) is above guidance_to "
                f"({self.guidance_to}); the first is the lowest noise level with guidance"
            )
        for key in _SHARES:
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(
                    f"diffusion spec: {key} is {getattr(self, key)}; it must lie between 0 and 1"
                )
        if self.time_law == "mode" and not -1 <= self.mode_scale <= 1.75:
            raise ValueError(
                f"diffusion spec: mode_scale is {self.mode_scale}; t stays in [0, 1] from -1 to "
                "1.75 only"
            )
        self._check_conditioning()
        self._check_experts()

    def _check_experts(self) -> None:
        if self.expert and not 0 < self.boundary < 1:
            raise ValueError(
                f"diffusion spec: boundary is {self.boundary}; it is the noise level at which two experts meet, so it "
                "must lie between 0 and 1"
            )
        if self.guidance_scale_2 and not self.expert:
            raise ValueError(
                f"diffusion spec: guidance_scale_2 is {self.guidance_scale_2:g}, and one transformer computes all "
                "noise levels; set it to 0"
            )
        from_too_low = self.high_noise_from < self.boundary or self.expert == "low"
        if self.expert and self.high_noise_share and from_too_low:
            raise ValueError(
                f"diffusion spec: high_noise_share is {self.high_noise_share:g}, from {self.high_noise_from:g} on, and "
                f"the expert '{self.expert}' is trained on one side of the boundary {self.boundary:g}; set it to 0"
            )

    def _check_conditioning(self) -> None:
        object.__setattr__(
            self, "conditioning", tuple((str(kind), float(p)) for kind, p in self.conditioning)
        )
        unknown = [kind for kind, _ in self.conditioning if kind not in KINDS]
        if unknown:
            raise ValueError(
                f"diffusion spec: conditioning kind '{unknown[0]}' is unknown; choose among "
                f"{', '.join(KINDS)}"
            )
        probabilities = [p for _, p in self.conditioning]
        if min(probabilities, default=-1) < 0 or abs(sum(probabilities) - 1) > 1e-6:
            raise ValueError(
                f"diffusion spec: conditioning probabilities {probabilities} must be >= 0 and sum "
                "to 1"
            )

    def shift_for(self, latent_size: Sequence[int]) -> float:
        """Time shift of a clip whose latents have (t, h, w) = `latent_size`."""
        return self.shift * timesteps.shift_factor(self.shift_rule, latent_size)

    def training_times(self, u_B: Tensor, latent_size: Sequence[int], expert: str = "") -> Tensor:
        """Noise levels in [0, 1] from uniform draws of any shape: the spec's law, then its shift; and
        the share of high noise.

        Of an `expert` they are those of the law that lie in its window, the shift applied first: with b the
        boundary [b, 1] for `high`, [0, b) for `low`.
        """
        share = 0.0 if expert == "low" else self.high_noise_share
        u_B, high_B = timesteps.high_noise(u_B, share, self.high_noise_from)
        if expert:
            below = share_below(self, tuple(latent_size))
            u_B = u_B * below if expert == "low" else below + u_B * (1 - below)
        t_B = self.shifted_law(u_B, latent_size)
        if expert:
            edge = torch.tensor(self.boundary, dtype=t_B.dtype, device=t_B.device)
            # What a draw is rounded to may lie a digit beyond.
            t_B = t_B.clamp(max=edge.nextafter(edge * 0)) if expert == "low" else t_B.clamp(edge)
        return torch.where(high_B.isnan(), t_B, high_B)

    def shifted_law(self, u_B: Tensor, latent_size: Sequence[int]) -> Tensor:
        """Noise levels (B,) in [0, 1] of the spec's law, after its shift."""
        match self.time_law:
            case "uniform":
                t_B = timesteps.uniform(u_B)
            case "logit_normal":
                t_B = timesteps.logit_normal(u_B, self.time_mean, self.time_std)
            case _:
                t_B = timesteps.mode(u_B, self.mode_scale)
        return timesteps.shift_t(t_B, self.shift_for(latent_size)).clamp(0, 1)

    def expert_at(self, t: Tensor) -> str:
        """Which expert computes a noise level, a tensor of one value; empty where one transformer computes all.

        Compared in the precision of `t`, in which the boundary has its own rounding, as diffusers' pipelines do:
        the boundary itself is the high-noise expert's.
        """
        if not self.expert:
            return ""
        return "high" if bool(t >= self.boundary) else "low"

    def computes(self, t: float) -> bool:
        """Whether the model computes this noise level."""
        at = self.expert_at(torch.tensor(t, dtype=torch.float64))
        return self.expert in ("", "both", at)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Factor on the loss at noise levels t."""
        return timesteps.loss_weight(self.weighting, t, self.min_snr_gamma)

    def sampling_times(self, latent_size: Sequence[int]) -> Tensor:
        """The sampler's grid from 1 to 0, (num_steps + 1,), float64."""
        return timesteps.sampling_times(self.num_steps, self.shift_for(latent_size), self.time_grid)

    def replace(self, **changes: Any) -> "DiffusionSpec":
        """A copy with other sampler settings, for example num_steps=20."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "version": VERSION,
            **dataclasses.asdict(self),
            "conditioning": [list(pair) for pair in self.conditioning],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DiffusionSpec":
        """The inverse of to_dict, of files of earlier versions too: fields that did not exist then
        get the value by which those checkpoints were trained.

        Raises ValueError naming unknown and missing keys, or a version from the future.
        """
        values = dict(values)
        version = values.pop("version", 1)
        if version not in range(1, VERSION + 1):
            raise ValueError(
                f"diffusion spec: it is of version {version} and this program reads up to "
                f"{VERSION}; take a newer sora_train"
            )
        for since in range(version + 1, VERSION + 1):
            values = _SINCE[since] | values
        names = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(set(values) - names), sorted(names - set(values))
        if unknown or missing:
            raise ValueError(
                f"diffusion spec: unknown keys {unknown}, missing keys {missing}; it was written "
                "by another version"
            )
        return cls(**{**values, "conditioning": tuple(map(tuple, values["conditioning"]))})

    def digest(self) -> str:
        """SHA-256 of the spec, 64 hex digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@functools.lru_cache(1024)
def share_below(spec: DiffusionSpec, latent_size: tuple[int, ...]) -> float:
    """How much of the spec's law lies below its boundary for clips of latents (t, h, w)."""
    return timesteps.share_below(lambda u: spec.shifted_law(u, latent_size), spec.boundary)

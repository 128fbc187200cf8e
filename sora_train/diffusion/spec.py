"""The diffusion spec: everything loss and sampler must agree on, in one frozen object stored in
every checkpoint.

It has no defaults: values come from the config in training and from the checkpoint afterwards.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sora_train.diffusion import timesteps
from sora_train.diffusion.conditioning import KINDS

_CHOICES = {
    "prediction": ("velocity",),
    "time_law": timesteps.TIME_LAWS,
    "shift_rule": timesteps.SHIFT_RULES,
    "solver": ("euler", "heun"),
    "text_padding": ("wan", "masked"),
}


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
    """`constant`: `shift` for every clip; `resolution`: times `timesteps.resolution_factor` of the
    clip."""
    num_steps: int
    """Sampler steps."""
    guidance_scale: float
    """Classifier-free guidance; 1 is none."""
    solver: str
    """ODE solver: `euler` or `heun`."""
    latent_channels: int
    """Channels of the latents."""
    vae_digest: str
    """Digest of the VAE: weights, sizes and latent normalisation."""
    text_digest: str
    """Digest of the text encoder."""
    text_padding: str
    """`wan` (attend to zero padding) or `masked`."""
    caption_dropout: float
    """Share of samples trained on the empty caption."""
    conditioning: tuple[tuple[str, float], ...]
    """(kind, probability) of what is given to the model besides the caption; probabilities sum to
    1."""

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"diffusion spec: {key} is {getattr(self, key)!r}; choose one of "
                    f"{', '.join(choices)}"
                )
        positive = [
            key
            for key in ("time_std", "shift", "num_steps", "latent_channels")
            if getattr(self, key) <= 0
        ]
        if positive:
            raise ValueError(
                f"diffusion spec: {positive[0]} is {getattr(self, positive[0])}; it must be above 0"
            )
        if self.guidance_scale < 0 or not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"diffusion spec: guidance_scale ({self.guidance_scale}) must be 0 or more and "
                f"caption_dropout ({self.caption_dropout}) between 0 and 1"
            )
        if self.time_law == "mode" and not -1 <= self.mode_scale <= 1.75:
            raise ValueError(
                f"diffusion spec: mode_scale is {self.mode_scale}; t stays in [0, 1] from -1 to "
                "1.75 only"
            )
        self._check_conditioning()

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
        if self.shift_rule == "constant":
            return self.shift
        return self.shift * timesteps.resolution_factor(latent_size)

    def training_times(self, u_B: Tensor, latent_size: Sequence[int]) -> Tensor:
        """Noise levels (B,) in [0, 1] from uniform draws (B,): the spec's law, then its shift."""
        match self.time_law:
            case "uniform":
                t_B = timesteps.uniform(u_B)
            case "logit_normal":
                t_B = timesteps.logit_normal(u_B, self.time_mean, self.time_std)
            case _:
                t_B = timesteps.mode(u_B, self.mode_scale)
        return timesteps.shift_t(t_B, self.shift_for(latent_size)).clamp(0, 1)

    def sampling_times(self, latent_size: Sequence[int]) -> Tensor:
        """The sampler's grid from 1 to 0, (num_steps + 1,), float64."""
        return timesteps.sampling_times(self.num_steps, self.shift_for(latent_size))

    def replace(self, **changes: Any) -> "DiffusionSpec":
        """A copy with other sampler settings, for example num_steps=20."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "conditioning": [list(pair) for pair in self.conditioning],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DiffusionSpec":
        """The inverse of to_dict. Raises ValueError naming unknown and missing keys."""
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

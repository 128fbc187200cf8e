"""The video VAEs that can be used as they are published, one row each: which class of diffusers runs
it, how its latents are normalised, which clips it takes."""

from dataclasses import dataclass
from typing import Any, Literal

from sora_train.errors import ConfigError

WAN = "AutoencoderKLWan"


@dataclass(frozen=True)
class VaeKind:
    """A class of diffusers and the conventions of the weights made for it."""

    class_name: str
    published: tuple[str, ...]
    """Hub ids of such weights."""
    normalisation: Literal["per_channel", "scale"]
    """`per_channel`: (raw - latents_mean) / latents_std. `scale`: (raw - shift_factor) *
    scaling_factor, the shift being 0 where the config has none."""
    frame_step: int
    """Clips have 1 + k * frame_step frames: others lose frames on the way through, or gain some."""
    causal: bool
    """Whether a latent frame depends on no later pixel frame; with statistics over time (GroupNorm) it does."""
    channels: int
    temporal_factor: int
    spatial_factor: int
    """Latent channels and compression as published; a folder's own config goes before."""

    def check_normalisation(self, config: dict[str, Any], where: str) -> None:
        """Raises ConfigError when the config leaves out what normalises its latents."""
        needed = (
            ("latents_mean", "latents_std")
            if self.normalisation == "per_channel"
            else ("scaling_factor",)
        )
        missing = [key for key in needed if config.get(key) is None]
        if missing:
            raise ConfigError(
                f"{where}: its config.json states no {' and no '.join(missing)}, so how its latents "
                f"are normalised is unknown; take the config.json that was published with the "
                f"weights of {self.class_name}"
            )


KINDS: dict[str, VaeKind] = {
    kind.class_name: kind
    for kind in (
        VaeKind(
            WAN,
            ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
            "per_channel",
            frame_step=4,
            causal=True,
            channels=16,
            temporal_factor=4,
            spatial_factor=8,
        ),
        VaeKind(
            "AutoencoderKLHunyuanVideo",
            ("hunyuanvideo-community/HunyuanVideo",),
            "scale",
            frame_step=4,
            causal=False,
            channels=16,
            temporal_factor=4,
            spatial_factor=8,
        ),
        # Decoded two latent frames at a time, the odd one going with the first two: an even number
        # of latent frames would come back with three frames more.
        VaeKind(
            "AutoencoderKLCogVideoX",
            ("THUDM/CogVideoX-2b", "THUDM/CogVideoX-5b"),
            "scale",
            frame_step=8,
            causal=False,
            channels=16,
            temporal_factor=4,
            spatial_factor=8,
        ),
    )
}


def kind_of(config: dict[str, Any], where: str) -> VaeKind:
    """The row of a config.json. Raises ConfigError for a class without one."""
    name = config.get("_class_name", WAN)
    if name not in KINDS:
        raise ConfigError(
            f"{where} is of class {name}, and how its latents are normalised is not known here; "
            f"known are {', '.join(KINDS)}"
        )
    return KINDS[name]


def find_class(name: str) -> Any:
    """The class of this diffusers. Raises ConfigError when it has none of that name."""
    import diffusers

    vae_class = getattr(diffusers, name, None)
    if vae_class is None:
        raise ConfigError(
            f"vae: this diffusers ({diffusers.__version__}) has no {name}; install a version that "
            "does"
        )
    return vae_class

"""What shape a VAE's latents have, known from its config alone: planning needs no weights."""

import math
from dataclasses import dataclass
from typing import Any

from sora_train.errors import ConfigError, UserError
from sora_train.models.vae.published import KINDS, WAN

# AutoencoderKLWan encodes this many frames at a time after the first, whatever its temporal factor
# is.
CHUNK = 4


@dataclass(frozen=True)
class Geometry:
    """Latent channels, and by how much frames and pixels are compressed."""

    channels: int
    temporal_factor: int
    spatial_factor: int
    at_once: int = CHUNK
    """Frames that the class takes at a time after the first one; an incomplete lot is lost."""

    @classmethod
    def of(cls, arch: dict[str, Any], class_name: str = WAN) -> "Geometry":
        """The geometry of a class's arguments. Raises ConfigError for those that AutoencoderKLWan
        cannot run."""
        if class_name == WAN:
            return cls(arch.get("z_dim", 16), *factors(arch))
        kind = KINDS[class_name]
        spatial = kind.spatial_factor
        if "block_out_channels" in arch:
            spatial = 2 ** (len(arch["block_out_channels"]) - 1)
        return cls(
            int(arch.get("latent_channels", kind.channels)),
            int(arch.get("temporal_compression_ratio", kind.temporal_factor)),
            int(arch.get("spatial_compression_ratio", spatial)),
            kind.frame_step,
        )

    @property
    def frame_step(self) -> int:
        """Clips have 1 + k * frame_step frames. Never below four: AutoencoderKLWan drops an
        incomplete chunk silently."""
        return math.lcm(self.at_once, self.temporal_factor)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip's latents. Raises UserError when the clip does not fit."""
        if num_frames < 1 or (num_frames - 1) % self.frame_step:
            raise UserError(
                f"a clip of {num_frames} frames does not fit the VAE; take 1 + k * "
                f"{self.frame_step} frames, "
                "for example "
                f"{1 + self.frame_step * max(1, round((num_frames - 1) / self.frame_step))}"
            )
        if height % self.spatial_factor or width % self.spatial_factor or min(height, width) < 1:
            raise UserError(
                f"a frame of {height}x{width} pixels does not fit the VAE; both must be multiples "
                f"of {self.spatial_factor}"
            )
        t = 1 + (num_frames - 1) // self.temporal_factor
        return self.channels, t, height // self.spatial_factor, width // self.spatial_factor


def factors(arch: dict[str, Any]) -> tuple[int, int]:
    """(temporal, spatial) compression that the layers make. AutoencoderKLWan folds patches of
    `patch_size` itself."""
    levels = len(arch.get("dim_mult", (1, 2, 4, 4))) - 1
    in_time = arch.get("temperal_downsample", (False, True, True))
    if len(in_time) != levels:
        raise ConfigError(
            f"vae.arch: temperal_downsample has {len(in_time)} entries; dim_mult has "
            f"{levels + 1}, so it needs {levels}"
        )
    patch = arch.get("patch_size") or 1
    channels = 3 * patch * patch
    if arch.get("in_channels", 3) != channels or arch.get("out_channels", 3) != channels:
        raise ConfigError(
            f"vae.arch: with patch_size={patch} both in_channels and out_channels must be "
            f"{channels}"
        )
    temporal = 2 ** sum(map(bool, in_time))
    if temporal > CHUNK:
        raise ConfigError(
            f"vae.arch: a temporal factor of {temporal} is more than AutoencoderKLWan can run; at "
            f"most {CHUNK}"
        )
    return temporal, patch * 2**levels

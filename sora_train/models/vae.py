"""The video VAE: diffusers' AutoencoderKLWan behind the few calls that training and sampling need.

Pixels are (B, 3, T, H, W) in [-1, 1]; latents are (B, C, t, h, w), standardised per channel with
the mean and standard deviation stored in the VAE's own config, so that nobody can forget to.

AutoencoderKLWan is causal: the first frame becomes a latent frame of its own, and the rest go
through in chunks of four."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sora_train.config.model import VaeConfig
from sora_train.errors import ConfigError, UserError
from sora_train.models.vae_geometry import Geometry, factors
from sora_train.models.vae_init import init_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHIPPED = "shipped:"


class VideoVAE(nn.Module):
    """A VAE of any size. Frozen unless `trainable`; random weights come from `seed` alone."""

    def __init__(self, arch: dict[str, Any], *, trainable: bool = False, seed: int = 0):
        """`arch`: arguments of AutoencoderKLWan. Raises ConfigError for arguments it cannot build
        or run."""
        super().__init__()
        self.autoencoder = _build(_complete(arch), seed)
        config = self.autoencoder.config
        self.channels: int = config.z_dim
        self.temporal_factor, self.spatial_factor = factors(dict(config))
        self.requires_grad_(trainable)
        self.train(trainable)

    @classmethod
    def from_config(cls, cfg: VaeConfig, *, trainable: bool = False, seed: int = 0) -> "VideoVAE":
        """The VAE that the config names: stored, shipped with the package, or random weights of
        `vae.arch`.

        Raises UserError when the folder is missing or is not a VAE.
        """
        if cfg.path:
            vae = cls.load(
                shipped_folder(cfg.path) if cfg.path.startswith(SHIPPED) else cfg.path,
                trainable=trainable,
            )
        else:
            vae = cls(cfg.arch, trainable=trainable, seed=seed)
        return vae.to(getattr(torch, cfg.dtype))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trainable: bool = False) -> "VideoVAE":
        """Read a folder in the diffusers layout; weights become float32 whatever they are stored
        in. Strict both ways."""
        folder = Path(path)
        for name in ("config.json", WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(
                    f"vae.path '{folder}' holds no {name}; give a folder in the diffusers layout "
                    f"(config.json and {WEIGHTS})"
                )
        try:
            config = json.loads((folder / "config.json").read_text())
            weights = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise UserError(
                f"vae.path '{folder}' cannot be read ({error}); copy the folder again"
            ) from error
        vae = cls(
            {key: value for key, value in config.items() if not key.startswith("_")},
            trainable=trainable,
        )
        try:
            vae.autoencoder.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise UserError(
                f"vae.path '{folder}': its weights are not those of its config.json: {error}"
            ) from error
        return vae

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and weights in the diffusers layout, each to a temporary name and then
        renamed.

        Storage in float16 halves the file; digest() of what is loaded again then differs from that
        of these weights.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: value.detach().to("cpu", dtype).contiguous()
            for name, value in self._state().items()
        }
        config = {"_class_name": "AutoencoderKLWan", **self._config()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            save_file(weights, Path(scratch) / WEIGHTS, metadata={"format": "pt"})
            (Path(scratch) / "config.json").write_text(
                json.dumps(config, indent=2, sort_keys=True) + "\n"
            )
            for name in (WEIGHTS, "config.json"):
                # mkdtemp and safetensors make private files; a model folder is to be shared.
                (Path(scratch) / name).chmod(0o644)
                os.replace(Path(scratch) / name, folder / name)

    def encode(self, pixels: Tensor) -> Tensor:
        """Standardised latents (B, C, t, h, w), float32: the mode of the posterior.

        Raises UserError when the number of frames or the size does not fit.
        """
        mean, _ = self._posterior(pixels)
        return self._standardise(mean.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1], float32, from standardised latents."""
        raw = self._restore(latents.float()).to(self.dtype)
        return self.autoencoder.decode(raw, return_dict=False)[0].float().clamp(-1, 1)

    def forward(
        self, pixels: Tensor, draw_noise: Callable[[tuple[int, ...]], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For training the VAE itself: (reconstruction, posterior mean, posterior log-variance).

        The reconstruction is not clamped: beyond [-1, 1] a clamp has no gradient, and a pixel there
        would never return.

        Args:
            draw_noise: from the latents' shape (C, t, h, w) to keyed standard normal values
                (B, C, t, h, w), with which the posterior is sampled; None takes its mode.
        """
        mean, log_variance = self._posterior(pixels)
        latents = mean
        if draw_noise is not None:
            latents = mean + (0.5 * log_variance).exp() * draw_noise(tuple(mean.shape[1:])).to(mean)
        # Clones, since a sharding hook on a view is lost when somebody writes into it.
        return self._decode_unclamped(latents).clone(), mean.clone(), log_variance.clone()

    @torch.no_grad()
    def measure_latent_stats(self, batches: Iterable[Tensor]) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each raw latent channel over all clips, summed in float64.

        Raises UserError when there is nothing to measure.
        """
        count, total, squares = (
            0,
            torch.zeros(self.channels).double(),
            torch.zeros(self.channels).double(),
        )
        for pixels in batches:
            raw = self._posterior(pixels)[0].double().cpu()
            count += raw.numel() // self.channels
            total += raw.sum(dim=(0, 2, 3, 4))
            squares += raw.square().sum(dim=(0, 2, 3, 4))
        if count == 0:
            raise UserError("no clips were given to measure the latents of; the source is empty")
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        return mean.tolist(), variance.sqrt().clamp_min(1e-6).tolist()

    def set_latent_stats(self, mean: list[float], std: list[float]) -> None:
        """Make `mean` and `std` the VAE's own: from now on its latents are standardised with
        them."""
        self.autoencoder.register_to_config(latents_mean=list(mean), latents_std=list(std))

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.channels, self.temporal_factor, self.spatial_factor)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip's latents. Raises UserError when the clip does not fit."""
        return self.geometry.latent_shape(num_frames, height, width)

    @property
    def frame_step(self) -> int:
        """Clips have 1 + k * frame_step frames."""
        return self.geometry.frame_step

    @property
    def dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    def digest(self) -> str:
        """SHA-256 over config (latent statistics included) and weights, 64 hex digits."""
        sha = hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode())
        for name, value in sorted(self._state().items()):
            sha.update(f"{name}{tuple(value.shape)}".encode())
            sha.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return sha.hexdigest()

    def _state(self) -> dict[str, Tensor]:
        return self.autoencoder.state_dict()

    def _config(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in dict(self.autoencoder.config).items()
            if not key.startswith("_")
        }

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the raw latents."""
        self.latent_shape(*pixels.shape[2:])
        posterior = self.autoencoder.encode(pixels.to(self.dtype), return_dict=False)[0]
        return posterior.mean, posterior.logvar

    def _decode_unclamped(self, raw: Tensor) -> Tensor:
        """AutoencoderKLWan._decode without its last line, the clamp."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        autoencoder = self.autoencoder
        autoencoder.clear_cache()
        hidden = autoencoder.post_quant_conv(raw)
        frames = []
        for i in range(raw.shape[2]):
            autoencoder._conv_idx = [0]
            first = {"first_chunk": True} if i == 0 else {}
            frames.append(
                autoencoder.decoder(
                    hidden[:, :, i : i + 1],
                    feat_cache=autoencoder._feat_map,
                    feat_idx=autoencoder._conv_idx,
                    **first,
                )
            )
        autoencoder.clear_cache()
        pixels = torch.cat(frames, dim=2)
        patch_size = autoencoder.config.patch_size
        return pixels if patch_size is None else unpatchify(pixels, patch_size)

    def _stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.autoencoder.config
        mean, std = (
            like.new_tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def _standardise(self, raw: Tensor) -> Tensor:
        mean, std = self._stats(raw)
        return (raw - mean) / std

    def _restore(self, latents: Tensor) -> Tensor:
        mean, std = self._stats(latents)
        return latents * std + mean


def read_geometry(cfg: VaeConfig) -> Geometry:
    """The geometry of the VAE that the config names, its weights left where they are.

    Raises UserError when the folder is missing or is not a VAE.
    """
    if not cfg.path:
        return Geometry.of(cfg.arch)
    folder = shipped_folder(cfg.path) if cfg.path.startswith(SHIPPED) else Path(cfg.path)
    try:
        return Geometry.of(json.loads((folder / "config.json").read_text()))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"vae.path '{folder}' has no readable config.json ({error}); give a folder in the "
            "diffusers layout"
        ) from error


def shipped_folder(path: str) -> Path:
    """The folder of a VAE inside the package, `shipped:NAME`. Raises UserError with the names there
    are."""
    name = path.removeprefix(SHIPPED)
    assets = Path(str(resources.files("sora_train") / "assets"))
    if not (assets / name / "config.json").is_file():
        names = sorted(p.parent.name for p in assets.glob("*/config.json"))
        raise UserError(
            f"vae.path is '{path}', but the package ships no such VAE; it ships {names or 'none'}"
        )
    return assets / name


def _complete(arch: dict[str, Any]) -> dict[str, Any]:
    """`arch` with what follows from it: latent statistics of the right length (none yet: 0 and 1)
    and both factors."""
    z_dim = arch.get("z_dim", 16)
    temporal, spatial = factors(arch)
    completed = {
        "scale_factor_temporal": temporal,
        "scale_factor_spatial": spatial,
        "z_dim": z_dim,
        **arch,
    }
    completed.setdefault("latents_mean", [0.0] * z_dim)
    completed.setdefault("latents_std", [1.0] * z_dim)
    if not len(completed["latents_mean"]) == len(completed["latents_std"]) == z_dim:
        raise ConfigError(
            f"vae.arch: latents_mean and latents_std need z_dim = {z_dim} values each"
        )
    if (completed["scale_factor_temporal"], completed["scale_factor_spatial"]) != (
        temporal,
        spatial,
    ):
        raise ConfigError(
            f"vae.arch: scale factors {completed['scale_factor_temporal']} (time) and "
            f"{completed['scale_factor_spatial']} "
            f"(space) contradict its layers, which compress by {temporal} and {spatial}; leave "
            "them out"
        )
    return completed


def _build(arch: dict[str, Any], seed: int) -> nn.Module:
    """The autoencoder with first weights that depend on `seed` alone; the process's generator is
    left as it was."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            autoencoder = AutoencoderKLWan(**arch)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"vae.arch is not accepted by diffusers' AutoencoderKLWan: {error}"
            ) from error
    init_autoencoder(autoencoder, seed)
    return autoencoder

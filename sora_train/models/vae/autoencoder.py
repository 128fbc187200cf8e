"""The video VAE: a class of diffusers behind the few calls that training and sampling need.

Pixels are (B, 3, T, H, W) in [-1, 1]; latents are (B, C, t, h, w), standardised with what the VAE's
own config says (a mean and a deviation per channel, or one factor), so that no caller can forget it.

AutoencoderKLWan, which is also the one that is trained, is causal: the first frame becomes a latent
frame of its own, and the rest go through in chunks of four. The other published ones are rows of
published.py."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sora_train.config.sections.model import VaeConfig
from sora_train.errors import ConfigError, UserError
from sora_train.models.finite_weights import require_finite
from sora_train.models.hub import weights_folder
from sora_train.models.vae.geometry import Geometry, factors
from sora_train.models.vae.init import init_autoencoder
from sora_train.models.vae.published import KINDS, WAN, find_class, kind_of
from sora_train.models.vae.stream import Pieces, decode_pieces, encode_raw, times

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHIPPED = "shipped:"


class VideoVAE(nn.Module):
    """A VAE of any size. Frozen unless `trainable`; random weights come from `seed` alone."""

    def __init__(
        self,
        arch: dict[str, Any],
        *,
        trainable: bool = False,
        seed: int = 0,
        class_name: str = WAN,
        tile: int = 0,
    ):
        """`arch`: arguments of the class of diffusers. Raises ConfigError for arguments it cannot
        build or run, and for another class than AutoencoderKLWan that is to be trained."""
        super().__init__()
        self.kind = KINDS[class_name]
        if trainable and class_name != WAN:
            raise ConfigError(
                f"vae.path holds an {class_name}, which is used as it is; task=vae trains {WAN} only"
            )
        self.autoencoder = (
            _build(_complete(arch), seed) if class_name == WAN else _build_other(class_name, arch)
        )
        self.geometry = Geometry.of(dict(self.autoencoder.config), class_name)
        self.channels: int = self.geometry.channels
        self.temporal_factor, self.spatial_factor = (
            self.geometry.temporal_factor,
            self.geometry.spatial_factor,
        )
        # Several processes put in its place one by which they decode a clip together.
        self.stream: Callable[[nn.Module, Tensor, int], Pieces] = decode_pieces
        self.tile = 0
        self.use_tiles(tile)
        self.requires_grad_(trainable)
        self.train(trainable)

    @classmethod
    def from_config(cls, cfg: VaeConfig, *, trainable: bool = False, seed: int = 0) -> "VideoVAE":
        """The VAE that the config names: stored, shipped with the package, or random weights of
        `vae.arch`.

        Raises UserError when the folder is missing or is not a VAE.
        """
        if cfg.path:
            vae = cls.load(stored_folder(cfg), trainable=trainable)
        else:
            vae = cls(cfg.arch, trainable=trainable, seed=seed)
        vae.use_tiles(cfg.tile)
        return vae.to(getattr(torch, cfg.dtype))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trainable: bool = False) -> "VideoVAE":
        """Read a folder in the diffusers layout; weights become float32 whatever they are stored
        in. Strict both ways.

        Raises UserError or ConfigError when a file is missing, the class or its normalisation is
        unknown, or weights and config do not fit."""
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
        require_finite(weights.items(), f"vae.path '{folder}'", "copy the folder again")
        kind = kind_of(config, f"vae.path '{folder}'")
        kind.check_normalisation(config, f"vae.path '{folder}'")
        vae = cls(
            {key: value for key, value in config.items() if not key.startswith("_")},
            trainable=trainable,
            class_name=kind.class_name,
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
        config = {"_class_name": self.kind.class_name, **self._config()}
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
        return self.standardise(self.encode_moments(pixels)[0])

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, t, h, w) of the posterior, float32, as the VAE gives them:
        `standardise` makes training's latents of the mean or of a draw.

        Raises UserError when the number of frames or the size does not fit.
        """
        mean, log_variance = self._posterior(pixels)
        return mean.float(), log_variance.float()

    def standardise(self, raw: Tensor) -> Tensor:
        """Training's latents from the VAE's own, as its row of published.py says: mean and
        deviation of each channel, or one shift and factor."""
        config = self.autoencoder.config
        if self.kind.normalisation == "scale":
            return (raw - (config.get("shift_factor") or 0.0)) * config.scaling_factor
        mean, std = self._stats(raw)
        return (raw - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1], float32, from standardised latents."""
        frames = 1 + (latents.shape[2] - 1) * self.temporal_factor
        height, width = (size * self.spatial_factor for size in latents.shape[-2:])
        pixels = latents.new_empty((len(latents), 3, frames, height, width), dtype=torch.float32)
        for at, part in self.decode_pieces(latents):
            pixels[at] = part
        return pixels

    def decode_pieces(self, latents: Tensor) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        """(where in (B, 3, T, H, W), its pixels in [-1, 1], float32) until every pixel has come
        once: what is held at a time does not grow with the clip.

        AutoencoderKLWan gives a latent frame's frames at a time, or with `vae.tile` those of one
        tile; other classes give the whole clip.
        """
        raw = self._restore(latents.float()).to(self.dtype)
        if self.kind.class_name != WAN:
            yield (...,), self.autoencoder.decode(raw, return_dict=False)[0].float().clamp(-1, 1)
            return
        scale = self.spatial_factor
        for frames, tile, pixels in self.stream(self.autoencoder, raw, self.tile // scale):
            rows, columns = (times(part, scale) for part in tile.inner)
            yield (..., frames, rows, columns), pixels.float().clamp(-1, 1)

    def use_tiles(self, tile: int) -> None:
        """Encode and decode frames larger than `tile` pixels a side in tiles; 0 does not.

        Exact for AutoencoderKLWan (see stream.py); the other classes blend overlapping tiles
        their own way, a quarter of each shared.

        Raises ConfigError for a size that the latents do not have.
        """
        if tile % self.spatial_factor or tile < 0:
            raise ConfigError(
                f"vae.tile={tile} is no multiple of the VAE's spatial factor, {self.spatial_factor}"
            )
        self.tile = tile
        stride = max(tile * 3 // 4 // self.spatial_factor, 1) * self.spatial_factor
        if tile and self.kind.class_name == "AutoencoderKLHunyuanVideo":
            self.autoencoder.enable_tiling(
                tile_sample_min_height=tile,
                tile_sample_min_width=tile,
                tile_sample_stride_height=stride,
                tile_sample_stride_width=stride,
            )
        elif tile and self.kind.class_name != WAN:
            self.autoencoder.enable_tiling(
                tile_sample_min_height=tile,
                tile_sample_min_width=tile,
                tile_overlap_factor_height=0.25,
                tile_overlap_factor_width=0.25,
            )
        elif self.kind.class_name != WAN:
            self.autoencoder.disable_tiling()

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
        reconstruction = self._decode_unclamped(latents)
        if torch.is_grad_enabled():
            # An image passes no convolution over time, and sharded engines need gradients of the same weights on all
            # ranks: there these are 0.
            over_time = [p for name, p in self.named_parameters() if ".time_conv." in name]
            reconstruction = reconstruction + 0.0 * sum(p.sum() for p in over_time)
        # Clones, since a sharding hook on a view is lost when somebody writes into it.
        return reconstruction.clone(), mean.clone(), log_variance.clone()

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

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip's latents. Raises UserError when the clip does not fit."""
        return self.geometry.latent_shape(num_frames, height, width)

    @property
    def frame_step(self) -> int:
        """Clips have 1 + k * frame_step frames."""
        return self.geometry.frame_step

    @property
    def causal(self) -> bool:
        """Whether the latents of a clip's first frames are those of these frames alone."""
        return self.kind.causal

    @property
    def dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    def digest(self) -> str:
        """SHA-256 over config (latent statistics included) and weights, 64 hex digits."""
        sha = hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode())
        if self.kind.class_name != WAN:
            sha.update(self.kind.class_name.encode())
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
        if self.kind.class_name == WAN:
            raw = encode_raw(self.autoencoder, pixels, self.tile // self.spatial_factor)
            mean, log_variance = raw.chunk(2, dim=1)
            # Bounds of diffusers' DiagonalGaussianDistribution.
            return mean, log_variance.clamp(-30.0, 20.0)
        weight = next(self.autoencoder.parameters())
        posterior = self.autoencoder.encode(pixels.to(weight), return_dict=False)[0]
        return posterior.mean, posterior.logvar

    def _decode_unclamped(self, raw: Tensor) -> Tensor:
        """AutoencoderKLWan._decode without its last line, the clamp."""
        return torch.cat([pixels for _, _, pixels in decode_pieces(self.autoencoder, raw)], dim=2)

    def _restore(self, latents: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        config = self.autoencoder.config
        if self.kind.normalisation == "scale":
            return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        mean, std = self._stats(latents)
        return latents * std + mean

    def _stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.autoencoder.config
        mean, std = (
            like.new_tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std


def read_geometry(cfg: VaeConfig) -> Geometry:
    """The geometry of the VAE that the config names, its weights left where they are.

    Raises UserError when the folder is missing or is not a VAE.
    """
    if not cfg.path:
        return Geometry.of(cfg.arch)
    folder = stored_folder(cfg)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"vae.path '{folder}' has no readable config.json ({error}); give a folder in the "
            "diffusers layout"
        ) from error
    return Geometry.of(config, kind_of(config, f"vae.path '{folder}'").class_name)


def stored_folder(cfg: VaeConfig) -> Path:
    """The folder that `vae.path` means. Raises UserError when there is none."""
    if cfg.path.startswith(SHIPPED):
        return shipped_folder(cfg.path)
    return weights_folder("vae.path", cfg.path, "vae")


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
    autoencoder_class = find_class(WAN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            autoencoder = autoencoder_class(**arch)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"vae.arch is not accepted by diffusers' AutoencoderKLWan: {error}"
            ) from error
    init_autoencoder(autoencoder, seed)
    return autoencoder


def _build_other(class_name: str, arch: dict[str, Any]) -> nn.Module:
    """An autoencoder of another class, to be filled from its file."""
    autoencoder_class = find_class(class_name)
    with torch.random.fork_rng(devices=[]):
        try:
            built: nn.Module = autoencoder_class(**arch)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"vae.path: its config.json is not accepted by diffusers' {class_name}: {error}"
            ) from error
    return built

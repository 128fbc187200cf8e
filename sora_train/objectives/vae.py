"""The VAE's objective: reconstruction of pixels, perceptual and adversarial terms, and a KL divergence."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.config import Config, VaeObjectiveConfig
from sora_train.data.sample import Clip, ClipBatch
from sora_train.diffusion.draws import draw_noise
from sora_train.evaluation.quality import psnr, ssim
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.lpips import Lpips
from sora_train.objectives.adversary import Adversary
from sora_train.objectives.base import LossTerm, Objective
from sora_train.objectives.clips import placeholder, to_pixels
from sora_train.objectives.validation import same_shape_batches
from sora_train.runtime.control_plane import ControlPlane

EXPORT_FOLDER = "vae"
STATISTICS_CLIPS = 256
"""Clips over which the mean and the deviation of the latents are measured."""


class VaeObjective(Objective):
    """Reconstruction of pixels: errors of pixels and of their differences, of features (LPIPS), a discriminator's
    answer, and a KL divergence."""

    def __init__(self, cfg: Config, device: torch.device):
        """Raises UserError or ConfigError where a term that is asked for cannot be had."""
        self.seed = cfg.seed
        self.cfg: VaeObjectiveConfig = cfg.vae_objective
        self.vae_cfg = cfg.vae
        self.device = device
        self.lpips = Lpips.load(self.cfg.lpips_path).to(device) if self.cfg.lpips else None
        self.lpips_digest = self.lpips.digest() if self.lpips else ""
        self.adversary: Adversary | None = None
        if self.cfg.adversarial:
            cfg.vae_objective.require_start_before(cfg.train.steps)
            self.adversary = Adversary(cfg, device)

    def weights(self, batch: ClipBatch) -> dict[str, float]:
        names = [name for name in ("mse", "l1", "kl", "gradient", "lpips") if self.factor(name)]
        if self.adversary and self.adversary.acts:
            names.append("adversarial")
        return dict.fromkeys(names, batch.weight)

    @torch.no_grad()
    def validate(
        self,
        model: nn.Module,
        clips: list[Clip],
        control: ControlPlane,
        check_preemption: Callable[[], None] = lambda: None,
        *,
        live: bool = False,
    ) -> dict[str, float]:
        """`val/psnr` in dB, `val/ssim` and `val/loss` (mean absolute error) of the reconstructions; {} with `live`."""
        return {} if live else measure_reconstruction(model, clips, self.device, check_preemption)

    @torch.no_grad()
    def probe_loss(self, model: nn.Module, clips: list[Clip]) -> float:
        return measure_reconstruction(model, clips, self.device)["val/loss"]

    exports = True

    def export(self, weights: dict[str, Tensor], folder: Path, clips: Iterator[list[Clip]]) -> None:
        """Write `vae/` in the diffusers layout, with the mean and deviation of its latents measured.

        Stored in float16: half the size, and far finer than what the weights are known to.
        """
        vae = VideoVAE.from_config(self.vae_cfg)
        vae.load_state_dict(weights)
        vae.set_latent_stats(*vae.measure_latent_stats(statistics_pixels(clips)))
        vae.save(folder / EXPORT_FOLDER, dtype=torch.float16)

    def factor(self, name: str) -> float:
        """The weight of a term in the loss."""
        return float(getattr(self.cfg, name))

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, LossTerm]:
        clips = batch.clips or placeholder(batch)
        pixels = to_pixels(clips, self.device)
        keys = [(clip.epoch, clip.row) for clip in clips]
        reconstruction, mean, logvar = model(
            pixels, lambda shape: draw_noise(self.seed, "posterior", keys, shape)
        )
        adaptive = self.cfg.adversarial_adaptive and self.adversary and self.adversary.acts
        if adaptive:
            # Gradients are taken here on the way: of a tensor of its own, since the engine's hooks wait at the model's.
            reconstruction = reconstruction.clone()
        errors: dict[str, Tensor] = {
            "mse": mean_of_clips(reconstruction.sub(pixels).square()),
            "l1": mean_of_clips(reconstruction.sub(pixels).abs()),
            "gradient": difference_error(reconstruction, pixels),
            # KL(N(mean, exp(logvar)) || N(0, 1)) per latent value (Kingma & Welling 2014, arXiv:1312.6114, app. B).
            "kl": mean_of_clips(0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)),
        }
        if self.lpips:
            errors["lpips"] = self.lpips.clips(reconstruction, pixels)
        good = float(batch.weight > 0)
        if self.adversary:
            if not good:
                errors["adversarial"] = reconstruction.new_zeros(len(clips))
            elif self.adversary.trains:
                self.adversary.learn(pixels, reconstruction)
            if good and self.adversary.acts:
                seen = ("mse", "l1", "gradient", "lpips")
                parts = [self.factor(name) * errors[name] for name in seen if self.factor(name)]
                likeness = torch.stack(parts).sum(dim=0) if adaptive else None
                errors["adversarial"] = self.adversary.error(reconstruction, likeness)
        return {
            name: LossTerm(
                self.factor(name) * good * errors[name].sum(),
                batch.weight,
                self.factor(name) * errors[name].detach(),
            )
            for name in self.weights(batch)
        }

    def step(self) -> dict[str, float]:
        return self.adversary.step() if self.adversary else {}

    def skip(self) -> None:
        if self.adversary:
            self.adversary.skip()

    def tensors(self) -> dict[str, Tensor]:
        return self.adversary.tensors() if self.adversary else {}

    def facts(self) -> dict[str, Any]:
        return {"lpips_digest": self.lpips_digest} if self.lpips else {}


def mean_of_clips(error: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return error.flatten(1).mean(dim=1)


def difference_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours in time, height and width, (B,)."""
    axes = [axis for axis in (2, 3, 4) if a.shape[axis] > 1]
    errors = [mean_of_clips((a.diff(dim=axis) - b.diff(dim=axis)).abs()) for axis in axes]
    return torch.stack(errors).sum(dim=0)


def measure_reconstruction(
    model: nn.Module,
    clips: list[Clip],
    device: torch.device,
    check_preemption: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over clips of any shapes; every rank measures all of them."""
    ratio, similarity, error = 0.0, 0.0, 0.0
    for batch in same_shape_batches(clips):
        check_preemption()
        pixels = to_pixels(batch, device)
        reconstruction = model(pixels, None)[0].clamp(-1, 1)
        ratio += float(psnr(reconstruction, pixels).sum())
        similarity += float(ssim(reconstruction, pixels).sum())
        error += float(mean_of_clips((reconstruction - pixels).abs()).sum())
    return {
        "val/loss": error / len(clips),
        "val/psnr": ratio / len(clips),
        "val/ssim": similarity / len(clips),
    }


def statistics_pixels(clips: Iterator[list[Clip]]) -> Iterator[Tensor]:
    """Pixels of the first few hundred clips, on the CPU."""
    seen = 0
    for chunk in clips:
        if chunk:
            seen += len(chunk)
            yield to_pixels(chunk, torch.device("cpu"))
        if seen >= STATISTICS_CLIPS:
            return

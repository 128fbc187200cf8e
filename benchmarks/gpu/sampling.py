"""Two steps of sampling at 480p and 81 frames, and a VAE of Wan 2.1's size both ways; weights are random.

    python -m benchmarks.gpu.sampling --out benchmarks/results [--toy]

A step of sampling is two forward passes of the transformer, with the caption and without.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.memory import OPTIONS, built, first_weights
from benchmarks.model import ModelBenchRequest, batch_of, model_of
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.device.measuring import Measured, Result, Stats, measure
from sora_train.models.transformer.attention_backends import prepare_attention
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.runtime.world import grow_segments, pick_device

STEPS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="small sizes, on a CPU")
    options = parser.parse_args()
    grow_segments()
    device = pick_device("cpu" if options.toy else "cuda")
    result = Result("sampling", {}, {"steps": STEPS})
    with torch.no_grad():
        result.measured["sampling"] = sampled(options.toy, device)
        result.write(options.out)
        encoded_and_decoded(options.toy, device, result, options.out)
    print(result.to_markdown())
    return 0


def sampled(toy: bool, device: torch.device) -> Measured:
    """Seconds of `STEPS` steps, the first of which compiles and is not counted."""
    dtype = torch.float32 if toy else torch.bfloat16
    sizes = ["model.num_heads=2", "model.num_layers=1"] if toy else ["model=wan_1_3b"]
    cfg = model_of(sizes)
    request = ModelBenchRequest(cfg, tokens=64 if toy else 32_760, caption=16 if toy else 512)
    prepare_attention(cfg, device, dtype)
    model, _ = built(cfg, OPTIONS["nothing"], first_weights(cfg, dtype, device), device)
    batch = batch_of(request, dtype, device)

    def steps() -> None:
        for _ in range(2 * STEPS):
            model(batch.latents, batch.t, batch.captions)

    return Measured(measure(steps, 1, 1), "s")


def encoded_and_decoded(toy: bool, device: torch.device, result: Result, out: Path) -> None:
    """Frames a second of the VAE both ways, at 480p and 81 frames."""
    name, frames, size = ("tiny_random", 9, (48, 64)) if toy else ("wan_2_1", 81, (480, 832))
    cfg: Config = compose([f"vae={name}", f"vae.dtype={'float32' if toy else 'bfloat16'}"]).config
    vae = VideoVAE.from_config(cfg.vae).to(device)
    pixels = torch.rand(1, 3, frames, *size, device=device) * 2 - 1
    latents = vae.encode(pixels)

    def speed(seconds: Stats) -> Measured:
        slow, fast = frames / seconds.p90, frames / seconds.p10
        return Measured(Stats(frames / seconds.median, slow, fast, seconds.n), "frames/s")

    result.measured["encode"] = speed(measure(lambda: vae.encode(pixels), 0, 2))
    result.write(out)
    result.measured["decode"] = speed(measure(lambda: vae.decode(latents), 1, 1))
    result.write(out)


if __name__ == "__main__":
    raise SystemExit(main())

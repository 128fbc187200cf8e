"""Training steps on stored latents and captions, so that nothing is decoded or encoded: `sora bench train` on shards of
random numbers that are written first.

    python -m benchmarks.gpu.stored_training --out OUT --frames 81,33,1 --steps 8 [--clips N] [OVERRIDES]

The digests in the shards are those of the config's VAE and frozen text encoder, whose weights are random. All clips
have one size; a step has a micro-batch of each number of frames.
"""

import argparse
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.train import run
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.latents.members import LATENTS, TEXT, pack_latents, pack_text
from sora_train.data.sample import Bucket
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE

CAPTION = 128
"""Tokens of a caption."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", default="81", help="of the clips, parted by commas")
    parser.add_argument("--clips", type=int, default=16, help="of each number of frames")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 832), help="height, width")
    parser.add_argument("--steps", type=int, default=8)
    options, overrides = parser.parse_known_args()
    frames = [int(word) for word in options.frames.split(",")]
    height, width = options.size
    words = [
        *overrides, "data.val_clips=0", "data.micro_batch=1", "buckets.fps=16",
        f"train.micro_batches={len(frames)}",
        f"buckets.classes=[{{name: one, pixels: {height * width}, frames: {frames}, "
        f"aspect_ratios: ['{width}:{height}']}}]",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sora_stored_") as folder:
        words.append(f"data.source={folder}")
        write_shards(
            Path(folder), words, [Bucket(each, height, width) for each in frames], options.clips
        )
        path = run(words, steps=options.steps, warmup=2, out=options.out)
    print(path.with_suffix(".md").read_text())
    return 0


def write_shards(folder: Path, overrides: list[str], buckets: list[Bucket], clips: int) -> None:
    """A shard of `clips` clips for each bucket, with their latents and the embeddings of their captions."""
    cfg: Config = compose(overrides).config
    vae = VideoVAE.from_config(cfg.vae)
    small = cfg.model.model_copy(update={"num_layers": 1})
    text, digest = TextToVideo(small, cfg.text, seed=cfg.seed).text_digest(), vae.digest()
    draws = np.random.default_rng(0)
    for bucket in buckets:
        shape = vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        with tarfile.open(folder / f"{bucket.name}.tar", "w") as shard:
            for number in range(clips):
                key = f"{bucket.name}_{number:04d}"
                caption = key.ljust(CAPTION - 1, "x")
                latents = draws.standard_normal(shape, np.float32)
                embedding = draws.standard_normal((CAPTION, cfg.text.d_model), np.float32)
                members = {
                    "txt": caption.encode(),
                    LATENTS: pack_latents(
                        latents, vae_digest=digest, fps=16.0 if bucket.frames > 1 else 0.0,
                        pixels=bucket, caption=caption,
                    ),
                    TEXT: pack_text(embedding, encoder_digest=text, caption=caption, dtype="bfloat16"),
                }  # fmt: skip
                for extension, data in members.items():
                    about = tarfile.TarInfo(f"{key}.{extension}")
                    about.size = len(data)
                    shard.addfile(about, io.BytesIO(data))


if __name__ == "__main__":
    raise SystemExit(main())

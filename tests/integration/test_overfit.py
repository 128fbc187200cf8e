"""Overfit one real clip, sample it from the checkpoint in a new process, and get it back.

Any mismatch between training and sampling (sign, schedule, latent normalisation) makes this fail;
docs/log.md tells what each looked like when it was broken on purpose.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from sora_train.config.compose import compose
from sora_train.data.decode.video_io import encode_h264
from sora_train.models.vae.pixels import to_uint8
from sora_train.objectives import to_pixels
from sora_train.training.trainer import Trainer

CAPTION = "a hiker on a summit at sunrise"
OVERRIDES = [
    "experiment=real_tiny",
    "buckets=shapes",
    "model.num_layers=3",
    "text=bytes_micro",
    "model.text_dim=64",
    "objective.caption_dropout=0",
    "optim.lr=2e-3",
    "optim.decay=linear",
    "ema.decay=0.98",
    "objective.time_law=uniform",
    "objective.shift=3",
    "data.micro_batch=16",
    "train.steps=250",
    "checkpoint.every=0",
    "validation.every=0",
    "sample.every=0",
]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def read_clip(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def copy_clip(clip: Path, folder: Path, *, copies: int) -> None:
    """The middle square of the clip's first nine frames, as files that leave no choice of window or crop.

    Sixteen rows of one clip are sixteen draws of noise and noise level in a micro-batch.
    """
    frames = read_clip(clip)[:9]
    height, width = frames.shape[1:3]
    left = (width - height) // 2
    folder.mkdir()
    encode_h264(
        np.ascontiguousarray(frames[:, :, left : left + height]), 8.0, folder / "00.mp4", crf=12
    )
    for i in range(copies):
        if i:
            shutil.copy(folder / "00.mp4", folder / f"{i:02d}.mp4")
        (folder / f"{i:02d}.txt").write_text(CAPTION)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_clip_comes_back(real_videos: Path, tmp_path: Path) -> None:
    source, run = tmp_path / "clips", tmp_path / "run"
    copy_clip(real_videos / "hiker.mp4", source, copies=16)
    cfg = compose([*OVERRIDES, f"data.source={source}", f"run.dir={run}"]).config
    Trainer(cfg).train()

    trainer = Trainer(cfg)
    clips, failures = trainer.data.loader.decode_rows([0])
    vae = trainer.vae
    reconstruction = to_uint8(vae.decode(vae.encode(to_pixels(clips, trainer.world.device)))[0])
    trainer.close()
    original = clips[0].pixels
    assert original is not None and not failures
    frames, height, width = original.shape[:3]

    command = [
        sys.executable,
        "-m",
        "sora_train",
        "sample",
        "--ckpt",
        str(run),
        "--prompt",
        CAPTION,
    ]
    options = [
        "--size",
        f"{width}x{height}",
        "--frames",
        str(frames),
        "--guidance-scale",
        "1",
        "--steps",
        "40",
    ]
    subprocess.run([*command, *options, "--out", str(tmp_path / "out")], check=True, timeout=300)
    sample = read_clip(next((tmp_path / "out").glob("*.mp4")))

    ceiling, reached = psnr(reconstruction, original), psnr(sample, original)
    assert reached >= ceiling - 1.0, (
        f"the sample has {reached:.2f} dB, the VAE's reconstruction {ceiling:.2f} dB"
    )

"""PSNR and SSIM against what their definitions say, and the benchmark of a VAE that prints them."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.vae import run
from sora_train.errors import UserError
from sora_train.evaluation.quality import psnr, ssim


def window_ssim(a: np.ndarray, b: np.ndarray, size: int) -> float:
    """One frame of one colour, window by window, as the paper writes it down."""
    at = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(at**2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for top in range(a.shape[0] - size + 1):
        for left in range(a.shape[1] - size + 1):
            x, y = (one[top : top + size, left : left + size] for one in (a, b))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            values.append(
                (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            )
    return float(np.mean(values))


@pytest.mark.parametrize(("height", "width", "size"), [(14, 17, 11), (8, 6, 6)])
def test_similarity_is_the_papers(height, width, size):
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (2, 3, 2, height, width))
    b = np.clip(a + rng.normal(0, 0.3, a.shape), -1, 1)
    got = ssim(torch.tensor(a), torch.tensor(b))
    for clip in range(2):
        expected = np.mean(
            [window_ssim(a[clip, c, t], b[clip, c, t], size) for c in range(3) for t in range(2)]
        )
        assert float(got[clip]) == pytest.approx(expected, rel=1e-9)
    assert ssim(torch.tensor(a), torch.tensor(a)).tolist() == pytest.approx([1.0, 1.0])


def test_ratio_is_of_the_whole_range():
    a = torch.zeros(2, 3, 1, 4, 4)
    b = a.clone()
    b[0] += 0.2
    b[1] += 2.0
    expected = [20 * math.log10(2 / 0.2), 0.0]
    assert psnr(a, b).tolist() == pytest.approx(expected, abs=1e-4)
    assert psnr(a, a).tolist() == [100.0, 100.0]


def likeness(out: Path, overrides: list[str]) -> dict:
    path = run([*overrides, "run.threads=1", f"run.dir={out / 'run'}"], clips=3, out=out)
    result = json.loads(path.read_text())
    facts, found = result["facts"], result["measured"]
    print(
        f"{facts['source'] or 'the shapes world'}: {found['PSNR']['median']:.2f} dB, "
        f"SSIM {found['SSIM']['median']:.3f} at 1 : {facts['compression, values of a clip a value of its latents']:.1f}"
    )
    return result


def test_the_shipped_vae_on_the_shapes_world(tmp_path):
    """The VAE that ships was trained on these: a lost frame or a wrong weight shows at once."""
    overrides = ["experiment=quickstart", "data.shapes_clips=8", "data.shapes_val_clips=3"]
    result = likeness(tmp_path, overrides)
    assert result["measured"]["PSNR"]["median"] > 25
    assert result["measured"]["SSIM"]["median"] > 0.75
    ratio = result["facts"]["compression, values of a clip a value of its latents"]
    assert 12 < ratio <= 3 * 4 * 8 * 8 / 16


def test_the_shipped_vae_on_real_clips(tmp_path):
    videos = os.environ.get("SORA_TEST_VIDEOS")
    if not videos:
        pytest.skip("SORA_TEST_VIDEOS names no folder of real clips")
    overrides = ["experiment=real_tiny", f"data.source={videos}", f"data.val_source={videos}"]
    overrides.append("data.max_drop_fraction=1")
    result = likeness(tmp_path, overrides)
    assert result["measured"]["PSNR"]["median"] > 10


def test_no_clip_is_refused(tmp_path):
    with pytest.raises(UserError, match="--clips 0"):
        run([], clips=0, out=tmp_path)

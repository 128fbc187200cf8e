"""Recipes that go on from open weights train what the weights' own code and cards say they are for."""

import json
from pathlib import Path

import pytest

from sora_train.config.compose import compose
from sora_train.data.sample import Bucket
from sora_train.data.tape.buckets import build_buckets
from sora_train.sampling.pipeline import ClipShape
from sora_train.tools.convert.from_diffusers import usual_clip

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "experiment"
CARDS = {
    # sample_fps, frame_num, sample_shift (480p 3, 720p 5): Wan2.1/wan/configs, generate.py.
    "wan_1_3b_finetune": {"fps": 16, "frames": 81, "shift": 3.0, "layers": 30, "dim": 1536},
    "wan_14b_finetune": {"fps": 16, "frames": 81, "shift": 5.0, "layers": 40, "dim": 5120},
    # Wan2.2/wan/configs/wan_ti2v_5B.py.
    "wan_5b_finetune": {"fps": 24, "frames": 121, "shift": 5.0, "layers": 30, "dim": 3072},
}


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_trains_what_its_weights_are_for(name: str):
    card, cfg = CARDS[name], compose([f"experiment={name}", "data.source=clips"]).config
    assert cfg.buckets.fps == card["fps"]
    assert max(frames for one in cfg.buckets.classes for frames in one.frames) == card["frames"]
    assert cfg.objective.shift == card["shift"]
    assert (cfg.model.num_layers, cfg.model.dim) == (card["layers"], card["dim"])
    assert cfg.text.max_length == 512
    assert dict(cfg.objective.mix)["t2v"] > 0


def test_wan_2_2_ti2v_makes_videos_from_text_and_images_in_its_own_size():
    """wan_ti2v_5B.py: vae_stride (4, 16, 16), patch (1, 2, 2), ffn 14336, 24 heads, 48 channels, 50 steps, guidance 5;
    SUPPORTED_SIZES 704*1280 and 1280*704. The tokens of the image are told noise level 0, no mask is given."""
    cfg = compose(["experiment=wan_5b_finetune", "data.source=clips"]).config
    table = build_buckets(cfg.buckets, temporal_factor=4, spatial_multiple=32)
    made = {spec.bucket for spec in table}
    assert {Bucket(121, 704, 1280), Bucket(121, 1280, 704), Bucket(1, 704, 1280)} <= made
    assert {Bucket(*map(int, key.split("x"))) for key in cfg.data.micro_batch_table} == made
    assert dict(cfg.objective.mix)["i2v"] > 0 and cfg.objective.cond_mode == "replace"
    assert not cfg.model.mask_channel and not cfg.model.fps_embed
    assert (cfg.objective.guidance_scale, cfg.objective.num_steps) == (5.0, 50)
    sizes = (cfg.model.ffn_dim, cfg.model.num_heads, cfg.model.in_channels)
    assert sizes == (14336, 24, 48)
    # The run that it goes on from is imported without extras.
    lines = (CONFIGS / "wan_5b_finetune.yaml").read_text().splitlines()
    (command,) = [line for line in lines if "sora ckpt import" in line]
    assert command.split()[1:] == [
        "sora",
        "ckpt",
        "import",
        "Wan2.2-TI2V-5B-Diffusers",
        "--out",
        "runs/wan_2_2_5b",
    ]


@pytest.mark.parametrize(
    ("index", "clip"),
    [
        ({"expand_timesteps": True}, ClipShape(121, 704, 1280, 24.0)),
        ({"expand_timesteps": False}, ClipShape(81, 480, 832, 16.0)),
        ({}, ClipShape(81, 480, 832, 16.0)),
    ],
)
def test_an_import_has_the_clip_of_its_pipeline(index: dict, clip: ClipShape, tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    assert usual_clip(tmp_path, None) == clip

"""Every member of Wan's family comes in, samples as diffusers' own pipeline does, trains, and goes out again bit for
bit. Forward and gradients in float64 are those of test_wan_parity.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file
from sentences import refuses
from wan_pipelines import IMAGE, pipeline

from sora_train.config.compose import compose
from sora_train.diffusion.draws import draw_noise
from sora_train.errors import ConfigError, UserError
from sora_train.models.image_encoder import GREY, ImageEncoder, pictures_of
from sora_train.sampling.api import Model, load
from sora_train.sampling.pipeline import (
    ClipShape,
    ConditionFrames,
    encode_conditions,
    sample_latents,
)
from sora_train.tools.convert.from_diffusers import import_pipeline, usual_clip
from sora_train.tools.convert.to_diffusers import export_pipeline
from sora_train.training.trainer import Trainer

SHAPE = ClipShape(9, 32, 48, 16.0)
PROMPT = "a red circle moves left"
MEMBERS: dict[str, dict[str, Any]] = {
    "2.1 i2v": IMAGE,
    "2.1 flf2v": {**IMAGE, "pos_embed_seq_len": 10},
}
STEPS, GUIDANCE = 5, 3.0


@pytest.fixture(scope="module", params=list(MEMBERS))
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pipeline`, `run` (its import) and `again` (the export of that)."""
    folder = tmp_path_factory.mktemp("member")
    pipeline(folder / "pipeline", MEMBERS[request.param])
    import_pipeline(folder / "pipeline", folder / "run", SHAPE)
    export_pipeline(folder / "run", folder / "again")
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_what_comes_in_goes_out_bit_for_bit(member: Path):
    for part in ("transformer", "vae", "text_encoder", "image_encoder"):
        first, again = (weights_of(member / name / part) for name in ("pipeline", "again"))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first), part
    configs = [
        json.loads((member / name / "transformer/config.json").read_text())
        for name in ("pipeline", "again")
    ]
    for key in configs[1].keys() - {"_diffusers_version"}:
        assert configs[0][key] == configs[1][key], key
    indices = [
        json.loads((member / name / "model_index.json").read_text())
        for name in ("pipeline", "again")
    ]
    assert indices[0]["_class_name"] == indices[1]["_class_name"]
    assert indices[0]["image_encoder"] == indices[1]["image_encoder"]


def frames(pair: bool) -> np.ndarray:
    """Pixels (F, H, W, 3) of which the first is given, and with `pair` the last."""
    found = np.zeros((SHAPE.frames, SHAPE.height, SHAPE.width, 3), np.uint8)
    given = np.random.default_rng(0).integers(0, 256, (2, *found.shape[1:]), np.uint8)
    found[0] = given[0]
    if pair:
        found[-1] = given[1]
    return found


def ours(model: Model, noise: torch.Tensor, **changes: Any) -> torch.Tensor:
    """Latents of the sampler, from frames given as training gives them."""
    pair = model.cfg.model.image_pair
    mask_T = torch.tensor([1.0, 0.0, 1.0 if pair else 0.0])
    kind = "i2v_both" if pair else "i2v"
    conditions = encode_conditions(
        ConditionFrames(frames(pair), kind, mask_T), model.vae, model.spec
    )
    spec = model.spec.replace(**{"num_steps": STEPS, "guidance_scale": GUIDANCE, **changes})
    return sample_latents(model.model, spec, [PROMPT], noise, SHAPE.fps, conditions=conditions)


def theirs(folder: Path, model: Model, noise: torch.Tensor, **options: Any) -> torch.Tensor:
    """Latents of diffusers' pipeline."""
    pair = model.cfg.model.image_pair
    wan = WanImageToVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    wan.set_progress_bar_config(disable=True)
    given = [Image.fromarray(frames(pair)[end]) for end in (0, -1)]
    # Its own reading of prompts needs ftfy.
    told = model.model.frozen_encoder.encode([PROMPT, ""])[0]
    return wan(
        image=given[0], last_image=given[1] if pair else None, prompt_embeds=told[:1],
        negative_prompt_embeds=told[1:], height=SHAPE.height, width=SHAPE.width, num_frames=SHAPE.frames,
        latents=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent", **options,
    ).frames  # fmt: skip


def noise_of(model: Model) -> torch.Tensor:
    shape = model.vae.latent_shape(SHAPE.frames, SHAPE.height, SHAPE.width)
    return draw_noise(5, "sample", [(0, 0)], shape)


def test_the_pipeline_samples_the_same_video(member: Path):
    """That of the first folder and that of the exported one."""
    model = load(member / "run")
    noise = noise_of(model)
    mine = ours(model, noise)
    assert mine.std() > 0.1
    for folder in ("pipeline", "again"):
        torch.testing.assert_close(mine, theirs(member / folder, model, noise), atol=1e-4, rtol=0)


def test_what_is_shown_of_the_images_matters(member: Path):
    """Or the comparison would hold without them: embeddings of other pictures give another video."""
    model = load(member / "run")
    noise = noise_of(model)
    before = ours(model, noise)
    encoder = model.model.image_encoder()
    assert encoder is not None
    with torch.no_grad():
        weight = next(encoder.model.parameters())
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert (ours(model, noise) - before).abs().max() > 1e-3


def tuning(run: Path, to: Path, *more: str) -> list[str]:
    """Arguments of a run of two steps that begins with an imported one: its sections as they are, tiny clips."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    sections = ("model", "vae", "text", "image", "objective")
    own = [
        f"{section}.{key}={json.dumps(value)}"
        for section in sections
        for key, value in values[section].items()
        if not isinstance(value, dict) and (section, key) != ("vae", "arch")
    ]
    shares = values["objective"]["conditioning"].items()
    own += [f"objective.conditioning.{key}={value}" for key, value in shares]
    return [
        "experiment=parity_tiny", "vae=tiny", "data.shapes_clips=8", "data.shapes_val_clips=2", "train.steps=2",
        "checkpoint.every=0", "validation.every=2", "data.shapes_image_share=0", *own, f"init.run={run}",
        "optim.lr=1e-3", "optim.warmup_steps=0", f"run.dir={to}", *more,
    ]  # fmt: skip


def test_it_trains_on_from_the_imported_weights(member: Path, tmp_path: Path):
    """Every weight of the transformer learns, and sampling and export are those of the trained weights."""
    Trainer(compose(tuning(member / "run", tmp_path / "run")).config).train()
    before = load(member / "run").model.transformer.state_dict()
    after = load(tmp_path / "run", weights="live")
    for name, value in after.model.transformer.state_dict().items():
        assert not torch.equal(value, before[name]), name
    noise = noise_of(after)
    export_pipeline(tmp_path / "run", tmp_path / "out", weights="live")
    torch.testing.assert_close(
        ours(after, noise), theirs(tmp_path / "out", after, noise), atol=1e-4, rtol=0
    )


def test_pictures_are_grey_where_nothing_is_known():
    clip = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    known = np.array([1.0, 0, 0, 0, 0])
    first, last = pictures_of(clip, known, 2)
    assert (first == clip[0]).all() and (last == GREY).all()
    assert len(pictures_of(clip, known, 1)) == 1


def test_the_usual_clip_of_an_image_to_video_model_follows_its_shift(tmp_path: Path):
    folder = pipeline(tmp_path / "p", IMAGE)
    assert usual_clip(folder, None).height == 480
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flow_shift": 5.0}))
    assert usual_clip(folder, None).height == 720


def changed(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "facts"),
    [
        ("transformer/config.json", {"added_kv_proj_dim": 20}, ("added_kv_proj_dim=20", "24")),
        ("transformer/config.json", {"pos_embed_seq_len": 7}, ("pos_embed_seq_len=7", "two")),
        ("image_encoder/config.json", {"model_type": "siglip"}, ("siglip", "clip_vision_model")),
        ("image_encoder/config.json", {"hidden_size": 10}, ("width 10", "model.image_dim=20")),
    ],
)  # fmt: skip
def test_image_parts_that_do_not_fit_are_told(
    tmp_path: Path, file: str, values: dict[str, Any], facts: tuple[str, ...]
):
    folder = pipeline(tmp_path / "p", IMAGE)
    changed(folder, file, **values)
    with refuses((UserError, ConfigError), *facts):
        import_pipeline(folder, tmp_path / "run", SHAPE)
    assert not (tmp_path / "run").exists()


def test_an_image_encoder_stored_as_a_pickle_is_refused(tmp_path: Path):
    folder = pipeline(tmp_path / "p", IMAGE)
    file = next((folder / "image_encoder").glob("*.safetensors"))
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    with refuses(UserError, "image.path", "safetensors", "save_pretrained"):
        import_pipeline(folder, tmp_path / "run", SHAPE)


def test_a_transformer_stored_as_a_pickle_is_refused(tmp_path: Path):
    folder = pipeline(tmp_path / "p", IMAGE)
    file = next((folder / "transformer").glob("*.safetensors"))
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with refuses(UserError, "transformer", "pickle", "safetensors"):
        import_pipeline(folder, tmp_path / "run", SHAPE)


def test_a_missing_image_encoder_is_told(tmp_path: Path):
    folder = pipeline(tmp_path / "p", IMAGE)
    shutil.rmtree(folder / "image_encoder")
    with refuses(UserError, "image_encoder", "config.json"):
        import_pipeline(folder, tmp_path / "run", SHAPE)


def test_one_picture_is_embedded_whatever_stands_beside_it(member: Path):
    model = load(member / "run")
    encoder = model.model.image_encoder()
    assert isinstance(encoder, ImageEncoder)
    pictures = np.random.default_rng(1).integers(0, 256, (3, 1, 20, 30, 3), np.uint8)
    together = encoder.embed(pictures)
    assert together.shape == (3, 5, 20) and together.dtype == torch.float32
    for row in range(3):
        assert torch.equal(encoder.embed(pictures[row : row + 1])[0], together[row])

"""Weights out to diffusers' layout and in again: bit for bit, strict, and the same video in both."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sentences import refuses, says

from sora_train import cli
from sora_train.checkpoint import find, save_streamed
from sora_train.checkpoint.meta import read_meta
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.diffusion.draws import draw_noise
from sora_train.errors import UserError, run_command
from sora_train.models.finite_weights import is_finite
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.sampling.api import Model, load
from sora_train.sampling.pipeline import (
    ClipShape,
    ConditionFrames,
    encode_conditions,
    sample_latents,
)
from sora_train.tools.convert import stored_weights
from sora_train.tools.convert import to_diffusers as weights_out
from sora_train.tools.convert.from_diffusers import import_pipeline
from sora_train.tools.convert.to_diffusers import export_pipeline, fps_offset
from sora_train.training.initialise import refuse_imported
from sora_train.training.trainer import Trainer

SHAPE = ClipShape(5, 32, 32, 8.0)
PROMPT = "a red circle moves left"
TINY = [
    "experiment=parity_tiny", "text.padding=wan", "data.shapes_clips=8", "data.shapes_val_clips=2",
    "validation.every=0", "sample.every=0", "train.steps=2", "objective.solver=euler",
    "objective.time_grid=flow_match_euler", "objective.num_steps=4", "objective.shift=3",
]  # fmt: skip


def trained(folder: Path, *more: str) -> Path:
    """A run of a few steps; its weights are stirred, so that nothing is at its first value of zero."""
    cfg: Config = compose([*TINY, f"run.dir={folder}", *more]).config

    class Stirred(Trainer):
        def build_model(self) -> torch.nn.Module:
            model = super().build_model()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            return model

    Stirred(cfg).train()
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    steps = ["optim=adamw", "optim.lr=2e-3", "train.steps=8"]
    return trained(tmp_path_factory.mktemp("source") / "run", *steps)


@pytest.fixture(scope="module")
def pipeline(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "pipeline"
    # Files of at most 100 kB, so that there are several.
    export_pipeline(source, out, fps=None, max_shard_bytes=100_000)
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_export_is_the_averaged_weights_in_files_of_the_size_asked_for(
    source: Path, pipeline: Path
):
    model = load(source).model.transformer.state_dict()
    written = weights_of(pipeline / "transformer")
    assert written.keys() == {name for name in model if name != "mask_proj.weight"}
    assert all(torch.equal(written[name], model[name]) for name in written)
    files = list((pipeline / "transformer").glob("*.safetensors"))
    assert len(files) > 2
    largest = max(value.numel() * 4 for value in written.values())
    assert all(file.stat().st_size < max(100_000, largest) + 20_000 for file in files)


def test_import_is_bit_for_bit_what_was_exported(source: Path, pipeline: Path, tmp_path: Path):
    said = import_pipeline(pipeline, tmp_path / "back", SHAPE)
    assert "missing 0, unexpected 0" in said
    before, after = load(source), load(tmp_path / "back")
    again = after.model.transformer.state_dict()
    first = before.model.transformer.state_dict()
    assert again.keys() == {name for name in first if name != "mask_proj.weight"}
    assert all(torch.equal(again[name], first[name]) for name in again)
    assert after.spec.shift == 3.0 and after.spec.vae_digest == before.spec.vae_digest
    export_pipeline(tmp_path / "back", tmp_path / "twice")
    twice = weights_of(tmp_path / "twice" / "transformer")
    assert all(torch.equal(twice[name], again[name]) for name in again)


def test_one_file_is_open_at_a_time(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now, opened = set(), []
    real = stored_weights.safe_open

    class Counted:
        def __init__(self, path: Path, **options: str):
            self.path, self.real = path, real(path, **options)

        def __enter__(self) -> "Counted":
            now.add(self.path)
            opened.append(len(now))
            self.real.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            now.remove(self.path)
            self.real.__exit__(*error)

        def __getattr__(self, name: str):
            return getattr(self.real, name)

    monkeypatch.setattr(stored_weights, "safe_open", Counted)
    import_pipeline(pipeline, tmp_path / "run", SHAPE)
    files = len(list((pipeline / "transformer").glob("*.safetensors")))
    # Once each for the shapes, the search for what is no number, the live weights and the averaged ones.
    assert max(opened) == 1 and len(opened) == 4 * files and not now


def test_weights_in_half_precision_are_read_as_they_are(pipeline: Path, tmp_path: Path):
    shutil.copytree(pipeline, tmp_path / "p")
    for file in (tmp_path / "p/transformer").glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    import_pipeline(tmp_path / "p/transformer", tmp_path / "run", SHAPE)
    model = load(tmp_path / "run").model.transformer.state_dict()
    for name, value in weights_of(pipeline / "transformer").items():
        assert torch.equal(model[name], value.bfloat16().float())


def test_added_extras_change_nothing(pipeline: Path, tmp_path: Path):
    import_pipeline(pipeline, tmp_path / "run", SHAPE, mask_channel=True, fps_embed=True)
    model = load(tmp_path / "run").model.transformer
    assert not model.mask_proj.weight.any() and not model.fps_proj.weight.any()


def otherwise(run: Path, to: Path, **changes: object) -> Path:
    """A copy of the run whose newest checkpoint has another spec."""
    shutil.copytree(run, to)
    at = find(to).path
    state = json.loads((at / "state.json").read_text())
    state["spec"] |= changes
    (at / "state.json").write_text(json.dumps(state))
    files = json.loads((at / "MANIFEST.json").read_text())
    text = (at / "state.json").read_bytes()
    entry = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    files["files"]["state.json"] = entry
    (at / "MANIFEST.json").write_text(json.dumps(files))
    return to


UNIPC = {"solver": "unipc", "time_grid": "unipc", "time_rounding": "truncate"}
STEPS, GUIDANCE = 6, 3.0


@pytest.fixture(scope="module", params=["euler", "unipc"])
def both_sampled(
    request: pytest.FixtureRequest,
    source: Path,
    pipeline: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Model, torch.Tensor, torch.Tensor, np.ndarray]:
    """Our model, and one clip of it as diffusers' pipeline samples it: noise, latents, pixels in [0, 1]."""
    pytest.importorskip("accelerate")
    from diffusers import WanPipeline

    run, folder = source, pipeline
    if request.param == "unipc":
        made = tmp_path_factory.mktemp("unipc")
        run, folder = otherwise(source, made / "run", **UNIPC), made / "pipeline"
        assert "differs" not in export_pipeline(run, folder)
    ours = load(run)
    assert ours.spec.solver == request.param and ours.spec.shift == 3.0
    latent_shape = ours.vae.latent_shape(SHAPE.frames, SHAPE.height, SHAPE.width)
    noise = draw_noise(5, "sample", [(0, 0)], latent_shape)
    wan = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert ("UniPC" in type(wan.scheduler).__name__) == (request.param == "unipc")
    wan.set_progress_bar_config(disable=True)

    def theirs(output_type: str):
        return wan(
            prompt=PROMPT, negative_prompt="", height=SHAPE.height, width=SHAPE.width,
            num_frames=SHAPE.frames, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            latents=noise, output_type=output_type, max_sequence_length=ours.cfg.text.max_length,
        ).frames  # fmt: skip

    return ours, noise, theirs("latent"), theirs("np")[0]


def test_diffusers_samples_the_same_video(both_sampled):
    """Nothing rounded, float32: the latents differ by 2e-6 at most and the pixels by 1e-6, Euler and UniPC."""
    ours, noise, latents, pixels = both_sampled
    spec = ours.spec.replace(num_steps=STEPS, guidance_scale=GUIDANCE)
    mine = sample_latents(ours.model, spec, [PROMPT], noise, SHAPE.fps)
    decoded = ours.vae.decode(mine)[0].permute(1, 2, 3, 0).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(mine, latents, atol=1e-4, rtol=0)
    np.testing.assert_allclose(decoded.numpy(), pixels, atol=1e-4, rtol=0)
    # What would agree with anything: a picture without contrast, guidance or a solver without effect.
    assert pixels.std() > 0.01
    for change in ({"guidance_scale": 1.0}, {"time_grid": "even"}, {"shift": 1.0}):
        other = sample_latents(ours.model, spec.replace(**change), [PROMPT], noise, SHAPE.fps)
        assert (other - latents).abs().max() > 1e-2, change


def test_clips_are_that_video_in_whole_steps_of_colour(both_sampled):
    ours, _, _, pixels = both_sampled
    size = (SHAPE.width, SHAPE.height)
    mine = ours.sample(
        [PROMPT], size=size, frames=SHAPE.frames, fps=SHAPE.fps, steps=STEPS,
        guidance_scale=GUIDANCE, seed=5,
    )[0]  # fmt: skip
    assert np.abs(mine / 255 - pixels).max() <= 0.5 / 255 + 1e-4


def test_an_image_to_video_model_stays_one_in_diffusers(tmp_path: Path):
    """Wan 2.2's TI2V layout: `WanImageToVideoPipeline` on the export, and on the export of its import, is ours."""
    pytest.importorskip("accelerate")
    from diffusers import WanImageToVideoPipeline

    run = trained(tmp_path / "run", "model.mask_channel=false")
    says(export_pipeline(run, tmp_path / "out"), "expand_timesteps", "WanImageToVideoPipeline")
    import_pipeline(tmp_path / "out", tmp_path / "back", SHAPE)
    export_pipeline(tmp_path / "back", tmp_path / "twice")
    ours = load(run)
    image = np.random.default_rng(0).integers(0, 256, (SHAPE.height, SHAPE.width, 3), np.uint8)
    mask_T = torch.tensor([1.0, 0.0])
    pixels = np.repeat(image[None], SHAPE.frames, axis=0)
    conditions = encode_conditions(ConditionFrames(pixels, "i2v", mask_T), ours.vae, ours.spec)
    noise = draw_noise(5, "sample", [(0, 0)], ours.vae.latent_shape(5, 32, 32))
    spec = ours.spec.replace(num_steps=STEPS, guidance_scale=GUIDANCE)
    mine = sample_latents(ours.model, spec, [PROMPT], noise, 8.0, conditions=conditions)
    without = sample_latents(ours.model, spec, [PROMPT], noise, 8.0)
    assert (mine - without)[:, :, 1:].abs().max() > 1e-2
    # Its own reading of prompts needs ftfy; test_diffusers_samples_the_same_video compares that.
    told = ours.model.text_encoder.encode([PROMPT, ""])[0].detach()
    for folder in ("out", "twice"):
        index = json.loads((tmp_path / folder / "model_index.json").read_text())
        assert index["expand_timesteps"] is True
        wan = WanImageToVideoPipeline.from_pretrained(tmp_path / folder, torch_dtype=torch.float32)
        wan.set_progress_bar_config(disable=True)
        theirs = wan(
            image=Image.fromarray(image), prompt_embeds=told[:1], negative_prompt_embeds=told[1:],
            height=SHAPE.height, width=SHAPE.width, num_frames=SHAPE.frames, latents=noise,
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
        ).frames  # fmt: skip
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


BROKEN = "transformer.blocks.1.ffn.net.2.weight"


def with_value(run: Path, to: Path, name: str, value: float) -> Path:
    """A copy of the run whose newest checkpoint has one value changed."""
    stored = StoredTensors(find(run))
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints"))

    def read(key: str) -> torch.Tensor:
        tensor = stored.read(key)[key]
        if key == name:
            tensor.view(-1)[3] = value
        return tensor

    step = find(run).step
    save_streamed(to / "checkpoints", step, stored.shapes, read, find(run).state())
    return to


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_named(
    source: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
):
    """By verify, export and import; and nobody gets a black video of them."""
    run = with_value(source, tmp_path / "run", f"ema.{BROKEN}", value)
    assert run_command(lambda: cli.run(["ckpt", "verify", str(run)])) == 1
    says(capsys.readouterr().err, f"ema.{BROKEN}", "1 values", "NaN or infinite")
    with refuses(UserError, BROKEN.removeprefix("transformer."), "NaN or infinite", "--live"):
        export_pipeline(run, tmp_path / "out")
    export_pipeline(run, tmp_path / "live", weights="live")
    asked = ["sample", "--ckpt", str(run), "--prompt", "red", "--steps", "1"]
    assert run_command(lambda: cli.run([*asked, "--out", str(tmp_path / "clips")])) == 1
    says(capsys.readouterr().err, "clip 0", "NaN or infinite", "sora ckpt verify", "guidance_scale")
    assert not (tmp_path / "out").exists() and not (tmp_path / "clips").exists()

    for part, name in (("transformer", BROKEN.partition(".")[2]), ("vae", "quant_conv.weight")):
        folder = tmp_path / part
        shutil.copytree(pipeline, folder)
        for file in (folder / part).glob("*.safetensors"):
            weights = load_file(file)
            if name in weights:
                weights[name].view(-1)[0] = value
                save_file(weights, file, metadata={"format": "pt"})
        with refuses(UserError, name, "NaN or infinite", str(folder)):
            import_pipeline(folder, tmp_path / "imported", SHAPE)
        assert not (tmp_path / "imported").exists()


def test_a_number_is_what_torch_says(tmp_path: Path):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2):
        for value in (1.0, -65504.0, 0.0, math.nan, math.inf, -math.inf):
            tensor = torch.tensor([0.5, value, -0.5]).to(dtype)
            assert is_finite(tensor) == bool(tensor.float().isfinite().all()), (dtype, value)
    assert is_finite(torch.arange(3)) and is_finite(torch.empty(0))


def test_a_rate_is_folded_exactly():
    cfg = compose([*TINY, "model.fps_embed=true", "model.mask_channel=false"]).config.model
    told = VideoDiT(cfg).double()
    plain = VideoDiT(cfg.model_copy(update={"fps_embed": False})).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in told.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    state = {name: value.clone() for name, value in told.state_dict().items()}
    projection = state.pop("fps_proj.weight")
    state["condition_embedder.time_embedder.linear_2.bias"] += fps_offset(
        projection.float(), 24.0
    ).double()
    plain.load_state_dict(state)
    x = torch.randn(1, cfg.in_channels, 2, 4, 4, dtype=torch.float64)
    t, text = torch.rand(1, 2), torch.randn(1, 3, cfg.text_dim, dtype=torch.float64)
    with torch.no_grad():
        expected = told(x, t, text, fps_B=torch.tensor([24.0]))
        torch.testing.assert_close(plain(x, t, text), expected, atol=1e-5, rtol=1e-5)
        other = told(x, t, text, fps_B=torch.tensor([8.0]))
    assert (other - expected).abs().max() > 1e-3


# -- what is refused -------------------------------------------------------------------------------


def broken(pipeline: Path, to: Path, file: str, change: Callable[[dict], object]) -> Path:
    """A copy of the pipeline, one of its JSON files changed."""
    shutil.copytree(pipeline, to)
    values = json.loads((to / file).read_text())
    change(values)
    (to / file).write_text(json.dumps(values))
    return to


CONFIG, SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "facts"),
    [
        (CONFIG, {"_class_name": "HunyuanVideoTransformer3DModel"}, ("WanTransformer3DModel",)),
        (CONFIG, {"image_dim": 1280}, ("image_dim=1280",)),
        (CONFIG, {"ffn_dim": 40}, ("blocks.0.ffn.net.0.proj.weight", "[40")),
        (CONFIG, {"num_layers": 3}, ("blocks.2", "missing", "more")),
        (CONFIG, {"num_layers": 1}, ("blocks.1", "unexpected")),
        (SCHEDULER, {"_class_name": "DDIMScheduler"}, ("scheduler is a DDIMScheduler",)),
    ],
)  # fmt: skip
def test_what_is_not_such_a_pipeline_is_told(
    pipeline: Path, tmp_path: Path, file: str, changes: dict[str, object], facts: tuple[str, ...]
):
    folder = broken(pipeline, tmp_path / "p", file, lambda values: values.update(changes))
    with refuses(UserError, *facts):
        import_pipeline(folder, tmp_path / "run", SHAPE)
    assert not (tmp_path / "run").exists()


def test_missing_files_and_full_folders_are_told(pipeline: Path, source: Path, tmp_path: Path):
    with refuses(UserError, "model_index.json"):
        import_pipeline(tmp_path, tmp_path / "run", SHAPE)
    folder = tmp_path / "p"
    shutil.copytree(pipeline, folder)
    next((folder / "transformer").glob("*00002-of-*.safetensors")).unlink()
    with refuses(UserError, "00002-of-", "missing"):
        import_pipeline(folder, tmp_path / "run", SHAPE)
    for write in (
        lambda: import_pipeline(pipeline, folder, SHAPE),
        lambda: export_pipeline(source, folder),
    ):
        with pytest.raises(UserError, match="is not empty"):
            write()


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"text_padding": "masked"}, ("text.padding=masked", "text.padding=wan")),
        (
            {"conditioning": [["t2v", 0.0], ["i2v", 0.5], ["extend", 0.5]]},
            ("objective.conditioning", "i2v, extend", "mask_proj", "sora sample --op"),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_pipeline_has_no_place_for_is_refused(
    source: Path, tmp_path: Path, changes: dict[str, object], facts: tuple[str, ...]
):
    run = otherwise(source, tmp_path / "run", **changes)
    with refuses(UserError, *facts):
        export_pipeline(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_conditioning_is_said_to_stay_here(source: Path, tmp_path: Path):
    said = export_pipeline(source, tmp_path / "out")
    says(said, "left out", "mask_proj")
    says(said, "i2v", "sora sample --op")
    # mask_proj tells this model of its condition frames, and diffusers has no such weight.
    assert (
        json.loads((tmp_path / "out" / "model_index.json").read_text())["expand_timesteps"] is False
    )


def test_a_model_that_is_told_the_frame_rate_needs_one(pipeline: Path, tmp_path: Path):
    told, out = tmp_path / "told", tmp_path / "out"
    import_pipeline(pipeline, told, SHAPE, fps_embed=True)
    with pytest.raises(UserError, match=r"fps_proj.*--fps 8"):
        export_pipeline(told, out)
    assert not out.exists()
    says(export_pipeline(told, out, fps=12.0), "folded", "fps_proj", "12")


def with_vae(run: Path, to: Path, folder: Path, **changes: object) -> Path:
    """A copy of the run that names the VAE of a folder."""
    otherwise(run, to, **changes)
    values = yaml.safe_load((to / "config.yaml").read_text())
    values["vae"] |= {"path": str(folder), "arch": {}}
    (to / "config.yaml").write_text(yaml.safe_dump(values))
    return to


def test_another_vae_is_refused_before_a_weight_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from diffusers import AutoencoderKLHunyuanVideo

    monkeypatch.setattr(weights_out, "_write_transformer", None)
    sizes = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}
    AutoencoderKLHunyuanVideo(latent_channels=4, **sizes).save_pretrained(tmp_path / "vae")
    replaced = with_vae(source, tmp_path / "replaced", tmp_path / "vae")
    with refuses(UserError, "vae.path", "restore"):
        export_pipeline(replaced, tmp_path / "out")
    digest = VideoVAE.load(tmp_path / "vae").digest()
    trained_so = with_vae(source, tmp_path / "run", tmp_path / "vae", vae_digest=digest)
    with refuses(UserError, "vae.path", "AutoencoderKLHunyuanVideo", "train"):
        export_pipeline(trained_so, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vae_of_other_channels_does_not_go_with_the_transformer(pipeline: Path, tmp_path: Path):
    folder = tmp_path / "p"
    shutil.copytree(pipeline, folder)
    config = json.loads((folder / "vae/config.json").read_text())
    arch = {key: value for key, value in config.items() if not key.startswith("_")}
    wider = {"z_dim": arch["z_dim"] + 4, "latents_mean": None, "latents_std": None}
    VideoVAE({**{k: v for k, v in arch.items() if k not in wider}, "z_dim": wider["z_dim"]}).save(
        folder / "vae"
    )
    said = rf"takes {arch['z_dim']} channels .* of {folder}/vae have {wider['z_dim']}; what can be"
    with pytest.raises(UserError, match=said):
        import_pipeline(folder, tmp_path / "run", SHAPE)
    assert not (tmp_path / "run").exists()


def test_a_transformer_alone_takes_the_rest_from_a_pipeline(pipeline: Path, tmp_path: Path):
    alone, run = tmp_path / "tuned", tmp_path / "run"
    shutil.copytree(pipeline / "transformer", alone)
    with refuses(UserError, str(alone), "transformer", "--base"):
        import_pipeline(alone, run, SHAPE)
    with refuses(UserError, "--base", "model_index.json"):
        import_pipeline(alone, run, SHAPE, base=tmp_path)
    with refuses(UserError, "--base", "whole pipeline", "leave it out"):
        import_pipeline(pipeline, run, SHAPE, base=pipeline)
    with refuses(UserError, "model_index.json", "config.json"):
        import_pipeline(pipeline / "scheduler", run, SHAPE, base=pipeline)
    assert not run.exists()
    back = ["ckpt", "import", str(alone), "--base", str(pipeline), "--out", str(run)]
    assert cli.run([*back, "--size", "32x32", "--frames", "5", "--fps", "8"]) == 0
    imported = load(run)
    assert imported.spec.shift == 3.0 and find(run).state()["imported_from"] == str(alone)
    found = imported.model.transformer.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights_of(alone).items())


def anonymous_megabytes() -> float:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_memory_does_not_grow_with_the_weights_imported(tmp_path: Path):
    """96 MB of weights, written twice; what is held at a time is one of them (2 MB) and small things."""
    shapes = {f"w{i:02d}": (1024, 512) for i in range(48)}
    (tmp_path / "t").mkdir()
    file = tmp_path / "t" / stored_weights.WEIGHTS
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    stored = stored_weights.StoredWeights(tmp_path / "t")
    seen = []

    def read(key: str) -> torch.Tensor:
        seen.append(anonymous_megabytes())
        return stored.read(key.rpartition(".")[2])

    named = {f"{part}.{name}": shape for part in ("model", "ema") for name, shape in shapes.items()}
    save_streamed(tmp_path / "checkpoints", 0, named, read, {})
    stored.close()
    assert len(seen) == 96 and max(seen) - seen[0] < 24


def test_the_commands(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["ckpt", "export", str(source), "--out", str(tmp_path / "p")]) == 0
    back = ["ckpt", "import", str(tmp_path / "p"), "--out", str(tmp_path / "r")]
    assert cli.run([*back, "--size", "32x32", "--frames", "5", "--fps", "8"]) == 0
    assert "matched" in capsys.readouterr().out
    with refuses(UserError, "--from", "torch"):
        cli.run([*back, "--from", "torch"])


def test_two_transformers_without_a_boundary_and_training_in_an_imported_folder_are_refused(
    pipeline: Path, tmp_path: Path
):
    second = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}
    folder = broken(
        pipeline, tmp_path / "p", "model_index.json", lambda values: values.update(second)
    )
    with pytest.raises(UserError, match="two transformers and its model_index.json no boundary"):
        import_pipeline(folder, tmp_path / "run", SHAPE)
    import_pipeline(pipeline, tmp_path / "run", SHAPE)
    meta = read_meta(find(tmp_path / "run"))
    with refuses(UserError, "init.run=here", "another run.dir"):
        refuse_imported("here", meta)
    with pytest.raises(UserError, match="imported weights|another experiment"):
        Trainer(compose([*TINY, f"run.dir={tmp_path / 'run'}"]).config)


def test_what_samples_otherwise_is_said(source: Path, tmp_path: Path):
    assert "differs" not in export_pipeline(source, tmp_path / "same")
    changes = {"time_grid": "even", "shift_rule": "frame", "guidance_rescale": 0.5}
    other = otherwise(source, tmp_path / "other", **changes)
    said = export_pipeline(other, tmp_path / "out")
    for word in ("time_grid=even", "shift_rule=frame", "objective.guidance_rescale"):
        assert word in said and word in (tmp_path / "out" / "README.md").read_text()


def test_an_index_that_is_none_is_told(pipeline: Path, tmp_path: Path):
    name = "transformer/diffusion_pytorch_model.safetensors.index.json"
    folder = broken(pipeline, tmp_path / "p", name, lambda values: values.pop("weight_map"))
    with refuses(UserError, "index of weights"):
        import_pipeline(folder, tmp_path / "run", SHAPE)


def test_a_weight_of_another_name_is_unexpected(pipeline: Path, tmp_path: Path):
    shutil.copytree(pipeline, tmp_path / "p")
    file = next((tmp_path / "p/transformer").glob("*00001-of-*.safetensors"))
    weights = load_file(file)
    name = next(iter(weights))
    save_file({f"{name}.other": weights.pop(name), **weights}, file)
    with pytest.raises(UserError, match=f"{name} is missing; {name}.other is unexpected"):
        import_pipeline(tmp_path / "p", tmp_path / "run", SHAPE)


def test_a_run_starts_from_anothers_weights(source: Path, pipeline: Path, tmp_path: Path):
    import_pipeline(pipeline, tmp_path / "imported", SHAPE, mask_channel=True)
    imported = load(tmp_path / "imported")
    text = {"kind": "umt5", "path": str(pipeline), "trainable": False, "padding": "wan"}
    more = [f"text.{key}={json.dumps(value)}" for key, value in text.items()]
    init = [f"init.run={tmp_path / 'imported'}", "optim.lr=1e-9", "optim.warmup_steps=0"]
    cfg = compose(
        [*TINY, *more, *init, "vae=tiny", f"vae.path={pipeline / 'vae'}", f"run.dir={tmp_path / 'run'}"]
    ).config  # fmt: skip
    Trainer(cfg).train()
    tuned = load(tmp_path / "run", weights="live").model.transformer.state_dict()
    for name, value in imported.model.transformer.state_dict().items():
        torch.testing.assert_close(tuned[name], value, atol=1e-6, rtol=0)
    with refuses(UserError, "another VAE"):
        Trainer(cfg.model_copy(update={"vae": compose([*TINY, "vae=tiny"]).config.vae, "run": cfg.run.model_copy(
            update={"dir": str(tmp_path / "other")})}))  # fmt: skip

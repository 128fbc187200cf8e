"""Wan 2.2's A14B: two transformers that share the noise levels out. Comparisons are with diffusers' pipelines, with the
law of the noise levels cut by hand, and with runs of each expert alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file
from sentences import refuses
from wan_pipelines import TAKES_FRAMES, pipeline

from sora_train.checkpoint import find
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.config.compose import compose
from sora_train.diffusion import timesteps
from sora_train.diffusion.draws import draw_noise
from sora_train.diffusion.spec import DiffusionSpec, share_below
from sora_train.errors import ConfigError, UserError
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.monitoring.metrics import read_metrics
from sora_train.objectives.spec import spec_of as build_spec
from sora_train.sampling.api import Model, load
from sora_train.sampling.pipeline import (
    ClipShape,
    ConditionFrames,
    encode_conditions,
    sample_latents,
)
from sora_train.tools.convert.adapter_file import export_adapter
from sora_train.tools.convert.from_diffusers import import_pipeline
from sora_train.tools.convert.to_diffusers import export_pipeline
from sora_train.training.trainer import Trainer

SHAPE = ClipShape(9, 32, 48, 16.0)
PROMPT = "a red circle moves left"
BOUNDARY = 0.9
STEPS, SCALE, SCALE_2 = 8, 3.0, 2.0
MEMBERS: dict[str, dict[str, Any]] = {"t2v": {}, "i2v": TAKES_FRAMES}


@pytest.fixture(scope="module", params=list(MEMBERS))
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pipeline`, its imports `both`, `high` and `low`, and the exports `again` and `apart` of these."""
    folder = tmp_path_factory.mktemp("member")
    pipeline(folder / "pipeline", MEMBERS[request.param], second=True, boundary=BOUNDARY)
    for expert in ("both", "high", "low"):
        import_pipeline(folder / "pipeline", folder / expert, SHAPE, expert=expert)
    export_pipeline(folder / "both", folder / "again")
    export_pipeline(folder / "low", folder / "apart", other=str(folder / "high"))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_both_come_in_and_go_out_bit_for_bit(member: Path):
    indices = {
        name: json.loads((member / name / "model_index.json").read_text())
        for name in ("pipeline", "again", "apart")
    }
    for name in ("again", "apart"):
        for part in ("transformer", "transformer_2"):
            first, again = weights_of(member / "pipeline" / part), weights_of(member / name / part)
            assert first.keys() == again.keys()
            assert all(torch.equal(first[key], again[key]) for key in first), (name, part)
        for key in ("_class_name", "boundary_ratio", "transformer_2"):
            assert indices[name][key] == indices["pipeline"][key]
    experts = [weights_of(member / "pipeline" / part) for part in ("transformer", "transformer_2")]
    assert not torch.equal(experts[0]["proj_out.weight"], experts[1]["proj_out.weight"])


def image() -> np.ndarray:
    size = (SHAPE.height, SHAPE.width, 3)
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


def ours(model: Model, noise: torch.Tensor, **changes: Any) -> torch.Tensor:
    conditions = None
    if model.spec.cond_mode == "concat":
        pixels = np.zeros((SHAPE.frames, *image().shape), np.uint8)
        pixels[0] = image()
        given = ConditionFrames(pixels, "i2v", torch.tensor([1.0, 0.0, 0.0]))
        conditions = encode_conditions(given, model.vae, model.spec)
    settings = {"num_steps": STEPS, "guidance_scale": SCALE, "guidance_scale_2": SCALE_2}
    spec = model.spec.replace(**{**settings, **changes})
    return sample_latents(model.model, spec, [PROMPT], noise, SHAPE.fps, conditions=conditions)


def theirs(
    folder: Path, model: Model, noise: torch.Tensor, adapters: tuple[Path, ...] = ()
) -> torch.Tensor:
    """Latents of diffusers' pipeline, with an adapter's file for each of its transformers."""
    takes_image = model.spec.cond_mode == "concat"
    kind = WanImageToVideoPipeline if takes_image else WanPipeline
    wan = kind.from_pretrained(folder, torch_dtype=torch.float32)
    for second, file in enumerate(adapters):
        wan.load_lora_weights(file, load_into_transformer_2=bool(second))
    wan.set_progress_bar_config(disable=True)
    # Its own reading of prompts needs ftfy.
    told = model.model.frozen_encoder.encode([PROMPT, ""])[0]
    return wan(
        prompt_embeds=told[:1], negative_prompt_embeds=told[1:], height=SHAPE.height, width=SHAPE.width,
        num_frames=SHAPE.frames, latents=noise, num_inference_steps=STEPS, guidance_scale=SCALE,
        guidance_scale_2=SCALE_2, output_type="latent",
        **({"image": Image.fromarray(image())} if takes_image else {}),
    ).frames  # fmt: skip


def test_the_pipeline_samples_the_same_video(member: Path):
    """By one run of both and by two of one each; of the first folder, and of what was exported."""
    model = load(member / "both")
    noise = draw_noise(5, "sample", [(0, 0)], model.vae.latent_shape(9, 32, 48))
    mine = ours(model, noise)
    for folder in ("pipeline", "again"):
        torch.testing.assert_close(mine, theirs(member / folder, model, noise), atol=1e-4, rtol=0)
    for one, other in (("high", "low"), ("low", "high")):
        two = load(member / one, other_expert=str(member / other))
        assert torch.equal(ours(two, noise), mine)
    # What would agree with anything: a switch, or a second scale, without effect.
    for change in ({"boundary": 0.5}, {"guidance_scale_2": 0.0}, {"guidance_scale": 9.0}):
        assert (ours(model, noise, **change) - mine).abs().max() > 1e-3, change


def spec_of(**changes: Any) -> DiffusionSpec:
    run = compose(["experiment=parity_tiny", "model.expert=both"]).config
    return build_spec(run, VideoVAE.from_config(run.vae), "").replace(**changes)


LAWS = [
    {"time_law": "logit_normal", "time_mean": 0.0, "time_std": 1.0},
    {"time_law": "logit_normal", "time_mean": 1.2, "time_std": 0.4},
    {"time_law": "uniform"},
    {"time_law": "mode", "mode_scale": 1.29},
]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.3])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_levels_are_those_of_the_shifted_law_on_one_side(
    law: dict[str, Any], boundary: float, shift: float
):
    """The law of all levels, sorted by hand into those at or above the boundary and those below, is that of both
    experts: compared by their quantiles."""
    spec = spec_of(**law, boundary=boundary, shift=shift)
    count, size = 200_001, (5, 8, 8)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    every = spec.training_times(u, size)
    share = float((every < boundary).double().mean())
    for expert, side in (("high", every >= boundary), ("low", every < boundary)):
        found = spec.training_times(u, size, expert)
        assert bool(((found >= boundary) == (expert == "high")).all())
        if side.sum() > 5000:
            levels = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
            expected = torch.quantile(every[side], levels)
            torch.testing.assert_close(torch.quantile(found, levels), expected, atol=2e-4, rtol=0)
    assert share_below(spec, size) == pytest.approx(share, abs=1e-5)


def test_the_boundary_is_applied_to_the_shifted_level():
    """With uniform draws and shift s a share b / (s - (s - 1) b) lies below b; the share of unshifted levels is b."""
    spec = spec_of(time_law="uniform", boundary=0.875, shift=5.0)
    assert share_below(spec, (5, 8, 8)) == pytest.approx(0.875 / (5 - 4 * 0.875), abs=1e-12)
    assert timesteps.share_below(lambda u: u, 0.875) == pytest.approx(0.875, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_boundary_itself_is_the_high_noise_experts(dtype: torch.dtype):
    spec = spec_of(boundary=0.9)
    edge = torch.tensor(0.9, dtype=dtype)
    below = edge.nextafter(torch.zeros_like(edge))
    assert (spec.expert_at(edge), spec.expert_at(below)) == ("high", "low")
    u = torch.tensor([0.0, 1 - 2**-24], dtype=dtype)
    for expert in ("high", "low"):
        for t in spec.training_times(u, (5, 8, 8), expert):
            assert spec.expert_at(t) == expert


def tuning(run: Path, to: Path, *more: str) -> list[str]:
    """Arguments of a run of tiny clips that begins with an imported one."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    own = [
        f"{section}.{key}={json.dumps(value)}"
        for section in ("model", "vae", "text", "image", "objective")
        for key, value in values[section].items()
        if not isinstance(value, dict) and (section, key) != ("vae", "arch")
    ]
    shares = values["objective"]["conditioning"].items()
    own += [f"objective.conditioning.{key}={value}" for key, value in shares]
    return [
        "experiment=parity_tiny", "vae=tiny", "data.shapes_clips=8", "data.shapes_val_clips=2", "train.steps=4",
        "checkpoint.every=0", "validation.every=4", "validation.times=[0.3,0.95]", "data.shapes_image_share=0", *own,
        f"init.run={run}", "optim=adamw", "optim.lr=1e-3", "optim.warmup_steps=0", "optim.weight_decay=0.1",
        f"run.dir={to}", *more,
    ]  # fmt: skip


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Live weights and moments by name."""
    stored = StoredTensors(find(run, step))
    kinds = ("model.", "optim.")
    return stored.read(*(f"{kind}{name}" for kind in kinds for name in stored.names(kind)))


def test_a_step_of_both_trains_one_and_leaves_the_other_as_it_is(member: Path, tmp_path: Path):
    """Weights and moments, bit for bit, decay included; and each learns in its turn."""
    run = tmp_path / "run"
    Trainer(
        compose(tuning(member / "both", run, "checkpoint.every=1", "checkpoint.keep_last=4")).config
    ).train()
    states = {step: state_of(run, step) for step in range(1, 5)}
    before = load(member / "both").model.state_dict()
    for step in range(1, 5):
        learns, rests = ("transformer.", "transformer_2.")[:: 1 if step % 2 else -1]
        for name, value in states[step].items():
            kind, _, rest = name.partition(".")
            last = states[step - 1][name] if step > 1 else before.get(rest)
            if step == 1 and kind == "optim":
                last = torch.zeros_like(value)
            assert last is not None
            if rest.startswith(rests):
                assert torch.equal(value, last), (step, name)
            elif kind == "model" and rest.startswith(learns):
                assert not torch.equal(value, last), (step, name)
    counts = {float(value) for name, value in states[4].items() if name.endswith(".step")}
    assert counts == {2.0}
    assert "val/loss/t0.30" in read_metrics(run / "metrics.jsonl")[-1]


def test_an_expert_alone_trains_in_its_window_and_is_sampled_with_the_other(
    member: Path, tmp_path: Path
):
    for expert in ("high", "low"):
        run = tmp_path / expert
        arguments = tuning(member / expert, run, "sample.every=0")
        trainer = Trainer(compose(arguments).config)
        levels = [
            info.t
            for step in range(4)
            for batch in trainer.data.step(step)
            for info in trainer.objective.describe(batch)
        ]
        assert levels and all((t >= BOUNDARY) == (expert == "high") for t in levels)
        trainer.train()
        # Of two levels one lies in the window.
        measured = read_metrics(run / "metrics.jsonl")[-1]
        assert {key for key in measured if key.startswith("val/loss/t")} == {
            "val/loss/t0.95" if expert == "high" else "val/loss/t0.30"
        }
        with refuses(UserError, f"{expert}-noise expert alone", "--other-expert"):
            load(run).sample([PROMPT])
    two = load(tmp_path / "high", other_expert=str(tmp_path / "low"))
    noise = draw_noise(5, "sample", [(0, 0)], two.vae.latent_shape(9, 32, 48))
    export_pipeline(tmp_path / "high", tmp_path / "out", other=str(tmp_path / "low"))
    torch.testing.assert_close(
        ours(two, noise), theirs(tmp_path / "out", two, noise), atol=1e-4, rtol=0
    )


def test_adapters_of_both_experts_are_those_of_diffusers(member: Path, tmp_path: Path):
    """Each trained beside its expert, exported as a file, and loaded by the pipeline's own loader."""
    for expert in ("high", "low"):
        more = ("sample.every=0", "adapter.rank=2", "adapter.targets=[all_linear]", "train.steps=2")
        arguments = tuning(member / expert, tmp_path / expert, *more, "validation.every=0")
        Trainer(compose(arguments).config).train()
    files = tuple(tmp_path / f"{expert}.safetensors" for expert in ("high", "low"))
    for file in files:
        export_adapter(str(file.with_suffix("")), file, "diffusers", "live")
    model = load(tmp_path / "high", weights="live", other_expert=str(tmp_path / "low"))
    noise = draw_noise(5, "sample", [(0, 0)], model.vae.latent_shape(9, 32, 48))
    mine = ours(model, noise)
    adapted = theirs(member / "pipeline", model, noise, files)
    torch.testing.assert_close(mine, adapted, atol=1e-4, rtol=0)
    for fewer in ((), files[:1]):
        assert (theirs(member / "pipeline", model, noise, fewer) - mine).abs().max() > 1e-3


# -- what is refused -------------------------------------------------------------------------------


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_experts_without_weights_or_with_an_impossible_boundary_are_told(tmp_path: Path):
    folder = pipeline(tmp_path / "p", {}, second=True, boundary=BOUNDARY)
    out = tmp_path / "run"
    for boundary in (0.0, 1.0, 1.5, -0.2):
        with refuses(UserError, "boundary", f"{boundary:g}", "between 0 and 1"):
            import_pipeline(folder, out, SHAPE, boundary=boundary)
    with refuses(UserError, "--expert is 'middle'", "high, low, both"):
        import_pipeline(folder, out, SHAPE, expert="middle")
    with refuses(UserError, "is one transformer", "--expert high"):
        import_pipeline(folder / "transformer_2", out, SHAPE, base=folder)
    changed(folder, boundary_ratio=None)
    with refuses(UserError, "no boundary_ratio", "--boundary"):
        import_pipeline(folder, out, SHAPE)
    changed(folder, boundary_ratio=BOUNDARY, transformer_2=[None, None])
    for expert in ("", "both", "low"):
        with refuses(UserError, "has no transformer_2", "--expert high"):
            import_pipeline(folder, out, SHAPE, expert=expert)
    import_pipeline(folder, out, SHAPE, expert="high")
    one = pipeline(tmp_path / "one", {})
    with refuses(UserError, "--expert high", "has one"):
        import_pipeline(one, tmp_path / "other", SHAPE, expert="high")


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["model.expert=both", "model.boundary=1.2"], ("model.boundary is 1.2", "between 0 and 1")),
        (["model.expert=high", "sample.every=5"], ("both experts", "sample.every=0")),
        (["objective.guidance_scale_2=3"], ("guidance_scale_2=3", "model.expert is empty")),
        (["model.expert=both", "adapter.rank=4", "init.run=x"], ("model.expert=both", "adapter")),
        (["model.expert=low", "validation.times=[0.95]"], ("validation.times", "model.boundary")),
        (
            ["model.expert=low", "objective.high_noise_share=0.1"],
            ("high_noise_share", "boundary"),
        ),
        (["model.expert=both", "parallel.engine=zero2"], ("parallel.engine=zero2", "rests")),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_that_cannot_be_is_told(overrides: list[str], facts: tuple[str, ...], tmp_path: Path):
    arguments = ["experiment=parity_tiny", f"run.dir={tmp_path / 'run'}", *overrides]
    with refuses((ConfigError, ValueError), *facts):
        Trainer(compose(arguments).config)


def test_weights_of_another_expert_are_refused(member: Path, tmp_path: Path):
    for held, wanted in (("high", "low"), ("both", "low"), ("high", "both")):
        arguments = tuning(member / held, tmp_path / "run", f"model.expert={wanted}")
        with refuses(UserError, "init.run", f"model.expert={wanted}", f"--expert {wanted}"):
            Trainer(compose([*arguments, "sample.every=0"]).config)


def test_experts_that_do_not_go_together_are_told(member: Path, tmp_path: Path):
    high, low, both = (str(member / name) for name in ("high", "low", "both"))
    with refuses(UserError, "expert 'high'", "one of low noise"):
        load(high, other_expert=high)
    with refuses(UserError, "both experts", "leave it out"):
        load(both, other_expert=low)
    with refuses(UserError, "low-noise expert alone", "--other-expert"):
        export_pipeline(member / "low", tmp_path / "out")
    import_pipeline(member / "pipeline", tmp_path / "moved", SHAPE, expert="low", boundary=0.5)
    with refuses(UserError, "boundary is 0.9 and 0.5", "one pipeline"):
        load(high, other_expert=str(tmp_path / "moved"))

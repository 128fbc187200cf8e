"""Adapters beside a model: sampled as diffusers does, merged into run folders, refused where they do not fit."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_adapters import random_adapter
from sentences import refuses, says

from sora_train import checkpoint as checkpoints
from sora_train import cli
from sora_train.checkpoint.layout import weights_digest
from sora_train.checkpoint.meta import read_meta
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.config.compose import compose
from sora_train.diffusion.draws import draw_noise
from sora_train.errors import UserError, run_command
from sora_train.models.adapters.factors import AdapterFacts, AdapterWeights
from sora_train.models.adapters.files.reading import read_adapter
from sora_train.models.adapters.files.writing import LAYOUTS, write_adapter
from sora_train.sampling.adapters import NamedAdapter, adapter_of, open_adapter
from sora_train.sampling.api import Model, load
from sora_train.sampling.pipeline import ClipShape, sample_latents
from sora_train.tools.checkpoints.merging import merge_adapters
from sora_train.tools.convert.adapter_file import export_adapter
from sora_train.tools.convert.to_diffusers import export_pipeline
from sora_train.training.trainer import Trainer

SHAPE = ClipShape(5, 32, 32, 8.0)
PROMPT = "a red circle moves left"
STEPS, GUIDANCE = 3, 3.0
TINY = [
    "experiment=parity_tiny", "text.padding=wan", "data.shapes_clips=8", "data.shapes_val_clips=2",
    "validation.every=0", "sample.every=0", "objective.solver=euler",
    "objective.time_grid=flow_match_euler", "objective.shift=3", "checkpoint.rehearse=false",
]  # fmt: skip
ADAPTER = ["adapter.rank=3", "adapter.alpha=5", "optim.lr=0.1", "adapter.targets=[all_linear]"]


class Stirred(Trainer):
    """Begins with weights none of which is its first value of zero."""

    def build_model(self) -> torch.nn.Module:
        model = super().build_model()
        draws = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
        return model


def train(folder: Path, *more: str, trainer: type[Trainer] = Trainer) -> Path:
    trainer(compose([*TINY, "train.steps=2", f"run.dir={folder}", *more]).config).train()
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("base") / "base", "optim.lr=2e-3", trainer=Stirred)


@pytest.fixture(scope="module")
def zork(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's run on it."""
    folder = tmp_path_factory.mktemp("zork") / "zork"
    return train(folder, *ADAPTER, f"init.run={base}", "adapter.trigger=triangle")


@pytest.fixture(scope="module")
def shapes(base: Path) -> dict[str, tuple[int, int]]:
    stored = StoredTensors(checkpoints.find(base))
    return {
        name.removesuffix(".weight"): shape
        for name in stored.names("ema.transformer.")
        if len(shape := stored.shapes[f"ema.transformer.{name}"]) == 2 and name.endswith(".weight")
    }


def some_adapter(
    shapes: dict[str, tuple[int, int]],
    seed: int = 0,
    about: AdapterFacts | None = None,
    **how: bool,
) -> AdapterWeights:
    """On the blocks, with ranks that differ and are not alpha."""
    names = [name for name in shapes if name.startswith("blocks.")]
    ranks = {name: 2 + index % 3 for index, name in enumerate(names)}
    alphas = dict.fromkeys(names, 4.5)
    return random_adapter(shapes, ranks, alphas, seed=seed, about=about, **how)


def noise_for(model: Model) -> torch.Tensor:
    shape = model.vae.latent_shape(SHAPE.frames, SHAPE.height, SHAPE.width)
    return draw_noise(5, "sample", [(0, 0)], shape)


def latents(model: Model) -> torch.Tensor:
    spec = model.spec.replace(num_steps=STEPS, guidance_scale=GUIDANCE)
    return sample_latents(model.model, spec, [PROMPT], noise_for(model), SHAPE.fps)


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.model.named_parameters()}


# -- the same video in diffusers ------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_samples_the_same_video_with_our_files(
    base: Path, zork: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path, layout: str
):
    """Base, a run's adapter, another, and both at strengths of their own, changed without loading anything again."""
    pytest.importorskip("accelerate")
    from diffusers import WanPipeline

    export_adapter(str(zork), tmp_path / "zork.safetensors", layout)
    write_adapter(some_adapter(shapes), tmp_path / "other.safetensors", layout)
    export_pipeline(base, tmp_path / "pipeline")
    wan = WanPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float32)
    wan.set_progress_bar_config(disable=True)
    for name in ("zork", "other"):
        wan.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
    ours = load(zork, adapters=[tmp_path / "other.safetensors"])
    noise, seen = noise_for(ours), []
    for strengths in ((1.0, 1.0), (1.0, 0.3), (0.6, -0.4), (0.0, 0.0)):
        wan.set_adapters(["zork", "other"], list(strengths))
        theirs = wan(
            prompt=PROMPT, negative_prompt="", height=SHAPE.height, width=SHAPE.width,
            num_frames=SHAPE.frames, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            latents=noise, output_type="latent", max_sequence_length=ours.cfg.text.max_length,
        ).frames  # fmt: skip
        ours.set_strengths(*strengths)
        torch.testing.assert_close(latents(ours), theirs, atol=3e-5, rtol=0)
        seen.append(theirs)
    for one, other in zip(seen, seen[1:], strict=False):
        assert (one - other).abs().max() > 1e-2


# -- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["adapter.rslora=true"], ["adapter.dora=true"]])
def test_an_adapters_run_samples_as_it_trained(base: Path, tmp_path: Path, more: list[str]):
    """The model that training built, base and adapter side by side, and the one that sampling merges, agree."""
    cfg = compose([*TINY, *ADAPTER, *more, "train.steps=2", f"run.dir={tmp_path / 'run'}",
                   f"init.run={base}"]).config  # fmt: skip
    trainer = Trainer(cfg)
    trainer.train()
    ours = load(tmp_path / "run", weights="live")
    model = trainer.model.eval()
    spec = ours.spec.replace(num_steps=STEPS, guidance_scale=GUIDANCE)
    trained = sample_latents(model, spec, [PROMPT], noise_for(ours), SHAPE.fps)
    torch.testing.assert_close(latents(ours), trained, atol=3e-5, rtol=0)
    assert (trained - latents(load(base))).abs().max() > 1e-2


def test_averaged_weights_of_an_adapter_are_the_default(zork: Path):
    checkpoint = checkpoints.find(zork)
    stored = StoredTensors(checkpoint)
    name = "transformer.blocks.0.attn1.to_q.lora_B.default.weight"
    for kind, prefix in (("ema", "ema."), ("live", "model.")):
        up = adapter_of(checkpoint, kind).modules["blocks.0.attn1.to_q"].up
        assert torch.equal(up, stored.read(f"{prefix}{name}")[f"{prefix}{name}"])
        assert up.any()
    averaged, live = (adapter_of(checkpoint, kind).modules for kind in ("ema", "live"))
    assert any(not torch.equal(averaged[name].up, live[name].up) for name in live)


def test_a_runs_file_says_what_it_is_and_holds_just_the_run(base: Path, zork: Path, tmp_path: Path):
    said = export_adapter(str(zork), tmp_path / "zork.safetensors", "comfyui")
    says(said, "rank 3", "alpha 5", "triangle", "zork.safetensors")
    got, run = read_adapter(tmp_path / "zork.safetensors"), adapter_of(checkpoints.find(zork))
    about = got.about
    assert (about.rank, about.alpha, about.rslora, about.trigger) == (3, 5.0, False, "triangle")
    assert (about.steps, about.base) == (2, "base")
    assert about.base_digest == weights_digest(checkpoints.find(base), "ema")
    assert got.modules.keys() == run.modules.keys()
    for name, factors in run.modules.items():
        assert factors.scale == 5 / 3
        assert torch.equal(got.modules[name].down, factors.down)


def test_a_file_is_written_in_the_other_layout_from_the_command_line(
    zork: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for source, out, layout in (
        (zork, "a", "comfyui"), (tmp_path / "a.safetensors", "b", "diffusers"),
    ):  # fmt: skip
        made = tmp_path / f"{out}.safetensors"
        assert run_command(lambda s=source, m=made, kind=layout: cli.run(
            ["ckpt", "export", str(s), "--to", kind, "--out", str(m)])) == 0  # fmt: skip
    one, other = (read_adapter(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.about == other.about
    assert all(torch.equal(one.modules[n].up, other.modules[n].up) for n in one.modules)


@pytest.mark.parametrize(
    "arguments, facts",
    [
        (["{zork}", "--to", "flux", "--out", "{tmp}/a.safetensors"], ["--to flux", "diffusers, comfyui"]),
        (["{zork}", "--to", "comfyui", "--out", "{tmp}/folder"], ["--out", "folder", ".safetensors"]),
        (["{base}", "--to", "comfyui", "--out", "{tmp}/a.safetensors"], ["comfyui", "whole model"]),
        (["{zork}", "--fps", "8", "--out", "{tmp}/a.safetensors"], ["--fps 8", "adapter"]),
        (["{tmp}/none", "--out", "{tmp}/a.safetensors"], ["none", "no complete checkpoint"]),
    ],
)  # fmt: skip
def test_an_export_that_cannot_be_is_refused(
    base: Path, zork: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], facts: list[str],
):  # fmt: skip
    given = [one.format(zork=zork, base=base, tmp=tmp_path) for one in arguments]
    assert run_command(lambda: cli.run(["ckpt", "export", *given])) == 2
    says(capsys.readouterr().err, *facts)
    assert not list(tmp_path.iterdir())


# -- trained on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_training_begins_with_the_adapter_of_adapter_init(base: Path, tmp_path: Path, dora: bool):
    """From a run and from a file, at another alpha too; going on from a checkpoint needs it no more."""
    kind = [*ADAPTER, f"adapter.dora={str(dora).lower()}", f"init.run={base}"]
    first = train(tmp_path / "first", *kind)
    export_adapter(str(first), tmp_path / "first.safetensors", "diffusers")
    still = [*kind, "optim.lr=1e-12", "train.steps=1", "adapter.alpha=9"]
    again = train(tmp_path / "run", *still, f"adapter.init={first}")
    file = train(tmp_path / "file", *still, f"adapter.init={tmp_path / 'first.safetensors'}")
    expected = weights(load(first))
    for run in (again, file):
        for kind_of_weights in ("ema", "live"):
            got = weights(load(run, weights=kind_of_weights, base=str(base)))
            for name, value in got.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    (tmp_path / "first.safetensors").unlink()
    train(
        tmp_path / "file", *still, f"adapter.init={tmp_path / 'first.safetensors'}", "train.steps=2"
    )


def test_an_adapter_that_this_run_cannot_train_on_is_refused(
    base: Path, zork: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path
):
    def begin(*more: str) -> None:
        train(tmp_path / "run", *ADAPTER, f"init.run={base}", f"adapter.init={zork}", *more)

    with refuses(UserError, "adapter.init", str(zork), "[3, ", "[4, ", "adapter.rank"):
        begin("adapter.rank=4")
    with refuses(UserError, "adapter.init", "text_embedder", "would not train", "adapter.targets"):
        begin("adapter.targets=[attention+mlp]")
    with refuses(UserError, "adapter.init", "nothing", "lora_magnitude_vector", "adapter.dora"):
        begin("adapter.dora=true")
    with refuses(UserError, "adapter.init", "leave :0.5 out"):
        begin(f"adapter.init={zork}:0.5")
    other = some_adapter(shapes, about=AdapterFacts(base_digest="cd" * 32, base="wan_14b"))
    write_adapter(other, tmp_path / "other.safetensors", "comfyui")
    with refuses(UserError, "adapter.init", "wan_14b", "cdcdcdcdcdcd", f"init.run={base}"):
        begin(f"adapter.init={tmp_path / 'other.safetensors'}")
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


# -- merged ---------------------------------------------------------------------------------------


def test_a_merged_folder_is_the_adapters_run_without_an_adapter(zork: Path, tmp_path: Path):
    says(merge_adapters(zork, None, [], tmp_path / "whole"), "1 x", str(zork), "wrote")
    merged, run = load(tmp_path / "whole"), load(zork)
    assert weights(merged).keys() == weights(run).keys()
    assert all(torch.equal(weights(run)[name], value) for name, value in weights(merged).items())
    assert torch.equal(latents(merged), latents(run))
    assert not merged.cfg.adapter.on and not merged.cfg.init.run
    meta = read_meta(checkpoints.find(tmp_path / "whole"))
    assert meta.imported_from and meta.config["adapter"]["rank"] == 0
    # Another run begins with it, and it is a pipeline for diffusers.
    train(tmp_path / "next", f"init.run={tmp_path / 'whole'}", "train.steps=1")
    says(export_pipeline(tmp_path / "whole", tmp_path / "pipeline"), "transformer", "wrote")


def test_merged_weights_are_the_formula_in_float64(
    base: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path
):
    """W + sum of strength * alpha / rank * up @ down; DoRA's rows have the lengths that its magnitude says."""
    lora, dora = some_adapter(shapes), some_adapter(shapes, 1, dora=True)
    for name, adapter in (("lora", lora), ("dora", dora)):
        write_adapter(adapter, tmp_path / f"{name}.safetensors", "diffusers")
    files = [f"{tmp_path}/lora.safetensors:0.7", f"{tmp_path}/dora.safetensors"]
    merge_adapters(base, None, files, tmp_path / "both")
    before, after = weights(load(base)), weights(load(tmp_path / "both"))
    for name, value in before.items():
        module = name.removeprefix("transformer.").removesuffix(".weight")
        if module not in lora.modules or not name.endswith(".weight"):
            assert torch.equal(after[name], value), name
            continue
        w, one, two = value.double(), lora.modules[module], dora.modules[module]
        turned = w + two.scale * (two.up.double() @ two.down.double())
        turned *= (two.magnitude.double() / turned.norm(dim=1))[:, None]
        expected = turned + 0.7 * one.scale * (one.up.double() @ one.down.double())
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_there_must_be_something_to_merge_and_room_for_it(base: Path, zork: Path, tmp_path: Path):
    with refuses(UserError, str(base), "nothing to merge", "--adapter"):
        merge_adapters(base, None, [], tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with refuses(UserError, str(tmp_path / "out"), "not empty"):
        merge_adapters(zork, None, [], tmp_path / "out")


# -- strengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strengths_are_those_of_a_model_loaded_with_them(
    base: Path, shapes: dict[str, tuple[int, int]], dtype: str
):
    first, second = some_adapter(shapes), some_adapter(shapes, 1, dora=True)
    both = [NamedAdapter("first", first), NamedAdapter("second", second)]
    model = load(base, adapters=both, dtype=dtype)
    for one, two in ((0.25, 1.0), (1.0, -0.5)):
        model.set_strengths(one, two)
        given = [NamedAdapter("first", first, one), NamedAdapter("second", second, two)]
        anew = weights(load(base, adapters=given, dtype=dtype))
        assert all(torch.equal(value, anew[name]) for name, value in weights(model).items())
    with refuses(UserError, "1 strengths", "2 adapters", "first", "second"):
        model.set_strengths(1.0)
    # A transformer that came into its place afterwards is another expert's.
    own, elsewhere = model.model.transformer, copy.deepcopy(model.model.transformer)
    before = {name: value.clone() for name, value in own.named_parameters()}
    model.model.transformer = elsewhere
    model.set_strengths(2.0, 2.0)
    assert all(torch.equal(value, before[name]) for name, value in elsewhere.named_parameters())
    assert any(not torch.equal(value, before[name]) for name, value in own.named_parameters())
    plain = load(base, adapters=[NamedAdapter("first", first)])
    plain.set_strengths(0.0)
    untouched = weights(load(base))
    assert all(torch.equal(value, untouched[name]) for name, value in weights(plain).items())


def test_a_weight_stands_behind_the_last_colon(zork: Path, tmp_path: Path):
    for text, strength in ((str(zork), 1.0), (f"{zork}:0.8", 0.8), (f"{zork}@2:-1.5", -1.5)):
        opened = open_adapter(text)
        assert opened.strength == strength and opened.weights.about.trigger == "triangle"
    odd = tmp_path / "run:3"
    shutil.copytree(zork, odd)
    assert open_adapter(str(odd)).strength == 1.0 and open_adapter(f"{odd}:0.5").strength == 0.5
    for wrong in ("high", "nan", ""):
        with refuses(UserError, f"{zork}:{wrong}", "weight", f"{zork}:0.8"):
            open_adapter(f"{zork}:{wrong}")


# -- what does not fit ----------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_by_its_digest(
    base: Path, zork: Path, tmp_path: Path, shapes: dict[str, tuple[int, int]],
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    other = some_adapter(shapes, about=AdapterFacts(base_digest="cd" * 32, base="wan_14b"))
    write_adapter(other, tmp_path / "other.safetensors", "comfyui")
    asked = ["sample", "--ckpt", str(base), "--prompt", "red", "--steps", "1"]
    asked += ["--adapter", f"{tmp_path}/other.safetensors", "--out", str(tmp_path / "clips")]
    assert run_command(lambda: cli.run(asked)) == 2
    says(
        capsys.readouterr().err,
        "other.safetensors",
        "wan_14b",
        "cdcdcdcdcdcd",
        str(base),
        "--any-base",
    )
    assert not (tmp_path / "clips").exists()
    assert run_command(lambda: cli.run([*asked, "--any-base"])) == 0
    says(capsys.readouterr().err, "other.safetensors", "another base", "wan_14b")
    assert (tmp_path / "clips" / "000.mp4").exists()
    # Its own base passes without a word, one that nobody names with one.
    assert load(base, adapters=[zork]).adapted.notes == []
    (note,) = load(base, adapters=[NamedAdapter("mine", some_adapter(shapes))]).adapted.notes
    says(note, "mine", "does not say which base")


def test_weights_as_trained_are_told_from_averaged_ones(
    base: Path, shapes: dict[str, tuple[int, int]]
):
    about = AdapterFacts(base_digest=weights_digest(checkpoints.find(base), "live"))
    (note,) = load(
        base, adapters=[NamedAdapter("a", some_adapter(shapes, about=about))]
    ).adapted.notes
    says(note, "a", "as trained", "ema")


def test_a_base_that_has_moved_is_asked_for(base: Path, zork: Path, tmp_path: Path):
    gone = tmp_path / "zork"
    shutil.copytree(zork, gone)
    config = (gone / "config.yaml").read_text().replace(str(base), str(tmp_path / "gone"))
    (gone / "config.yaml").write_text(config)
    with refuses(UserError, str(gone), f"init.run={tmp_path / 'gone'}", "--base"):
        load(gone)
    moved = load(gone, base=str(base))
    assert all(torch.equal(v, weights(moved)[n]) for n, v in weights(load(zork)).items())
    # Where another run lies now, its digest tells.
    train(tmp_path / "gone", "train.steps=1")
    with refuses(UserError, str(gone), "another base", "base", "digest"):
        load(gone)
    with refuses(UserError, f"--base {zork}", str(base), "whole model"):
        load(base, base=str(zork))


def test_what_the_model_lacks_or_has_of_another_size_is_named(
    base: Path, shapes: dict[str, tuple[int, int]]
):
    adapter = some_adapter(shapes)
    name = "blocks.0.attn1.to_q"
    image = {"blocks.0.attn2.add_k_proj": adapter.modules[name]}
    wider = replace(adapter, modules=adapter.modules | image)
    with refuses(UserError, "i2v", "blocks.0.attn2.add_k_proj.weight", "lacks", "--any-base"):
        load(base, adapters=[NamedAdapter("i2v", wider)])
    model = load(base, adapters=[NamedAdapter("i2v", wider)], any_base=True)
    says(" ".join(model.adapted.notes), "i2v", "left out 1", "add_k_proj")
    same = weights(load(base, adapters=[NamedAdapter("t2v", adapter)]))
    assert all(torch.equal(value, same[name]) for name, value in weights(model).items())
    with refuses(UserError, "flux", "single_blocks.0.linear1.weight", "1 of 1"):
        flux = AdapterWeights({"single_blocks.0.linear1": adapter.modules[name]})
        load(base, adapters=[NamedAdapter("flux", flux)], any_base=True)
    large = random_adapter({name: (96, 80)}, {name: 2}, {name: 1.0})
    out, width = shapes[name]
    with refuses(UserError, "large", f"{name}.weight", "[96, 80]", f"[{out}, {width}]"):
        load(base, adapters=[NamedAdapter("large", large)])
    with refuses(UserError, str(base), "whole model", "no adapter"):
        load(base, adapters=[base])

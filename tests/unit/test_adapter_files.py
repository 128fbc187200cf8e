"""Adapter files: what we write is what diffusers loads, and what others write is what we read."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_adapters import IMAGE, MODULES, OUTSIDE, adapted, random_adapter, shapes_of, tiny_wan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentences import refuses
from torch import Tensor

from sora_train.errors import UserError
from sora_train.models.adapters.factors import AdapterFacts, AdapterWeights, Factors
from sora_train.models.adapters.files.names import our_name, wan_name
from sora_train.models.adapters.files.reading import read_adapter
from sora_train.models.adapters.files.writing import LAYOUTS, write_adapter

ABOUT = AdapterFacts(
    rank=4, alpha=7.0, rslora=False, base_digest="ab" * 32, base="runs/wan", trigger="zork creature",
    steps=1200, version="1.2.3",
)  # fmt: skip


@pytest.fixture(scope="module")
def wan() -> torch.nn.Module:
    return tiny_wan()


@pytest.fixture(scope="module")
def shapes(wan: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return shapes_of(wan)


def mixed(shapes: dict[str, tuple[int, int]], **how: bool) -> AdapterWeights:
    """Three ranks and alphas that are none of them, over every linear layer."""
    ranks = {name: (2, 3, 5)[index % 3] for index, name in enumerate(MODULES)}
    alphas = {name: (1.0, 8.0)[index % 2] for index, name in enumerate(MODULES)}
    return random_adapter(shapes, ranks, alphas, **how)


# -- there and back -------------------------------------------------------------------------------


@st.composite
def targets(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, float]]:
    names = draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True))
    return (
        {name: draw(st.integers(1, 6)) for name in names},
        {name: draw(st.floats(0.01, 64.0)) for name in names},
    )


@given(targets(), st.booleans(), st.booleans(), st.sampled_from(LAYOUTS))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_read_again_is_the_adapter_that_was_written(
    wan: torch.nn.Module,
    shapes: dict[str, tuple[int, int]],
    tmp_path: Path,
    drawn: tuple[dict[str, int], dict[str, float]],
    rslora: bool,
    dora: bool,
    layout: str,
):
    adapter = random_adapter(shapes, *drawn, rslora=rslora, dora=dora)
    write_adapter(adapter, tmp_path / "a.safetensors", layout)
    again = read_adapter(tmp_path / "a.safetensors")
    assert again.modules.keys() == adapter.modules.keys() and not again.differences
    for name, factors in adapter.modules.items():
        got = again.modules[name]
        assert torch.equal(got.down, factors.down), name
        torch.testing.assert_close(
            got.scale * got.up, factors.scale * factors.up, rtol=1e-6, atol=0
        )
        assert (got.magnitude is None) == (factors.magnitude is None)
        if factors.magnitude is not None:
            assert torch.equal(got.magnitude, factors.magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_header_tells_what_the_adapter_is(
    shapes: dict[str, tuple[int, int]], tmp_path: Path, layout: str
):
    adapter = replace(mixed(shapes), about=ABOUT)
    write_adapter(adapter, tmp_path / "zork.safetensors", layout, title="Zork")
    assert read_adapter(tmp_path / "zork.safetensors").about == ABOUT
    with safe_open(tmp_path / "zork.safetensors", framework="pt") as file:
        header = file.metadata()
    expected = {
        "modelspec.title": "Zork", "modelspec.trigger_phrase": "zork creature", "ss_network_dim": "4",
        "ss_network_alpha": "7", "ss_steps": "1200", "ss_sd_model_name": "runs/wan",
        "sora_train.base_digest": "ab" * 32, "sora_train.version": "1.2.3",
    }  # fmt: skip
    assert expected.items() <= header.items()


# -- out: diffusers' own loader -------------------------------------------------------------------


def loaded(wan: torch.nn.Module, **files: Path) -> torch.nn.Module:
    """The transformer of a pipeline after its `load_lora_weights`, by adapter name; takes set_adapters."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=adapted(wan),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    for name, file in files.items():
        pipeline.load_lora_weights(file, adapter_name=name)
    return pipeline


def merged_by_peft(pipeline: torch.nn.Module, **strengths: float) -> dict[str, Tensor]:
    """The weights of the linear layers after peft's own merge, in float64."""
    pipeline.set_adapters(list(strengths), list(strengths.values()))
    transformer = pipeline.transformer.double()
    result = {}
    for name, layer in transformer.named_modules():
        if hasattr(layer, "merge"):
            layer.merge(adapter_names=list(strengths))
            result[f"{name}.weight"] = layer.base_layer.weight.detach().clone()
            layer.unmerge()
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_loads_the_weights_that_we_mean(
    wan: torch.nn.Module,
    shapes: dict[str, tuple[int, int]],
    tmp_path: Path,
    layout: str,
    rslora: bool,
):
    adapter = mixed(shapes, rslora=rslora)
    write_adapter(adapter, tmp_path / "a.safetensors", layout)
    pipeline = loaded(wan, one=tmp_path / "a.safetensors")
    for strength in (1.0, 0.35, -0.5):
        theirs = merged_by_peft(pipeline, one=strength)
        ours = dict(adapted(wan, (adapter, strength)).named_parameters())
        assert theirs.keys() == {f"{name}.weight" for name in MODULES}
        for name, value in theirs.items():
            torch.testing.assert_close(value, ours[name], rtol=1e-6, atol=1e-6, msg=name)
            assert (ours[name] - wan.get_parameter(name)).abs().max() > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_loads_the_modules_of_image_to_video(tmp_path: Path, layout: str):
    wan = tiny_wan(image_dim=20, added_kv_proj_dim=24)
    adapter = random_adapter(shapes_of(wan), dict.fromkeys(IMAGE, 3), dict.fromkeys(IMAGE, 5.0))
    write_adapter(adapter, tmp_path / "a.safetensors", layout)
    theirs = merged_by_peft(loaded(wan, one=tmp_path / "a.safetensors"), one=0.5)
    assert theirs.keys() == {f"{name}.weight" for name in IMAGE}
    ours = adapted(wan, (adapter, 0.5))
    for name, value in theirs.items():
        torch.testing.assert_close(value, ours.get_parameter(name), rtol=1e-6, atol=1e-6, msg=name)


def test_diffusers_loads_dora_as_we_mean_it(
    wan: torch.nn.Module, shapes: dict[str, tuple[int, int]], tmp_path: Path
):
    adapter = mixed(shapes, dora=True)
    write_adapter(adapter, tmp_path / "a.safetensors", "diffusers")
    pipeline = loaded(wan, one=tmp_path / "a.safetensors")
    for strength in (1.0, 0.35):
        ours = dict(adapted(wan, (adapter, strength)).named_parameters())
        for name, value in merged_by_peft(pipeline, one=strength).items():
            torch.testing.assert_close(value, ours[name], rtol=1e-5, atol=1e-5, msg=name)


def test_several_adapters_add_up_as_in_diffusers(
    wan: torch.nn.Module, shapes: dict[str, tuple[int, int]], tmp_path: Path
):
    adapters = {
        "one": mixed(shapes),
        "two": random_adapter(shapes, {MODULES[3]: 4}, {MODULES[3]: 2.0}, seed=1),
    }
    for name, layout in zip(adapters, LAYOUTS, strict=True):
        write_adapter(adapters[name], tmp_path / f"{name}.safetensors", layout)
    pipeline = loaded(wan, **{name: tmp_path / f"{name}.safetensors" for name in adapters})
    theirs = merged_by_peft(pipeline, one=0.7, two=-1.3)
    ours = adapted(wan, (adapters["one"], 0.7), (adapters["two"], -1.3))
    for name, value in theirs.items():
        torch.testing.assert_close(value, ours.get_parameter(name), rtol=1e-6, atol=1e-6)


# -- in: what others write ------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_file_that_diffusers_saved_is_read_as_peft_merges_it(
    wan: torch.nn.Module, tmp_path: Path, how: dict[str, bool]
):
    from diffusers import WanPipeline
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "ffn.net.2"], init_lora_weights=False,
        rank_pattern={"attn2.to_q": 3}, alpha_pattern={"ffn.net.2": 1, "blocks.1.attn1.to_q": 9}, **how,
    )  # fmt: skip
    model = inject_adapter_in_model(config, adapted(wan))
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=config.to_dict(),
    )  # fmt: skip
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert adapter.about.rslora == bool(how.get("use_rslora"))
    assert len(adapter.modules) == 2 * 5
    for name, layer in model.named_modules():
        if hasattr(layer, "merge"):
            before = layer.base_layer.weight.detach().clone()
            layer.merge()
            ours = adapter.adapted(f"{name}.weight", before)
            torch.testing.assert_close(
                ours, layer.base_layer.weight.detach(), rtol=1e-12, atol=1e-12
            )
            assert (ours - before).abs().max() > 1e-3


def test_a_file_of_diffusers_without_metadata_has_alpha_of_its_rank(tmp_path: Path):
    draws = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 24, generator=draws), torch.randn(24, 3, generator=draws)
    keys = {"blocks.0.attn1.to_q.lora_A.weight": down, "blocks.0.attn1.to_q.lora_B.weight": up}
    for prefix in ("transformer.", ""):
        save_file({f"{prefix}{k}": v for k, v in keys.items()}, tmp_path / "a.safetensors")
        adapter = read_adapter(tmp_path / "a.safetensors")
        assert adapter.modules["blocks.0.attn1.to_q"].scale == 1.0
        assert (adapter.about.rank, adapter.about.alpha) == (3, 3.0)


SPELLINGS = {
    "kohya and musubi": ("lora_unet_blocks_1_self_attn_o", "lora_down", "lora_up"),
    "ComfyUI": ("diffusion_model.blocks.1.self_attn.o", "lora_down", "lora_up"),
    "ai-toolkit, diffusion-pipe": ("diffusion_model.blocks.1.self_attn.o", "lora_A", "lora_B"),
    "DiffSynth": ("blocks.1.self_attn.o", "lora_A.default", "lora_B.default"),
    "finetrainers": ("transformer.blocks.1.attn1.to_out.0", "lora_A", "lora_B"),
    "kohya with diffusers' names": ("lora_unet_blocks_1_attn1_to_out_0", "lora_down", "lora_up"),
    "older diffusers": ("transformer.blocks.1.attn1.to_out.0", "lora.down", "lora.up"),
}


@pytest.mark.parametrize("tool", SPELLINGS)
def test_every_tools_spelling_is_the_same_adapter(tmp_path: Path, tool: str):
    module, down, up = SPELLINGS[tool]
    factors = torch.arange(6.0).view(2, 3), torch.arange(8.0).view(4, 2)
    tensors = {f"{module}.{down}.weight": factors[0], f"{module}.{up}.weight": factors[1]}
    save_file(tensors | {f"{module}.alpha": torch.tensor(5.0)}, tmp_path / "a.safetensors")
    (name, got), *rest = read_adapter(tmp_path / "a.safetensors").modules.items()
    assert name == "blocks.1.attn1.to_out.0" and not rest
    # alpha / rank of a matrix product done by hand.
    weight = torch.zeros(4, 3)
    expected = torch.tensor([[3.0, 4, 5], [9, 14, 19], [15, 24, 33], [21, 34, 47]]) * 2.5
    assert torch.equal(got.merged(weight), expected)
    assert torch.equal(got.merged(weight, 2.0), 2 * expected)


def test_pefts_file_takes_alpha_from_the_config_beside_it(tmp_path: Path):
    key = "base_model.model.blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with refuses(UserError, "adapter_model.safetensors", "adapter_config.json"):
        read_adapter(tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path / "adapter_model.safetensors")
    assert adapter.modules["blocks.0.attn1.to_q"].scale == 6 / math.sqrt(4)


def test_whole_differences_of_distilled_models_are_added(tmp_path: Path):
    """Keys of LightX2V's and CausVid's files: weights of norms, biases and modulation beside the factors."""
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 3),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(4, 2),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.full((4,), 0.5),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.full((4,), 0.25),
        "diffusion_model.blocks.0.norm3.diff_b": torch.full((4,), 2.0),
        "diffusion_model.blocks.0.diff_m": torch.full((1, 6, 4), 3.0),
        "diffusion_model.head.diff_m": torch.full((1, 2, 4), 4.0),
        "diffusion_model.head.head.diff": torch.full((8, 4), 5.0),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    added = {
        "blocks.0.attn1.to_q.bias": 0.5, "blocks.0.attn1.norm_q.weight": 0.25,
        "blocks.0.norm2.bias": 2.0, "blocks.0.scale_shift_table": 3.0, "scale_shift_table": 4.0,
        "proj_out.weight": 5.0,
    }  # fmt: skip
    assert adapter.differences.keys() == added.keys()
    for name, value in added.items():
        before = torch.ones(adapter.differences[name].shape)
        assert torch.equal(adapter.adapted(name, before, 0.5), before + 0.5 * value), name
    with refuses(UserError, "diffusers", "blocks.0.scale_shift_table", "comfyui"):
        write_adapter(adapter, tmp_path / "b.safetensors", "diffusers")
    write_adapter(adapter, tmp_path / "b.safetensors", "comfyui")
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == {*tensors, "diffusion_model.blocks.0.self_attn.q.alpha"}
    assert all(torch.equal(again[key], value) for key, value in tensors.items())


def test_names_of_wans_own_code_are_diffusers_names_both_ways():
    for name in (*MODULES, *IMAGE):
        spelled = wan_name(name)
        assert spelled is not None and spelled != name
        assert our_name(spelled) == our_name(spelled.replace(".", "_")) == our_name(name) == name
    assert {wan_name(name) for name in OUTSIDE} == {
        "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
        "time_projection.1", "head.head",
    }  # fmt: skip
    assert wan_name("mask_proj") is None and our_name("blocks.0.self_attn.w") is None


# -- what is no such file -------------------------------------------------------------------------


def test_keys_that_nobody_knows_are_named_with_those_that_are(tmp_path: Path):
    tensors = {
        "lora_unet_blocks_0_self_attn_q.hada_w1_a": torch.ones(2, 3),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 3),
        "lora_unet_blocks_0_self_attn_k.lora_down.weight": torch.ones(2, 3),
        "lora_unet_blocks_0_self_attn_k.lora_up.weight": torch.ones(3, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    unknown = list(tensors)[:2]
    with refuses(
        UserError, "a.safetensors", "2 keys of 4", *unknown, "diffusers", "ComfyUI", "kohya"
    ):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "named.safetensors"])
def test_a_pickle_is_refused_unread_with_the_remedy(tmp_path: Path, name: str):
    torch.save({"lora_A": torch.ones(2)}, tmp_path / name)
    with refuses(UserError, name, "pickle", "safetensors", "weights_only=True"):
        read_adapter(tmp_path / name)


def test_a_header_of_any_length_is_no_pickle(tmp_path: Path):
    """A safetensors file begins with that length: 128 times some number reads like the first byte of a pickle."""
    file, begins = tmp_path / "a.safetensors", set[int]()
    for pad in range(0, 256, 8):
        save_file({"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 2)}, file, {"pad": "x" * pad})
        begins.add(file.read_bytes()[0])
        with refuses(UserError, "no up"):
            read_adapter(file)
    assert 0x80 in begins


def test_parts_that_do_not_fit_each_other_are_named(tmp_path: Path):
    file, key = tmp_path / "a.safetensors", "diffusion_model.blocks.0.ffn.0"
    down, up = (
        {f"{key}.lora_down.weight": torch.ones(2, 3)},
        {f"{key}.lora_up.weight": torch.ones(4, 2)},
    )

    def saved(tensors: dict[str, Tensor]) -> Path:
        save_file(tensors, file)
        return file

    with refuses(UserError, "blocks.0.ffn.net.0.proj", "down", "no up"):
        read_adapter(saved(down))
    with refuses(UserError, "blocks.0.ffn.net.0.proj", "[4, 5]", "[2, 3]", "rank"):
        read_adapter(saved(down | {f"{key}.lora_up.weight": torch.ones(4, 5)}))
    with refuses(UserError, "blocks.0.ffn.net.0.proj", "[1, 3]", "DoRA", "4 outputs"):
        read_adapter(saved(down | up | {f"{key}.dora_scale": torch.ones(1, 3)}))
    with refuses(UserError, "blocks.0.ffn.net.2", "alpha", "no factors"):
        read_adapter(saved(down | up | {"diffusion_model.blocks.0.ffn.2.alpha": torch.tensor(1.0)}))
    with refuses(UserError, f"{key}.lora_up.weight", "NaN"):
        read_adapter(saved(down | {f"{key}.lora_up.weight": torch.full((4, 2), math.nan)}))
    with refuses(UserError, "blocks.0.ffn.net.0.proj", "one adapter"):
        read_adapter(saved(down | up | {f"{key}.lora_A.weight": torch.ones(2, 3)}))
    with refuses(UserError, "no tensors"):
        read_adapter(saved({}))
    file.write_bytes(b"nothing of the kind")
    with refuses(UserError, "a.safetensors", "safetensors", "again"):
        read_adapter(file)
    with refuses(UserError, "other.safetensors", "no file"):
        read_adapter(tmp_path / "other.safetensors")


def test_a_module_that_wan_lacks_cannot_be_exported(tmp_path: Path):
    factors = Factors(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    for layout in LAYOUTS:
        with refuses(UserError, "fps_proj", layout, "adapter.targets"):
            write_adapter(AdapterWeights({"fps_proj": factors}), tmp_path / "a.safetensors", layout)
    assert not list(tmp_path.iterdir())

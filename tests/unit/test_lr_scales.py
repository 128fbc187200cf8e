"""Learning rates by pattern: a parameter's rate is that of all patterns its name matches, adapters' names too."""

import math
from fnmatch import translate
from re import match

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sentences import refuses
from torch import nn

from sora_train.config import OptimConfig
from sora_train.config.compose import compose
from sora_train.errors import ConfigError
from sora_train.models.text_to_video import TextToVideo
from sora_train.training.optim.optim import build_optimizer, decays, parameter_groups

CFG = compose(["experiment=parity_tiny"]).config
MODEL = dict(TextToVideo(CFG.model, CFG.text, seed=0).named_parameters())
PATTERNS = (
    "*", "*.bias", "transformer.*", "transformer.blocks.*.attn2.*", "transformer.blocks.[01].*", "*.to_q.weight",
    "text_encoder.*",
)  # fmt: skip


def rates(parameters: dict[str, nn.Parameter], cfg: OptimConfig) -> dict[str, float]:
    found = {
        id(value): group["lr_scale"]
        for group in parameter_groups(parameters, cfg)
        for value in group["params"]
    }
    return {name: found[id(value)] for name, value in parameters.items()}


@given(st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([0.5, 3.0, 16.0])))
def test_a_rate_is_the_product_of_all_patterns_that_match(scales: dict[str, float]) -> None:
    cfg = OptimConfig(text_lr_scale=0.25, lr_scales=scales, weight_decay=0.1)
    for name, rate in rates(MODEL, cfg).items():
        matching = [value for pattern, value in scales.items() if match(translate(pattern), name)]
        assert rate == math.prod(matching) * (0.25 if name.startswith("text_encoder.") else 1.0)
    for group in parameter_groups(MODEL, cfg):
        members = [n for n, p in MODEL.items() if any(p is other for other in group["params"])]
        assert {decays(name, MODEL[name]) for name in members} == {group["weight_decay"] > 0}


def test_lora_plus_by_the_names_that_peft_gives() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    layer = nn.Module()
    layer.blocks = nn.ModuleList(
        [nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4)})]
    )
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), layer)
    found = rates(
        {name: value for name, value in layer.named_parameters() if value.requires_grad},
        OptimConfig(lr_scales={"*.lora_B.*": 16.0}),
    )
    assert found == {
        "blocks.0.to_q.lora_A.default.weight": 1.0,
        "blocks.0.to_q.lora_B.default.weight": 16.0,
    }


def test_a_pattern_that_matches_nothing_is_told_with_names_near_it() -> None:
    with refuses(
        ConfigError,
        "optim.lr_scales",
        "blocks.0.attn3.*",
        "transformer.blocks.0.attn2.to_v.bias",
    ):
        build_optimizer(OptimConfig(lr_scales={"transformer.blocks.0.attn3.*": 2.0}), MODEL, MODEL)


def test_a_frozen_parameter_is_matched_by_nothing() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with refuses(ConfigError, "bias", "weight"):
        named = dict(layer.named_parameters())
        build_optimizer(OptimConfig(lr_scales={"bias": 2.0}), named, named)


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_factor_is_above_zero(factor: float) -> None:
    with pytest.raises(ValidationError, match="lr_scales"):
        OptimConfig(lr_scales={"*": factor})

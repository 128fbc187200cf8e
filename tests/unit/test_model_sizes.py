"""The shipped sizes are what their headers say, and those of Wan are Wan's."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from sora_train.config.compose import compose
from sora_train.config.sections.model import ModelConfig
from sora_train.config.yaml_files import find_configs
from sora_train.errors import ConfigError
from sora_train.models.flops import training_flops
from sora_train.models.memory import transformer_parameters
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.transformer.wan_layout import wan_arguments
from sora_train.tools.plan import model_sizes
from sora_train.tools.plan.command import models
from sora_train.tools.plan.model_sizes import (
    CAPTION,
    COLUMNS,
    LENGTHS,
    option_names,
    rows,
    short_count,
)

PATHS = sorted((find_configs() / "model").glob("*.yaml"))
LADDER = ["tiny", "s", "b", "l", "xl", "wan_1_3b", "wan_5b", "wan_14b", "30b"]


@cache
def config(name: str, *overrides: str) -> ModelConfig:
    return compose([f"model={name}", *overrides]).config.model


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_size_has_the_parameters_its_header_says(path: Path):
    said = re.match(r"# ([\d.]+) ([MB]) parameters", path.read_text())
    assert said, "the header begins with the count"
    cfg = config(path.stem)
    with torch.device("meta"):
        found = count(VideoDiT(cfg))
    shown = found / {"M": 1e6, "B": 1e9}[said[2]]
    assert float(said[1]) == float(f"{shown:.2g}")
    assert transformer_parameters(cfg)[0] == found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wan_1_3b", 1_418_996_800),
        ("wan_5b", 4_999_787_712),
        ("wan_14b", 14_288_491_584),
        ("wan_i2v_14b", 16_394_878_784),
        ("wan_flf2v_14b", 16_395_536_704),
    ],
)
def test_sizes_of_wan_are_those_of_diffusers(name: str, expected: int):
    from diffusers import WanTransformer3DModel

    cfg = config(name)
    with torch.device("meta"):
        ours, wan = VideoDiT(cfg), WanTransformer3DModel(**wan_arguments(cfg))
    assert count(ours) == count(wan) == expected
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in wan.named_parameters()
    }


def test_the_ladder_rises_and_heads_are_128_wide_where_we_chose():
    counts = [transformer_parameters(config(name))[0] for name in LADDER]
    assert counts == sorted(counts) and counts[0] < 1.1e6 and counts[-1] > 28e9
    assert {config(name).head_dim for name in LADDER} == {128}


def test_models_are_listed_smallest_first_with_operations_for_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    listed = rows([])
    found = {cells[0]: dict(zip(COLUMNS, cells, strict=True)) for _, cells in listed}
    monkeypatch.setattr(model_sizes, "rows", lambda *given: listed)
    models()
    table = capsys.readouterr().out
    places = [re.search(rf"^{name} ", table, re.M).start() for name in LADDER]
    assert places == sorted(places)
    assert re.search(r"^wan_1_3b +1\.4 B +30 +1536 +12 x 128 +8960 +16 ", table, re.M)
    assert len(found) == len(PATHS)
    # Six operations a parameter and token, and attention on top that grows with the clip.
    one, last = (float(found["wan_14b"][COLUMNS[i]]) for i in (7, -1))
    assert 6 * 14.2 > one > 6 * 12.5 and last > 2 * one
    for place, length in enumerate(LENGTHS, start=len(COLUMNS) - len(LENGTHS)):
        flops = training_flops(config("wan_14b"), None, length, 1, CAPTION) / length
        assert found["wan_14b"][COLUMNS[place]] == f"{flops / 1e9:.3g}"


def test_listing_takes_overrides_and_sizes_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "# mine\nnum_layers: 1\nin_channels: 36\nout_channels: 16\n"
    )
    assert set(option_names(tmp_path)) == {"mine", *(path.stem for path in PATHS)}
    monkeypatch.setattr(model_sizes, "option_names", lambda config_dir: ["mine", "s"])
    found = {cells[0]: cells for _, cells in rows(["model.ffn_dim=99"], tmp_path)}
    assert found["mine"][2] == "1" and found["mine"][6] == "36 -> 16"
    assert {cells[5] for cells in found.values()} == {"99"}
    with pytest.raises(ConfigError, match=r"model\.ffn_dim"):
        rows(["model.ffn_dim=none"], tmp_path)


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (1.2e6, "1.2 M"), (29.3e9, "29 B"), (1500, "1.5 k")]
)
def test_counts_are_short(number: float, text: str):
    assert short_count(number) == text

"""The transformer's benchmark: contestants share weights and clip, and what cannot be measured is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sentences import refuses
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import model as bench
from sora_train.errors import ConfigError, UserError
from sora_train.models.transformer.wan_layout import wan_arguments

TOY = [
    "model.num_layers=1", "model.num_heads=2", "model.head_dim=16", "model.ffn_dim=32", "model.text_dim=8",
]  # fmt: skip


def request(**changes: object) -> bench.ModelBenchRequest:
    return bench.ModelBenchRequest(
        bench.model_of(TOY), **{"tokens": 24, "caption": 5, "device": "cpu", **changes}
    )


def test_a_toy_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [*TOY, "--tokens", "24", "--caption", "5", "--device", "cpu", "--repeats", "2"]
    assert bench.main([*arguments, "--dtype", "float32,bfloat16", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "model.json").read_text())
    assert set(found["measured"]) >= {
        f"{who}, eager, {dtype}"
        for who in ("ours", "diffusers", bench.FLOOR)
        for dtype in bench.DTYPES
    }
    assert all(value["n"] == 2 and value["median"] > 0 for value in found["measured"].values())
    facts = found["facts"]
    ours, theirs = (
        found["measured"][f"{who}, eager, float32"]["median"] for who in ("ours", "diffusers")
    )
    assert facts["ours / diffusers, eager, float32"] > 0 and ours > 0 and theirs > 0
    assert facts["share of ours that is not kernels, eager, float32"] < 1
    assert facts["attention of ours, float32"] == "sdpa (chosen by auto) in float32"
    assert "| ours, eager, float32 |" in capsys.readouterr().out


def test_contestants_compute_the_same():
    made = request()
    batch = bench.batch_of(made, torch.float32, torch.device("cpu"))
    model = bench.VideoDiT(made.model)
    model.load_state_dict(bench.first_weights(made.model))
    wan = bench.WanTransformer3DModel(**wan_arguments(made.model))
    wan.load_state_dict(bench.first_weights(made.model))
    with torch.no_grad():
        ours = model(batch.latents, batch.t, batch.captions)
        theirs = wan(batch.latents, batch.t[:, 0] * 1000, batch.captions, return_dict=False)[0]
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_peer_keeps_in_float32_what_its_users_get_so():
    made = request()
    weights = bench.first_weights(made.model)
    wan = bench.diffusers_model(made.model, weights, torch.bfloat16)
    dtypes = {name: value.dtype for name, value in wan.named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == dtypes["blocks.0.norm2.weight"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert torch.equal(wan.proj_out.weight, weights["proj_out.weight"].bfloat16()) and wan.training


def test_the_floor_multiplies_what_the_model_multiplies():
    """Counted by torch, forward and backward: products alone, as it does not see fused attention on a CPU."""
    made = replace(request(), model=bench.model_of([*TOY, "model.attention=gemm"]))
    found = []
    batch = bench.batch_of(made, torch.float32, torch.device("cpu"))
    for name, step in bench.contestants(
        made, torch.float32, "eager", torch.device("cpu"), batch
    ).items():
        if name in ("ours", bench.FLOOR):
            with FlopCounterMode(display=False) as counter:
                step()
            found.append(counter.get_total_flops())
    # The noise level's layers and the gradient of latents and captions, which nobody asks for, differ.
    assert found[1] == pytest.approx(found[0], rel=0.2)


def test_turns_are_taken_and_warm_up_is_not_counted():
    calls: list[str] = []
    seconds = bench.take_turns({n: lambda n=n: calls.append(n) for n in "ab"}, warmup=1, repeats=2)
    assert calls == list("ababab") and {len(taken) for taken in seconds.values()} == {2}


@pytest.mark.parametrize(
    ("tokens", "grid"), [(4096, (4, 32, 32)), (24, (4, 2, 3)), (7, (1, 1, 7)), (1, (1, 1, 1))]
)
def test_a_clip_has_the_tokens_asked_for(tokens: int, grid: tuple[int, int, int]):
    assert bench.grid_of(tokens) == grid


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--dtype", "float8"], ("--dtype float8", "float32, bfloat16")),
        (["--modes", "fast"], ("--modes fast", "eager, dynamic, static")),
        (["--repeats", "0"], ("--repeats 0",)),
        (["--device", "cpu", "model.attention=cudnn"], ("needs a CUDA device",)),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], facts: tuple[str, ...], tmp_path: Path
):
    with refuses(UserError, *facts):
        bench.main([*TOY, *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_wrong_override_is_named():
    with pytest.raises(ConfigError, match=r"model\.head_dims"):
        bench.model_of(["model.head_dims=3"])


def test_extras_that_wan_lacks_are_left_out():
    cfg = bench.model_of(["model=s", "model.num_layers=2"])
    assert not cfg.mask_channel and cfg.num_layers == 2 and cfg.head_dim == 128

"""What a ZeRO engine cannot do, or a user's DeepSpeed file contradicts, is told by name before anything is loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sentences import refuses, says

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.errors import ConfigError, Fault
from sora_train.parallel.deepspeed import engine as deepspeed
from sora_train.parallel.deepspeed.settings import deepspeed_config
from sora_train.parallel.degrees import resolve_degrees
from sora_train.parallel.engine import check_engine, require_precise
from sora_train.parallel.protocol import resolve_param_dtype
from sora_train.training.trainer import Trainer

CPU = torch.device("cpu")


def config(*overrides: str) -> Config:
    return compose(["experiment=parity_tiny", *overrides]).config


def check(*overrides: str, ranks: int = 2) -> None:
    cfg = config(*overrides)
    dtype = resolve_param_dtype(cfg.parallel.param_dtype, CPU)
    check_engine(cfg, resolve_degrees(cfg.parallel, ranks), dtype)


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["parallel=zero2", "parallel.dp_replicate=2", "parallel.dp_shard=1"],
         ("parallel.engine=zero2", "parallel.dp_replicate=2", "parallel.engine=fsdp")),
        (["parallel=zero1", "parallel.param_dtype=float64"], ("float32", "param_dtype=float64", "engine=fsdp")),
        (["parallel=zero2", "parallel.offload_params=true"], ("offload_params=true", "engine=zero2", "engine=zero3")),
        (["parallel=fsdp", "parallel.offload_params=true"], ("offload_params=true", "engine=fsdp", "engine=zero3")),
        (["parallel=fsdp", "parallel.deepspeed_json=ds.json"], ("deepspeed_json=ds.json", "engine=fsdp", "zero1")),
        (["parallel=zero3", "model.compile=dynamic"], ("zero3", "model.compile=dynamic", "zero1 or zero2")),
        (["parallel=zero1", "parallel.accumulate=sharded"], ("accumulate=sharded", "engine=zero1", "engine=zero2")),
        (["parallel=zero2", "task=vae"], ("engine=zero2", "task=vae", "image", "engine=fsdp or zero1")),
        (["parallel=zero3", "task=vae"], ("engine=zero3", "task=vae")),
        (["parallel=zero3", "parallel.deepspeed_json=nowhere.json"], ("nowhere.json", "No such file")),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_do_is_told_with_those_that_can(
    overrides: list[str], facts: tuple[str, ...]
) -> None:
    with refuses(ConfigError, *facts):
        check(*overrides)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_what_it_can_do_passes(engine: str) -> None:
    check(f"parallel={engine}")
    check(f"parallel={engine}", "parallel.param_dtype=bfloat16", "parallel.offload_optimizer=true")


def test_a_missing_package_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "find_spec", lambda _: None)
    with refuses(ConfigError, "zero2", "pip install 'sora_train[deepspeed]'"):
        Trainer(config("parallel=zero2", f"run.dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_fsdp_does_not_import_it() -> None:
    code = "import sys, sora_train.training.trainer; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ZERO3 = {"stage": 3}


@pytest.mark.parametrize(
    ("theirs", "facts"),
    [
        ({"zero_optimization": {"stage": 2}}, ("zero_optimization.stage=2", "parallel.engine=zero3")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping=1.0", "optim.grad_clip=0.5")),
        ({"gradient_accumulation_steps": 7}, ("gradient_accumulation_steps=7", "train.micro_batches=2")),
        ({"train_micro_batch_size_per_gpu": 3}, ("train_micro_batch_size_per_gpu=3", "data.micro_batch=4")),
        ({"train_batch_size": 3}, ("train_batch_size=3", "train.micro_batches=2")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled=true", "parallel.param_dtype=float32")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled=true", "parallel.param_dtype=float32")),
        ({"optimizer": {"type": "Lamb"}}, ("optimizer={\"type\": \"Lamb\"}", "optim.name=adamw")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler={\"type\": \"WarmupLR\"}", "optim.decay=")),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
         ("offload_optimizer.device=cpu", "parallel.offload_optimizer=false")),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}},
         ("offload_param.device=nvme", "parallel.offload_params=false")),
        ({"communication_data_type": "bf16"}, ("communication_data_type=bf16", "fp32")),
        ({"zero_optimization": {"zero_hpz_partition_size": 4}}, ("zero_hpz_partition_size=4", "remove")),
        ({"zero_allow_untested_optimizer": False}, ("zero_allow_untested_optimizer=false", "true")),
        ({"no_such_key": 1}, ("no_such_key=1", "remove")),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_the_config_is_told_with_both_values(
    tmp_path: Path, theirs: dict[str, Any], facts: tuple[str, ...]
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(theirs))
    with pytest.raises(ConfigError) as error:
        check(
            "parallel=zero3", "optim=adamw", "optim.grad_clip=0.5", f"parallel.deepspeed_json={file}",
            "parallel.param_dtype=float32", ranks=1,
        )  # fmt: skip
    says(error.value, *facts)
    assert str(file) in str(error.value)


def test_a_file_that_agrees_is_merged(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    theirs = {
        "gradient_clipping": 0.5,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 12, "overlap_comm": True},
    }
    file.write_text(json.dumps(theirs))
    cfg = config("parallel=zero3", "optim.grad_clip=0.5", f"parallel.deepspeed_json={file}")
    degrees = resolve_degrees(cfg.parallel, 2)
    told = deepspeed_config(cfg, degrees, torch.float32, pin_memory=False)
    assert told["zero_optimization"]["reduce_bucket_size"] == 12
    assert told["zero_optimization"]["overlap_comm"] is True
    # Clipping stays ours: by the norm that the run has seen.
    assert told["gradient_clipping"] == 0.0 and told["bf16"] == {"enabled": False}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_no_json_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with refuses(ConfigError, "ds.json", "no JSON"):
        check("parallel=zero1", f"parallel.deepspeed_json={tmp_path / 'ds.json'}")


class Narrow:
    def model_state(self) -> dict[str, torch.Tensor]:
        return {"a": torch.zeros(1)}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return {"a.exp_avg": torch.zeros(1, dtype=torch.bfloat16)}


def test_state_of_less_than_float32_is_a_fault() -> None:
    with refuses(Fault, "a.exp_avg", "torch.bfloat16"):
        require_precise(Narrow())

"""What DeepSpeed is told: our config in its words, and a user's JSON merged in where it does not contradict us.

Nothing here imports DeepSpeed, so that a wrong file is told before anything is loaded.
"""

import json
from pathlib import Path
from typing import Any

import torch

from sora_train.base.text import NotText, read_text
from sora_train.config import Config
from sora_train.errors import ConfigError
from sora_train.parallel.degrees import Degrees

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
ZERO = "zero_optimization"
OURS = {
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "train_batch_size": "train.micro_batches",
    "gradient_accumulation_steps": "train.micro_batches",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim.name",
    "scheduler": "optim.decay",
    "bf16.enabled": "parallel.param_dtype",
    "fp16.enabled": "parallel.param_dtype",
    f"{ZERO}.stage": "parallel.engine",
    f"{ZERO}.offload_optimizer.device": "parallel.offload_optimizer",
    f"{ZERO}.offload_param.device": "parallel.offload_params",
}
"""DeepSpeed's keys that say what a key of ours says."""
FREE = {
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    f"{ZERO}.allgather_bucket_size",
    f"{ZERO}.allgather_partitions",
    f"{ZERO}.reduce_bucket_size",
    f"{ZERO}.reduce_scatter",
    f"{ZERO}.overlap_comm",
    f"{ZERO}.contiguous_gradients",
    f"{ZERO}.sub_group_size",
    f"{ZERO}.stage3_max_live_parameters",
    f"{ZERO}.stage3_max_reuse_distance",
    f"{ZERO}.stage3_prefetch_bucket_size",
    f"{ZERO}.stage3_param_persistence_threshold",
    f"{ZERO}.stage3_model_persistence_threshold",
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
    f"{ZERO}.offload_optimizer.pin_memory",
    f"{ZERO}.offload_optimizer.buffer_count",
    f"{ZERO}.offload_param.pin_memory",
    f"{ZERO}.offload_param.buffer_count",
    f"{ZERO}.offload_param.buffer_size",
    f"{ZERO}.offload_param.max_in_cpu",
}
"""Keys, or sections as a whole, that change how fast it goes and not what is computed."""


def check_zero(cfg: Config, degrees: Degrees, param_dtype: torch.dtype) -> None:
    """Raises ConfigError where a ZeRO engine cannot do what is asked; says which can."""
    engine = cfg.parallel.engine
    if degrees.dp_replicate > 1:
        raise ConfigError(
            f"parallel.engine={engine} splits over all ranks and keeps no replicas, and parallel.dp_replicate="
            f"{degrees.dp_replicate} asks for them; set parallel.dp_replicate=1 and parallel.dp_shard=-1, or "
            "parallel.engine=fsdp, which has DDP and HSDP"
        )
    if param_dtype == torch.float64:
        raise ConfigError(
            f"parallel.engine={engine} keeps its masters in float32, and parallel.param_dtype=float64 asks for more; "
            "set parallel.engine=fsdp, which computes in float64, or parallel.param_dtype=float32"
        )
    if cfg.parallel.accumulate == "sharded" and engine == "zero1":
        raise ConfigError(
            "parallel.accumulate=sharded and parallel.engine=zero1, which reduces gradients once a step; set "
            "parallel.engine=zero2, which reduces them after each micro-batch, or fsdp"
        )
    if cfg.parallel.offload_params and engine != "zero3":
        raise ConfigError(
            f"parallel.offload_params=true and parallel.engine={engine}, which keeps weights whole on each device; set "
            "parallel.engine=zero3, the one that can"
        )
    if cfg.model.expert == "both":
        raise ConfigError(
            f"parallel.engine={engine} steps all weights together, and with model.expert=both one of the two experts "
            "rests in each step; set parallel.engine=fsdp, or train model.expert=high and model.expert=low apart"
        )
    if engine != "zero1" and cfg.task == "vae":
        raise ConfigError(
            f"parallel.engine={engine} adds up gradients of all ranks in the order in which they come, and those of "
            "task=vae come in another order for an image than for a clip; set parallel.engine=fsdp or zero1"
        )
    if engine == "zero3" and cfg.model.compile not in ("off", "auto"):
        raise ConfigError(
            f"parallel.engine=zero3 gathers weights inside a block, so model.compile={cfg.model.compile} cannot make "
            "one graph of it; set model.compile=off, or parallel.engine=fsdp, zero1 or zero2, which compile"
        )
    deepspeed_config(cfg, degrees, param_dtype, pin_memory=False)


def deepspeed_config(
    cfg: Config, degrees: Degrees, param_dtype: torch.dtype, *, pin_memory: bool
) -> dict[str, Any]:
    """The dictionary given to DeepSpeed.

    Raises:
        ConfigError: the file of `parallel.deepspeed_json` is none, or contradicts our config.
    """
    parts = degrees.dp_shard * degrees.dp_replicate
    zero: dict[str, Any] = {
        "stage": STAGES[cfg.parallel.engine],
        "overlap_comm": False,
    }
    if cfg.parallel.engine != "zero3" and not cfg.parallel.offload_optimizer:
        # The norm is known before the step; DeepSpeed lets itself be told so here and not in the other cases.
        zero["compute_grad_norm"] = False
    if cfg.parallel.engine == "zero3" and cfg.parallel.activation_checkpointing == "selective":
        # DeepSpeed's own linear layer adds the bias in place, to a product that the checkpoint keeps without it.
        zero["memory_efficient_linear"] = False
    if cfg.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    if cfg.parallel.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin_memory}
    ours: dict[str, Any] = {
        # Clips differ in number, and the loss comes weighted: what DeepSpeed is told of sizes only has to fit itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": -(-cfg.train.micro_batches // parts),
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": param_dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        ZERO: zero,
    }
    if cfg.parallel.deepspeed_json:
        theirs = _read(cfg.parallel.deepspeed_json)
        _require_ours(cfg, theirs, ours, param_dtype)
        _merge(ours, theirs)
    return ours


def _read(path: str) -> dict[str, Any]:
    remedy = "name a DeepSpeed configuration file, or leave parallel.deepspeed_json empty"
    try:
        found = json.loads(read_text(Path(path).expanduser()))
    except NotText as error:
        raise ConfigError(f"parallel.deepspeed_json={path}: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"parallel.deepspeed_json={path} cannot be read: {error.strerror}; {remedy}"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"parallel.deepspeed_json={path} is no JSON: {error}; {remedy}"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"parallel.deepspeed_json={path} holds no JSON object; {remedy}")
    return found


def _leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; a section that is told of as a whole, in OURS or FREE, is one value."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in OURS and name not in FREE:
            found |= _leaves(value, f"{name}.")
        else:
            found[name] = value
    return found


def _require_ours(
    cfg: Config, theirs: dict[str, Any], ours: dict[str, Any], param_dtype: torch.dtype
) -> None:
    """Raises ConfigError for the first key that contradicts our config or that is not merged."""
    said = _said(cfg, ours, param_dtype)
    path = cfg.parallel.deepspeed_json
    for key, value in _leaves(theirs).items():
        if value == "auto" or key in FREE:
            continue
        if key in OURS:
            meant, told = said[key]
            if value != meant:
                raise ConfigError(
                    f"{path} has {key}={_shown(value)}, and {OURS[key]}={told}; remove {key} from the file, "
                    f"{OURS[key]} alone decides it"
                )
            continue
        own = _leaves(ours).get(key)
        if own is None or own != value:
            instead = (
                "" if own is None else f" instead of {_shown(own)}, which every engine here has"
            )
            raise ConfigError(
                f"parallel.deepspeed_json={path} has {key}={_shown(value)}{instead}; remove it: what can be set there "
                f"is {', '.join(sorted(FREE))}"
            )


def _said(
    cfg: Config, ours: dict[str, Any], param_dtype: torch.dtype
) -> dict[str, tuple[Any, object]]:
    """DeepSpeed's key -> the value that agrees with our config, and the value of our own key."""
    parallel, optim = cfg.parallel, cfg.optim
    clips, steps = cfg.data.micro_batch, ours["gradient_accumulation_steps"]
    return {
        "train_micro_batch_size_per_gpu": (clips, clips),
        "train_batch_size": (cfg.train.micro_batches * clips, cfg.train.micro_batches),
        "gradient_accumulation_steps": (steps, cfg.train.micro_batches),
        "gradient_clipping": (optim.grad_clip, optim.grad_clip),
        # A section of theirs is never the same as a name of ours.
        "optimizer": (None, optim.name),
        "scheduler": (None, optim.decay),
        "bf16.enabled": (param_dtype == torch.bfloat16, parallel.param_dtype),
        "fp16.enabled": (False, parallel.param_dtype),
        f"{ZERO}.stage": (STAGES[parallel.engine], parallel.engine),
        f"{ZERO}.offload_optimizer.device": (
            "cpu" if parallel.offload_optimizer else "none",
            str(parallel.offload_optimizer).lower(),
        ),
        f"{ZERO}.offload_param.device": (
            "cpu" if parallel.offload_params else "none",
            str(parallel.offload_params).lower(),
        ),
    }


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _merge(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Take over what is FREE; the rest was seen to say what ours says."""
    for key, value in _leaves(theirs).items():
        if key not in FREE or value == "auto":
            continue
        *path, last = key.split(".")
        section = ours
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value

"""A run that starts from another run's weights: `init.run`, for the next stage or for imported ones.

Step and data begin anew, the optimizer's moments too unless `init.optimizer` takes them over.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import split_step, weights_digest
from sora_train.checkpoint.meta import CheckpointMeta, read_meta
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.config import Config
from sora_train.config.resumption import differences
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import ConfigError, UserError
from sora_train.models.adapters.factors import AdapterWeights
from sora_train.models.adapters.inject import (
    DOWN,
    MAGNITUDE,
    UP,
    adapter_weights,
    base_weights,
    first_values,
    lengths_of_base,
)
from sora_train.models.quantised.codes import dequantise, quantise
from sora_train.models.quantised.linear import QuantisedLinear, quantised_layers
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.parallel.materialise import fill
from sora_train.parallel.shards import local, placed_as
from sora_train.sampling.adapters import open_adapter

EXTRAS = ("transformer.mask_proj.weight", "transformer.fps_proj.weight")
"""What `model.mask_channel` and `model.fps_embed` add."""
PREFIX = {"ema": "ema.", "live": "model."}
"""What names of tensors begin with in a checkpoint, by `init.weights`."""


def require_fitting(
    cfg: Config, model: nn.Module, vae: VideoVAE, checkpoint: checkpoints.Checkpoint
) -> None:
    """Raises UserError where `init.run` is no run, its model is another by name and shape, or it was trained on
    another VAE's latents."""
    meta = read_meta(checkpoint)
    if meta.config.get("adapter", {}).get("rank"):
        raise UserError(
            f"init.run={cfg.init.run} trained an adapter, and its checkpoint holds no whole model; make one of it and "
            f"its base with `sora ckpt merge`, or set adapter.init={cfg.init.run} and init.run="
            f"{meta.config['init']['run']} to train the adapter on"
        )
    if meta.task != cfg.task:
        raise UserError(f"init.run={cfg.init.run} trained a {meta.task}, this run a {cfg.task}")
    if meta.spec and meta.spec["vae_digest"] != vae.digest():
        raise UserError(
            f"init.run={cfg.init.run} was trained on the latents of another VAE than vae.path={cfg.vae.path!r}; give "
            "the vae section of that run's config.yaml"
        )
    _require_expert(cfg, meta)
    prefix = PREFIX[cfg.init.weights]
    tensors = {f"{prefix}{name}": value for name, value in base_weights(model).items()}
    checkpoints.require_part(checkpoint, without_new_extras(checkpoint, tensors), prefix)


def _require_expert(cfg: Config, meta: CheckpointMeta) -> None:
    """Raises UserError where the run's weights are another expert's. One transformer for all noise levels may become
    an expert."""
    held = (meta.spec or {}).get("expert", "")
    if held == cfg.model.expert or (not held and cfg.model.expert != "both"):
        return
    what = {"": "one transformer", "both": "both experts"}.get(
        held, f"the {held}-noise expert alone"
    )
    wanted = cfg.model.expert or "both"
    raise UserError(
        f"init.run={cfg.init.run} holds {what}, and model.expert={cfg.model.expert or repr('')}; import what this run "
        f"trains with `sora ckpt import PIPELINE --expert {wanted}`, or set model.expert={held or repr('')}"
    )


def take_weights(
    cfg: Config, checkpoint: checkpoints.Checkpoint, parameters: Mapping[str, Tensor]
) -> None:
    """Fill parameters, by name and sharded as they lie, with those of `init.run`."""
    prefix = PREFIX[cfg.init.weights]
    tensors = {f"{prefix}{name}": value for name, value in parameters.items()}
    held = without_new_extras(checkpoint, tensors)
    checkpoints.load_part(checkpoint, held, prefix)
    with torch.no_grad():
        for name in tensors.keys() - held.keys():
            tensors[name].zero_()


def without_new_extras(
    checkpoint: checkpoints.Checkpoint, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors less the extras that this run adds to the model of `init.run`: they begin at 0, where the model
    computes what it did."""
    stored = StoredTensors(checkpoint).shapes
    return {
        name: value
        for name, value in tensors.items()
        if name in stored or not name.endswith(EXTRAS)
    }


@torch.no_grad()
def begin_adapter(
    cfg: Config, base: checkpoints.Checkpoint, model: nn.Module, weights: Mapping[str, Tensor]
) -> None:
    """Fill the frozen base that `model` holds from `base`, and the adapter's own `weights` with their first values.

    Both may be sharded as they lie, for DoRA by rows.
    """
    layers = quantised_layers(model)
    coded = {f"{name}.{part}" for name in layers for part in ("codes", "scales")}
    plain = {name: value for name, value in base_weights(model).items() if name not in coded}
    if not layers:
        take_weights(cfg, base, {name: value.detach() for name, value in plain.items()})
    else:
        checkpoints.verify(base)
        take_some(cfg, base, {name: value.detach() for name, value in plain.items()})
        take_codes(cfg, base, layers)
    lengths = lengths_of_base(model)
    factors = {name: value for name, value in weights.items() if name not in lengths}
    fill(factors, first_values(model, cfg.seed))
    for name, layer in lengths.items():
        length = local(weights[name])
        length.copy_(own_rows(layer, length.dtype).norm(dim=1))


def take_some(
    cfg: Config, checkpoint: checkpoints.Checkpoint, parameters: Mapping[str, Tensor]
) -> None:
    """`take_weights` for some of them, where the checkpoint was compared with the whole model before."""
    prefix = PREFIX[cfg.init.weights]
    checkpoints.load_some(
        checkpoint, {f"{prefix}{name}": value for name, value in parameters.items()}
    )


def take_codes(
    cfg: Config, base: checkpoints.Checkpoint, layers: Mapping[str, QuantisedLinear]
) -> None:
    """Fill layers of codes, by name, from `base`; each rank reads its own rows, those of one block at a time."""
    for _, group in groupby(layers.items(), key=lambda item: item[0].split(".")[:3]):
        block = dict(group)
        rows = {
            name: torch.empty(len(codes), layer.in_features, device=codes.device)
            for name, layer in block.items()
            for codes in [local(layer.codes)]
        }
        placed = {
            f"{name}.weight": placed_as(rows[name], layer.codes) for name, layer in block.items()
        }
        take_some(cfg, base, placed)
        for name, layer in block.items():
            codes, scales = quantise(rows[name], layer.kind)
            local(layer.codes).copy_(codes)
            local(layer.scales).copy_(scales)


def own_rows(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """This rank's rows of a layer's weight, widened where they are codes."""
    if isinstance(layer, QuantisedLinear):
        return dequantise(local(layer.codes), local(layer.scales), layer.kind, dtype)
    weight: Tensor = layer.weight
    return local(weight).to(dtype)


def require_same_base(cfg: Config, digest: str, resumed: CheckpointMeta | None) -> None:
    """Raises UserError where an adapter would go on beside another base than its own."""
    before = resumed.digests.get("base", "") if resumed else ""
    if before and before != digest:
        raise UserError(
            f"the adapter in run.dir={cfg.run.dir} was trained on other weights than init.run={cfg.init.run} now holds "
            f"(digest {before[:12]}, now {digest[:12]}); give the folder and the step of its base, FOLDER@STEP"
        )


def take_moments(checkpoint: checkpoints.Checkpoint, moments: dict[str, Tensor]) -> None:
    """Fill the optimizer's state, by parameter name, with that of `init.run`; as strict as the weights."""
    checkpoints.load_part(
        checkpoint, {f"optim.{name}": value for name, value in moments.items()}, "optim."
    )


def source_of(cfg: Config) -> checkpoints.Checkpoint:
    """The checkpoint that `init.run` names. Raises UserError where there is none."""
    return checkpoints.find(*split_step(cfg.init.run))


def refuse_imported(run_dir: str, resumed: CheckpointMeta | None) -> None:
    """Raises UserError when a run would go on in a folder of imported weights, to which no data belong."""
    if resumed is not None and resumed.imported_from:
        raise UserError(
            f"run.dir={run_dir} holds imported weights and nothing of training to go on from; set "
            f"init.run={run_dir} and another run.dir"
        )


def require_same_spec(now: DiffusionSpec | None, resumed: CheckpointMeta) -> None:
    """Raises ConfigError where the diffusion spec, digests of VAE and text encoder included, is another."""
    before = json.loads(
        json.dumps(resumed.spec and DiffusionSpec.from_dict(resumed.spec).to_dict())
    )
    spec = json.loads(json.dumps(now.to_dict() if now else None))
    different = differences(before, spec, "spec")
    if different:
        sentences = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in different[:5])
        raise ConfigError(
            f"the checkpoint of step {resumed.step} was trained with another diffusion spec: {sentences}; give the VAE "
            "and the text encoder of that run, or another run.dir"
        )


def adapter_start(
    cfg: Config, base: checkpoints.Checkpoint, model: nn.Module
) -> AdapterWeights | None:
    """The adapter of `adapter.init`, which is trained on; None without one.

    Raises UserError where it was trained on another base, or has other modules, ranks or kind than this run's.
    """
    if not cfg.adapter.init:
        return None
    opened, where = open_adapter(cfg.adapter.init), f"adapter.init={cfg.adapter.init}"
    start, digest = opened.weights, weights_digest(base, cfg.init.weights)
    if opened.strength != 1.0:
        raise UserError(f"{where} is trained on as it is; leave :{opened.strength:g} out")
    if start.about.base_digest not in ("", digest):
        raise UserError(
            f"{where} was trained on another base, {start.about.base or 'without a name'} (digest "
            f"{start.about.base_digest[:12]}), than init.run={cfg.init.run} holds (digest {digest[:12]}); give its own"
        )
    given = {name: tuple(value.shape) for name, value in _named_factors(start, 1.0)}
    for name, parameter in adapter_weights(model).items():
        shape = given.pop(name, None)
        if shape != tuple(parameter.shape):
            held = "nothing" if shape is None else f"{list(shape)}"
            raise UserError(
                f"{where} holds {held} for {name}, and this run trains {list(parameter.shape)}; set adapter.rank, "
                "adapter.targets and adapter.dora as it was trained"
            )
    if given or start.differences:
        extra = next(iter([*given, *start.differences]))
        raise UserError(
            f"{where} holds {extra}, which this run would not train; set adapter.targets and adapter.dora as it was "
            "trained, or merge it into the base (`sora ckpt merge`)"
        )
    return start


@torch.no_grad()
def take_adapter(cfg: Config, start: AdapterWeights | None, weights: Mapping[str, Tensor]) -> None:
    """Fill the adapter's own `weights`, sharded as they lie, with those of `adapter_start`, if there is one."""
    if start is not None:
        fill(weights, _named_factors(start, cfg.adapter.scale))


def _named_factors(start: AdapterWeights, scale: float) -> Iterator[tuple[str, Tensor]]:
    """By the names of parameters; what comes out of each product is as large under `scale` as it was under its own."""
    for name, factors in start.modules.items():
        yield f"transformer.{name}.{DOWN}", factors.down
        yield f"transformer.{name}.{UP}", factors.up * (factors.scale / scale)
        if factors.magnitude is not None:
            yield f"transformer.{name}.{MAGNITUDE}", factors.magnitude

"""A run that starts from another run's weights: `init.run`, for the next stage or for imported ones.

Step and data begin anew, the optimizer's moments too unless `init.optimizer` takes them over.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import split_step
from sora_train.checkpoint.meta import CheckpointMeta, read_meta
from sora_train.config import Config
from sora_train.config.resumption import differences
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import ConfigError, UserError
from sora_train.models.adapters.inject import base_weights, first_values, lengths_of_base
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.parallel.materialise import fill
from sora_train.parallel.shards import local

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
    prefix = PREFIX[cfg.init.weights]
    tensors = {f"{prefix}{name}": value for name, value in base_weights(model).items()}
    checkpoints.require_part(checkpoint, tensors, prefix)


def take_weights(
    cfg: Config, checkpoint: checkpoints.Checkpoint, parameters: Mapping[str, Tensor]
) -> None:
    """Fill parameters, by name and sharded as they lie, with those of `init.run`."""
    prefix = PREFIX[cfg.init.weights]
    tensors = {f"{prefix}{name}": value for name, value in parameters.items()}
    checkpoints.load_part(checkpoint, tensors, prefix)


@torch.no_grad()
def begin_adapter(
    cfg: Config, base: checkpoints.Checkpoint, model: nn.Module, weights: Mapping[str, Tensor]
) -> None:
    """Fill the frozen base that `model` holds from `base`, and the adapter's own `weights` with their first values.

    Both may be sharded as they lie, for DoRA by rows.
    """
    take_weights(cfg, base, {name: value.detach() for name, value in base_weights(model).items()})
    lengths = lengths_of_base(model)
    factors = {name: value for name, value in weights.items() if name not in lengths}
    fill(factors, first_values(model, cfg.seed))
    for name, weight in lengths.items():
        length = local(weights[name])
        length.copy_(local(weight).to(length.dtype).norm(dim=1))


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

"""A run that starts from another run's weights: `init.run`, for the next stage or for imported ones.

Step and data begin anew, the optimizer's moments too unless `init.optimizer` takes them over.
"""

import json

from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import split_step
from sora_train.checkpoint.meta import CheckpointMeta, read_meta
from sora_train.config import Config
from sora_train.config.resumption import differences
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import ConfigError, UserError
from sora_train.models.vae.autoencoder import VideoVAE

PREFIX = {"ema": "ema.", "live": "model."}
"""What names of tensors begin with in a checkpoint, by `init.weights`."""


def require_fitting(
    cfg: Config, model: nn.Module, vae: VideoVAE, checkpoint: checkpoints.Checkpoint
) -> None:
    """Raises UserError where `init.run` is no run, its model is another by name and shape, or it was trained on
    another VAE's latents."""
    meta = read_meta(checkpoint)
    if meta.task != cfg.task:
        raise UserError(f"init.run={cfg.init.run} trained a {meta.task}, this run a {cfg.task}")
    if meta.spec and meta.spec["vae_digest"] != vae.digest():
        raise UserError(
            f"init.run={cfg.init.run} was trained on the latents of another VAE than vae.path={cfg.vae.path!r}; give "
            "the vae section of that run's config.yaml"
        )
    prefix = PREFIX[cfg.init.weights]
    tensors = {f"{prefix}{name}": value for name, value in model.named_parameters()}
    checkpoints.require_part(checkpoint, tensors, prefix)


def take_weights(
    cfg: Config, checkpoint: checkpoints.Checkpoint, parameters: dict[str, Tensor]
) -> None:
    """Fill parameters, by name and sharded as they lie, with those of `init.run`."""
    prefix = PREFIX[cfg.init.weights]
    tensors = {f"{prefix}{name}": value for name, value in parameters.items()}
    checkpoints.load_part(checkpoint, tensors, prefix)


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
    before = json.loads(json.dumps(resumed.spec))
    spec = json.loads(json.dumps(now.to_dict() if now else None))
    different = differences(before, spec, "spec")
    if different:
        sentences = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in different[:5])
        raise ConfigError(
            f"the checkpoint of step {resumed.step} was trained with another diffusion spec: {sentences}; give the VAE "
            "and the text encoder of that run, or another run.dir"
        )

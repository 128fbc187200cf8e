"""A run that starts from another run's weights: `init.run`, for the next stage or for imported ones.

Step and data begin anew, the optimizer's moments too unless `init.optimizer` takes them over.
"""

from typing import Any

from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import split_step
from sora_train.config import Config
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE

PREFIX = {"ema": "ema.", "live": "model."}
"""What names of tensors begin with in a checkpoint, by `init.weights`."""


def empty_model(cfg: Config) -> TextToVideo:
    """The stock model without memory for what is trained; the frozen text encoder is whole."""
    return TextToVideo(cfg.model, cfg.text, seed=cfg.seed, empty=True)


def require_fitting(
    cfg: Config, model: nn.Module, vae: VideoVAE, found: checkpoints.Checkpoint
) -> None:
    """Raises UserError where `init.run` is no run, its model is another by name and shape, or it was trained on
    another VAE's latents."""
    state = found.state()
    if state["task"] != cfg.task:
        raise UserError(f"init.run={cfg.init.run} trained a {state['task']}, this run a {cfg.task}")
    if state["spec"] and state["spec"]["vae_digest"] != vae.digest():
        raise UserError(
            f"init.run={cfg.init.run} was trained on the latents of another VAE than vae.path={cfg.vae.path!r}; give "
            "the vae section of that run's config.yaml"
        )
    prefix = PREFIX[cfg.init.weights]
    tensors = {f"{prefix}{name}": value for name, value in model.named_parameters()}
    checkpoints.require_part(found, tensors, prefix)


def take_weights(cfg: Config, found: checkpoints.Checkpoint, parameters: dict[str, Tensor]) -> None:
    """Fill parameters, by name and sharded as they lie, with those of `init.run`."""
    prefix = PREFIX[cfg.init.weights]
    tensors = {f"{prefix}{name}": value for name, value in parameters.items()}
    checkpoints.load_part(found, tensors, prefix)


def take_moments(found: checkpoints.Checkpoint, moments: dict[str, Tensor]) -> None:
    """Fill the optimizer's state, by parameter name, with that of `init.run`; as strict as the weights."""
    checkpoints.load_part(
        found, {f"optim.{name}": value for name, value in moments.items()}, "optim."
    )


def source_of(cfg: Config) -> checkpoints.Checkpoint:
    """The checkpoint that `init.run` names. Raises UserError where there is none."""
    return checkpoints.find(*split_step(cfg.init.run))


def refuse_imported(run_dir: str, state: dict[str, Any] | None) -> None:
    """Raises UserError when a run would go on in a folder of imported weights, to which no data belong."""
    if state is not None and "imported_from" in state:
        raise UserError(
            f"run.dir={run_dir} holds imported weights and nothing of training to go on from; set "
            f"init.run={run_dir} and another run.dir"
        )

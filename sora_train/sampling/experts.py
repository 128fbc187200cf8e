"""Which runs are the two experts of one model: clips are sampled from both."""

from typing import Protocol

from sora_train.checkpoint import Checkpoint
from sora_train.config import Config
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError

SAME = (
    "boundary", "cond_mode", "text_padding", "vae_digest", "vae_dtype", "text_digest", "text_dtype", "image_digest",
    "latent_channels",
)  # fmt: skip
"""What the specs of two experts agree on."""
SIZES_APART = {"expert", "attention", "compile", "float8"}
"""Keys of `model` in which they may differ."""


class OneExpert(Protocol):
    """What is known of a run before its weights are read; a CheckpointInfo is one."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def cfg(self) -> Config: ...

    @property
    def spec(self) -> DiffusionSpec: ...


def require_both(spec: DiffusionSpec, run: str, other: str) -> None:
    """Raises UserError where one expert is alone, or another one is given to a run that needs none."""
    alone = spec.expert in ("high", "low")
    if alone and not other:
        raise UserError(
            f"{run} holds the {spec.expert}-noise expert alone, and a clip needs both; name the run of the other as "
            "--other-expert"
        )
    if other and not alone:
        what = "both experts" if spec.expert else "one transformer for all noise levels"
        raise UserError(f"{run} holds {what}, so --other-expert {other} has no place; leave it out")


def require_pair(one: OneExpert, other: OneExpert) -> None:
    """Raises UserError where two runs are not the two experts of one model."""
    runs = [str(info.checkpoint.path.parent.parent) for info in (one, other)]
    if {one.spec.expert, other.spec.expert} != {"high", "low"}:
        raise UserError(
            f"{runs[0]} holds the expert '{one.spec.expert}' and {runs[1]} '{other.spec.expert}'; give one of high and "
            "one of low noise"
        )
    for key in SAME:
        values = [getattr(info.spec, key) for info in (one, other)]
        if values[0] != values[1]:
            raise UserError(
                f"the experts of {runs[0]} and {runs[1]} do not go together: {key} is {values[0]!r} and {values[1]!r}; "
                "train them from one pipeline"
            )
    sizes = [info.cfg.model.model_dump(exclude=SIZES_APART) for info in (one, other)]
    for key, value in sizes[0].items():
        if sizes[1][key] != value:
            raise UserError(
                f"the experts of {runs[0]} and {runs[1]} do not go together: model.{key} is {value!r} and "
                f"{sizes[1][key]!r}; train them from one pipeline"
            )

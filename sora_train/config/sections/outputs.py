"""What a run writes while it trains: checkpoints, validation losses, samples, and copies for a tracker."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import FloatList, StrList


class CheckpointConfig(Section):
    every: int = Field(500, ge=0)
    """Steps between checkpoints; 0: only the last step."""
    mode: Literal["async", "sync"] = "async"
    """`async`: a save copies the state into host memory of its own, as large as this rank's part of a checkpoint, and
    is written behind the training; `sync`: the training waits for it."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that this divides are kept for ever; 0: none."""
    keep_best: int = Field(0, ge=0)
    """How many checkpoints are kept besides, of those whose step was validated with the lowest `val/loss`."""
    rehearse: bool = True
    """Before step 1 write a checkpoint, commit it, read it back and remove it, so that what would fail fails then."""
    remote: str = ""
    """Folder in an object store (`s3://bucket/run`) to which checkpoints are uploaded behind the local ones, and from
    which a newer one than those in the run folder is fetched."""
    remote_seconds: float = Field(600.0, gt=0)
    """How long an upload or download is tried again, before the run stops with what went wrong."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: go on from the newest complete checkpoint of the run folder."""


class ValidationConfig(Section):
    every: int = Field(500, ge=0)
    """Steps between validations; 0: never."""
    times: FloatList = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels t at which the loss of every held-out clip is measured, with fixed noise."""
    max_clips: int = Field(64, ge=1)
    """Held-out clips used."""
    kinds: StrList = ()
    """Kinds of conditioning validated, t2v and others; empty: all that `objective.conditioning` trains."""
    live: bool = True
    """Also measure the weights as they are, beside their average (`val/live/loss`)."""

    @model_validator(mode="after")
    def _times_inside(self) -> "ValidationConfig":
        bad = [t for t in self.times if not 0 < t < 1]
        if bad or not self.times:
            raise ValueError(
                f"validation.times must be numbers between 0 and 1, got {list(self.times)}"
            )
        return self


class SampleConfig(Section):
    every: int = Field(500, ge=0)
    """Steps between sample clips; 0: never."""
    prompts: StrList = ()
    """What is sampled; empty: captions of the first held-out clips."""
    max_prompts: int = Field(8, ge=1)
    """Prompts sampled during training."""
    seed: int = 0
    """Seed of the samples' noise."""
    oracle_prompts: int = Field(0, ge=0)
    """Prompts on which the shapes oracle scores the final weights (seen and held-out each); 0: no scoring."""


TrackerKinds = Annotated[
    tuple[Literal["wandb", "tensorboard"], ...], Field(strict=False, min_length=1)
]


class TrackerConfig(Section):
    kind: Literal["none", "wandb", "tensorboard"] | TrackerKinds = "none"
    """Where metrics.jsonl and samples are copied to, by a process each; a list names several."""
    project: str = "sora_train"
    """W&B project."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """`auto`: online when a W&B key is configured, else offline in the run folder."""
    finish_seconds: float = Field(30.0, gt=0)
    """How long the end of a run waits for its trackers; one that takes longer is ended, and the run is not affected."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The trackers, each once."""
        if isinstance(self.kind, str):
            return () if self.kind == "none" else (self.kind,)
        return tuple(dict.fromkeys(self.kind))

"""What a run writes while it trains: checkpoints, validation losses, samples, and copies for a tracker."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import FloatList, StrList


class CheckpointConfig(Section):
    every: int = Field(500, ge=0)
    """Steps between checkpoints; 0: only the last step."""
    mode: Literal["async", "sync"] = "async"
    """`async`: a save copies this rank's part of the state into host memory, and a thread writes it while training goes
    on; `sync`: training waits until it is written."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints whose step is a multiple of this are never removed; 0: none."""
    keep_best: int = Field(0, ge=0)
    """Number of checkpoints with the lowest `val/loss` at their step that are kept besides."""
    rehearse: bool = True
    """Before step 1, write a checkpoint, read it back and remove it, so that a fault shows at the start."""
    remote: str = ""
    """Folder in an object store (`s3://bucket/run`). Checkpoints are uploaded to it while training goes on; a resume
    fetches its newest one if it is newer than those in the run folder."""
    remote_seconds: float = Field(600.0, gt=0)
    """Seconds for which a failed upload or download is tried again before the run stops with an error."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: go on from the newest complete checkpoint of the run folder; `never`: a folder with checkpoints is
    refused."""


class ValidationConfig(Section):
    every: int = Field(500, ge=0)
    """Steps between validations; 0: never."""
    times: FloatList = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels t at which the loss of every held-out clip is measured; the noise is the same each time."""
    max_clips: int = Field(64, ge=1)
    """Most held-out clips that are used."""
    kinds: StrList = ()
    """Kinds of conditioning that are validated, such as [t2v, i2v]; empty: all that are trained."""
    live: bool = True
    """Validate the weights as trained too, beside their average (`val/live/loss`)."""
    clips: int = Field(0, ge=0)
    """Clips sampled at each validation with the averaged weights and judged without networks: `val/clips/*`, as
    `sora eval` judges them afterwards (docs/evaluation.md). They take as long as as many samples; 0: none."""

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
    """Prompts that are sampled; empty: the captions of the first held-out clips."""
    max_prompts: int = Field(8, ge=1)
    """Most prompts that are sampled during training."""
    seed: int = 0
    """Seed of the samples' noise."""
    oracle_prompts: int = Field(0, ge=0)
    """Number of prompts, of seen and of held-out combinations each, on which the oracle of the shapes world scores the
    final weights; 0: no scores."""


TrackerKinds = Annotated[
    tuple[Literal["wandb", "tensorboard"], ...], Field(strict=False, min_length=1)
]


class TrackerConfig(Section):
    kind: Literal["none", "wandb", "tensorboard"] | TrackerKinds = "none"
    """Where metrics.jsonl and samples are copied to, in a process of its own; a list names several trackers."""
    project: str = "sora_train"
    """Project in W&B."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """`auto`: online if a W&B key is configured, else offline in the run folder."""
    finish_seconds: float = Field(30.0, gt=0)
    """Seconds that the end of a run waits for its trackers; a slower one is ended, which does not fail the run."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The trackers, each once."""
        if isinstance(self.kind, str):
            return () if self.kind == "none" else (self.kind,)
        return tuple(dict.fromkeys(self.kind))

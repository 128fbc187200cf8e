"""What keeps a run alive and honest: deadlines of its phases, when it makes room for others, and steps too bad to be
taken."""

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section

LEAST_SIGMA = 3.0


class HealthConfig(Section):
    meeting_seconds: float = Field(300.0, gt=0)
    """Seconds that ranks wait for each other at the start; after that the missing ones are named."""
    init_seconds: float = Field(3600.0, gt=0)
    """Most seconds to build the model and the data, with the encoding of clips before step 1."""
    compile_seconds: float = Field(3600.0, gt=0)
    """Most seconds to compile for one size of clip before the first step, with `model.compile`."""
    step_seconds: float = Field(600.0, gt=0)
    """Seconds that any part of a step may take at least, whatever `health.step_factor` says. The first steps, which
    compile and warm caches, have `health.init_seconds`."""
    step_factor: float = Field(20.0, ge=1)
    """A part of a step may take this many times the median step, and `health.step_seconds` if that is longer."""
    validation_seconds: float = Field(3600.0, gt=0)
    """Most seconds of one validation."""
    sample_seconds: float = Field(3600.0, gt=0)
    """Most seconds to sample clips, and to finish the run (scores and the report)."""
    save_seconds: float = Field(3600.0, gt=0)
    """Most seconds that a checkpoint may hold up the run."""
    heartbeat_seconds: float = Field(5.0, gt=0)
    """Seconds between two writes of each rank's state to health/rank-N.json in the run folder."""
    report_every: int = Field(50, ge=0)
    """Steps between two reports of slow ranks and the parts of a step in which they are slow; 0: never."""
    time_limit_minutes: float = Field(0.0, ge=0)
    """Minutes after which the run saves and exits, to be started again; 0: only SLURM's own limit
    ($SLURM_JOB_END_TIME) counts."""
    leave_seconds: float = Field(300.0, ge=0)
    """Seconds before its time limit at which the run saves and exits, time enough to write a checkpoint."""


class SpikeDetectionConfig(Section):
    spike_sigma: float = Field(10.0, ge=0)
    """A step is skipped if its loss is more than this many robust deviations above the median of the last good steps
    (docs/spike_detection.md); 0: the loss has no limit. A loss that is not finite is always skipped."""
    grad_norm_sigma: float = Field(25.0, ge=0)
    """The same limit for the gradient norm before clipping, which varies far more in healthy runs."""
    window: int = Field(200, ge=2)
    """Number of last good steps from which the median and the deviation are computed."""
    warmup: int = Field(100, ge=2)
    """Number of good steps before the first one can be called a spike."""
    max_skips: int = Field(3, ge=1)
    """Steps skipped in a row after which the run rolls back to a checkpoint and leaves out their data."""
    max_rollbacks: int = Field(2, ge=0)
    """Roll-backs after which the run stops instead of rolling back again; 0: it stops at once."""

    draw: bool = True
    """Draw a picture of a skipped step's clips, with noise levels and losses, into spikes/step-N of the run folder."""

    @model_validator(mode="after")
    def _ordinary_steps_pass(self) -> "SpikeDetectionConfig":
        for key in ("spike_sigma", "grad_norm_sigma"):
            sigma = getattr(self, key)
            if 0 < sigma < LEAST_SIGMA:
                raise ValueError(
                    f"spike_detection.{key}={sigma:g} would skip ordinary steps; take {LEAST_SIGMA:g} or more, or 0 to "
                    "look for no spikes"
                )
        return self

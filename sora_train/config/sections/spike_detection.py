"""When a step is too bad to be taken, and what happens then."""

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section

LEAST_SIGMA = 3.0


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

"""When a step is too bad to be taken, and what happens then."""

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section

LEAST_SIGMA = 3.0


class SpikeDetectionConfig(Section):
    spike_sigma: float = Field(10.0, ge=0)
    """A step whose loss lies more than this many robust deviations above the median of the last good steps is skipped
    (docs/spike_detection.md). 0: no spikes are looked for in the loss; one that is not finite is skipped always."""
    grad_norm_sigma: float = Field(25.0, ge=0)
    """The same of the gradient norm before clipping, which spreads far wider in healthy runs."""
    window: int = Field(200, ge=2)
    """Good steps that the median and the deviation are taken over."""
    warmup: int = Field(100, ge=2)
    """Good steps before spikes are looked for."""
    max_skips: int = Field(3, ge=1)
    """Steps skipped in a row after which the run goes back to a checkpoint and leaves that data out."""
    max_rollbacks: int = Field(2, ge=0)
    """How often a run goes back before it stops instead; 0: it stops at once."""

    draw: bool = True
    """Draw the clips of a skipped step, with their noise levels and losses, into spikes/step-N in the run folder."""

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

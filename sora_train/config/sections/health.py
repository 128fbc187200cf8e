"""What keeps a run alive and honest: deadlines of its phases, and when it makes room for others."""

from pydantic import Field

from sora_train.config.sections.base import Section


class HealthConfig(Section):
    meeting_seconds: float = Field(300.0, gt=0)
    """Longest time that ranks wait for each other at the start; then those that are missing are named."""
    init_seconds: float = Field(3600.0, gt=0)
    """Longest time to build the model and the data, encoded clips included."""
    compile_seconds: float = Field(3600.0, gt=0)
    """Longest time to compile for one size of clip before the first step, with `model.compile`."""
    step_seconds: float = Field(600.0, gt=0)
    """Longest time that any part of a step may take, whatever `health.step_factor` says; the first steps, which
    compile and warm caches, have `health.init_seconds`."""
    step_factor: float = Field(20.0, ge=1)
    """A part of a step may take this many median steps, but no less than `health.step_seconds`."""
    validation_seconds: float = Field(3600.0, gt=0)
    """Longest time of a validation."""
    sample_seconds: float = Field(3600.0, gt=0)
    """Longest time to sample clips, and to finish the run: scores and the report."""
    save_seconds: float = Field(3600.0, gt=0)
    """Longest time that a checkpoint may hold up the run."""
    heartbeat_seconds: float = Field(5.0, gt=0)
    """How often each rank writes where it stands to health/rank-N.json in the run folder."""
    report_every: int = Field(50, ge=0)
    """Steps between two reports of which ranks are slow and where; 0: never."""
    time_limit_minutes: float = Field(0.0, ge=0)
    """Minutes after which the run saves and leaves, to be started again; 0: only SLURM's own limit
    ($SLURM_JOB_END_TIME) counts."""
    leave_seconds: float = Field(300.0, ge=0)
    """How long before its time limit the run begins to leave, so that a checkpoint can be written."""

"""What keeps a run alive and honest: deadlines of its phases, and when it makes room for others."""

from pydantic import Field

from sora_train.config.sections.base import Section


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

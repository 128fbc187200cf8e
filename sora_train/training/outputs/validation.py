"""Validation during a run: what the objective measures on the held-out clips."""

from sora_train.training.components import Components
from sora_train.training.run import RunContext


def validate(run: RunContext, parts: Components) -> dict[str, float]:
    """Metrics of the averaged weights on held-out clips; {} without such clips. A collective.

    With `validation.live` also `val/live/loss`, that of the weights as they are trained.
    """
    clips, model, objective = parts.data.val_clips, parts.engine.model, parts.objective
    if not clips or run.cfg.validation.every == 0:
        return {}
    model.eval()
    try:
        with run.health.phase("validation"):
            with parts.averaged():
                row = objective.validate(model, clips, run.control, run.health.check_preemption)
            if row and run.cfg.validation.live:
                live = objective.validate(
                    model, clips, run.control, run.health.check_preemption, live=True
                )
                if "val/loss" in live:
                    row["val/live/loss"] = live["val/loss"]
            return row
    finally:
        model.train()

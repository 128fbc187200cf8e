"""What the run has cost: seconds of the cores for each stage, tokens and money for captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.engines.base import Bound
from data_prep.pipeline import SETTINGS_FILE, bound_stages, stages_of
from data_prep.settings import parse
from data_prep.stage import Workspace
from sora_train.base.files import read_json


@dataclass(frozen=True)
class Work:
    """Calls of one stage with its present settings."""

    stage: str
    results: int
    seconds: float


def stages_of_run(workspace: Workspace) -> list[Bound]:
    """The stages of the run in this output folder, with their settings and ledgers."""
    stored = read_json(workspace.out / "prep" / SETTINGS_FILE) or {}
    stages = stages_of(stored.get("stages", ()))
    values = {"input": workspace.input, **stored, "output": str(workspace.out), "until": ""}
    settings = parse([], stages, values)
    return bound_stages(stages, settings, workspace)


def work(bound: Sequence[Bound]) -> list[Work]:
    """The stages that look at each row alone: what they have computed, whether rows are left of it or not."""
    found = []
    for one in bound:
        if not one.stage.whole:
            results, seconds = one.ledger.work()
            found.append(Work(one.stage.name, results, seconds))
    return found

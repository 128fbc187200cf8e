"""Writes `report.html`: what became of all footage, with charts and pictures, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from pydantic import Field

from data_prep.captioning.spending import spending_of
from data_prep.engines.base import Bound
from data_prep.report.page import MOST_PICTURES, page
from data_prep.report.sheets import Pictures
from data_prep.report.training import training
from data_prep.report.work import stages_of_run, work
from data_prep.stage import Stage, Workspace
from data_prep.stages.filter import FilterConfig
from sora_train.base.files import write_atomically
from sora_train.config.sections.base import Section
from sora_train.data.decode.pool import DecodePool

NAME = "report.html"
# Processes that decode its pictures, and seconds that one of them may take.
WORKERS, SECONDS = 2, 60.0


class ReportConfig(Section):
    """`report:`"""

    pictures: int = Field(24, ge=0)
    """Clips in a contact sheet; 0: a page without pictures."""
    experiment: str = "real_tiny"
    """The experiment whose buckets the kept clips are counted in."""


def report(rows: pa.Table, settings: ReportConfig, workspace: Workspace) -> pa.Table:
    """Write the page; the rows stay as they are."""
    bound = stages_of_run(workspace)
    with DecodePool(WORKERS, SECONDS) as pool:
        html = page(
            rows,
            Pictures(workspace, pool, MOST_PICTURES),
            stages=[one.stage.name for one in bound],
            filter_stage="filter",
            keep=_keep(bound),
            scores=_scores(bound),
            work=work(bound),
            spent=spending_of(workspace).total(),
            training=training(workspace.out, settings.experiment),
            experiment=settings.experiment,
            title=f"Preparation of {workspace.out.name}",
            count=settings.pictures,
        )
    write_atomically(workspace.out / NAME, html)
    return pa.table({"drop_reason": pa.array([""] * len(rows), pa.string())})


def _keep(bound: Sequence[Bound]) -> str:
    """The text of the filters."""
    return next((b.settings.keep for b in bound if isinstance(b.settings, FilterConfig)), "")


def _scores(bound: Sequence[Bound]) -> list[str]:
    """The numbers that the stage `score` and the user's stages add."""
    return [
        field.name
        for one in bound
        if one.stage.name == "score" or one.stage.after
        for field in one.stage.adds
        if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
    ]


STAGE = Stage(
    name="report",
    run=report,
    config=ReportConfig,
    whole=True,
    is_remembered=False,
    adds=pa.schema([]),
)

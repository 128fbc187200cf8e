"""Raw footage to shards: the stages in their order, run from what the ledgers hold already.

    ingest -> probe -> scenes -> cut -> clip -> score -> filter -> fingerprint -> dedup -> caption -> encode -> shard
    -> report

A row is a source until `scenes` makes parts of it, then a clip. No row is ever lost: one that is of no use stays in the
table with the stage, the reason and the detail.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from data_prep import calls
from data_prep.engines.base import Bound, Engine
from data_prep.ledger import Ledger, Unfinished, digest_of, read_table, write_table
from data_prep.settings import PrepSettings
from data_prep.stage import DROPS, Stage, Workspace, load_stage
from sora_train.base.files import read_json, write_atomically
from sora_train.config.schema import did_you_mean
from sora_train.errors import UserError

ORDER = (
    "ingest",
    "probe",
    "scenes",
    "cut",
    "clip",
    "score",
    "filter",
    "fingerprint",
    "dedup",
    "caption",
    "encode",
    "shard",
    "report",
)
SETTINGS_FILE = "settings.json"
Tell = Callable[[str], None]


def stages_of(files: Sequence[str] = ()) -> list[Stage]:
    """All stages in order, the user's in their places. Raises UserError for one that has no place."""
    stages = [load_stage(f"data_prep.stages.{name}") for name in ORDER]
    for file in files:
        stage = load_stage(file)
        places = [number for number, other in enumerate(stages) if other.name == stage.after]
        if not places or stage.name in {other.name for other in stages}:
            names = ", ".join(other.name for other in stages)
            raise UserError(
                f"stages={file} holds a stage {stage.name!r} after {stage.after!r}; give it a name of its own and "
                f"`after` one of {names}"
            )
        stages.insert(places[0] + 1, stage)
    return stages


def run(stages: Sequence[Stage], settings: PrepSettings, engine: Engine, tell: Tell) -> pa.Table:
    """Run the stages, each for the rows it has no result of yet; returns the table after the last one.

    Raises UserError where the output is another run's, a model or extra is missing, or no row of a sample is kept;
    Unfinished where `part` is given and other parts have not done their share.
    """
    workspace = claimed(settings)
    bound = bound_stages(stages, settings, workspace)
    for one in bound:
        one.stage.check(one.settings)
    rows = begun()
    groups = [list(group) for _, group in groupby(bound, lambda one: one.stage.whole)]
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        if group[0].stage.whole:
            for one in group:
                rows = run_whole(one, rows, workspace)
                tell(told(one.stage, rows))
            if group is groups[0]:
                for one in bound:
                    one.stage.check_sources(rows, one.settings)
            continue
        mine = _share(rows, settings)
        _try_filters(group, following, mine, engine, settings, workspace)
        rows = run_each(group, rows, mine, engine, tell, compact=not settings.part)
    return rows


def begun() -> pa.Table:
    """What the first stage is given: a row that says nothing."""
    return pa.Table.from_pylist([dict.fromkeys(DROPS.names, "")], schema=DROPS)


def progress(
    stages: Sequence[Stage], settings: PrepSettings, workspace: Workspace
) -> Iterator[str]:
    """A line for each stage that is done, as `told` has it, and one for the first that is not; nothing is computed."""
    rows = begun()
    for one in bound_stages(stages, settings, workspace):
        place = _place(one, rows)
        try:
            if one.stage.whole and not place.exists():
                yield f"{one.stage.name}: to be done for {len(rows)} rows"
                return
            rows = read_table(place) if one.stage.whole else one.ledger.apply(rows, {})
        except Unfinished as error:
            yield f"{one.stage.name}: {_kept(rows) - error.rows} of {_kept(rows)} rows done"
            return
        yield told(one.stage, rows)


def run_each(
    group: Sequence[Bound],
    rows: pa.Table,
    mine: pa.Table,
    engine: Engine,
    tell: Tell,
    compact: bool,
) -> pa.Table:
    """`rows` after stages that look at each row alone; the engine computes what is missing for `mine`."""
    failures = engine.run(group, mine)
    for one in group:
        rows = one.ledger.apply(rows, failures)
        tell(told(one.stage, rows))
        if compact:
            one.ledger.compact()
    return rows


def run_whole(one: Bound, rows: pa.Table, workspace: Workspace) -> pa.Table:
    """The rows after a stage that needs all of them: what it returned of the same rows before, or its answer now."""
    place = _place(one, rows)
    if not (one.stage.is_remembered and place.exists()):
        result = calls.checked(one.stage, rows, one.stage.run(rows, one.settings, workspace))
        write_table(one.ledger.joined(rows, result), place)
    # Always as the file has it, so that a run that goes on is given the same.
    return read_table(place)


def _place(one: Bound, rows: pa.Table) -> Path:
    """Where the table of a stage that needs all rows is kept, by what it was given."""
    return one.ledger.folder / f"{digest_of(rows)}.parquet"


def claimed(settings: PrepSettings) -> Workspace:
    """The workspace of the output folder, which is new, or this run's. Raises UserError for another's."""
    out = settings.folder
    file = out / "prep" / SETTINGS_FILE
    if file.exists():
        before = (read_json(file) or {}).get("input")
        if before != settings.input:
            raise UserError(
                f"output={settings.output} holds what was made of input={before}; name another folder for "
                f"input={settings.input}, or remove it"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"output={settings.output} is not an empty folder; name a new one, or empty it first"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(settings.model_dump(mode="json"), indent=1))
    return Workspace(out, settings.input)


def bound_stages(
    stages: Sequence[Stage], settings: PrepSettings, workspace: Workspace
) -> list[Bound]:
    """The stages up to `until` with their settings and ledgers. Raises UserError for an `until` that is none."""
    names = [stage.name for stage in stages]
    if settings.until and settings.until not in names:
        raise UserError(f"until={settings.until} is no stage; give one of {', '.join(names)}")
    last = names.index(settings.until) if settings.until else len(names) - 1
    bound = [
        Bound(stage, own := getattr(settings, stage.name), Ledger(workspace.ledger, stage, own))
        for stage in stages[: last + 1]
        if stage.is_on(getattr(settings, stage.name))
    ]
    _check_columns(bound)
    return bound


def _check_columns(bound: Sequence[Bound]) -> None:
    """Raises UserError where settings name a column that no stage before theirs gives."""
    known: set[str] = set()
    for one in bound:
        if wrong := sorted(set(one.stage.reads_also(one.settings)) - known):
            raise UserError(
                f"the settings of {one.stage.name} name the column {wrong[0]!r}, which no stage before it gives; "
                f"{did_you_mean(wrong[0], sorted(known))}give one of {', '.join(sorted(known))}"
            )
        known.update(one.stage.adds.names)


def told(stage: Stage, rows: pa.Table) -> str:
    """A line on what a stage has left of the rows, by the reasons for which it dropped others."""
    lost = Counter(
        row["drop_reason"]
        for row in rows.select(DROPS.names).to_pylist()
        if row["drop_stage"] == stage.name
    )
    kept = len(rows) - sum(map(bool, rows["drop_reason"].to_pylist()))
    why = ", ".join(f"{number} {reason}" for reason, number in lost.most_common())
    return f"{stage.name}: {kept} kept" + (
        f", {sum(lost.values())} dropped ({why})" if lost else ""
    )


def _share(rows: pa.Table, settings: PrepSettings) -> pa.Table:
    """Every N-th row for `part=i/N`, beginning with the i-th."""
    number, parts = settings.share
    return rows.take(pa.array(range(number - 1, len(rows), parts), pa.int64()))


def _try_filters(
    group: Sequence[Bound],
    following: Sequence[Bound],
    rows: pa.Table,
    engine: Engine,
    settings: PrepSettings,
    workspace: Workspace,
) -> None:
    """Take a few rows through the stages that come before a filter. Raises UserError where it keeps none of them."""
    filters = [one for one in following if one.stage.is_filter]
    kept = [number for number, reason in enumerate(rows["drop_reason"].to_pylist()) if not reason]
    if not filters or not 0 < settings.sample < len(kept):
        return
    step = len(kept) / settings.sample
    sample = rows.take(pa.array([kept[int(n * step)] for n in range(settings.sample)], pa.int64()))
    sample = run_each(group, sample, sample, engine, lambda line: None, compact=False)
    if not (before := _kept(sample)):
        return
    for one in filters:
        sample = run_whole(one, sample, workspace)
    if not _kept(sample):
        raise UserError(
            f"the filters keep none of {before} clips that were tried before the others "
            f"({told(filters[-1].stage, sample)}); loosen them, or give sample=0 to go on all the same"
        )


def _kept(rows: pa.Table) -> int:
    return sum(not reason for reason in rows["drop_reason"].to_pylist())

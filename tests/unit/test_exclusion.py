"""Laws of data.exclude: what was trained stays as it was, and from its step on no micro-batch has such a clip."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses
from test_mixing import config, met, planned, stored

from sora_train.config import Config
from sora_train.data.exclusion import EXCLUDED, excluded_rows
from sora_train.data.index.sources import Sources, SourceSnapshot, excluding, open_sources
from sora_train.data.manifest import Manifest, empty_row
from sora_train.data.sample import Bucket, MicroBatch
from sora_train.data.tape.buckets import BucketSpec
from sora_train.data.tape.mixture import TapeSequence
from sora_train.data.tape.tape import row_costs, rows_for_rank
from sora_train.errors import UserError
from sora_train.training.pipeline.plan import plan

TABLE = [BucketSpec(Bucket(frames, 48, 48), "48px", "1:1", 1.0) for frames in (1, 9, 17)]
CLIPS = 40


def clips(count: int = CLIPS) -> Manifest:
    """Images and two lengths of videos, in shards of seven."""
    frames = [(1, 9, 17)[n % 3] for n in range(count)]
    rows = [
        empty_row(
            key=f"clip-{n}", shard=f"{n // 7}.tar", kind="image" if frames[n] == 1 else "video",
            frames=frames[n], fps=8.0, height=48, width=48, caption="a clip",
        )
        for n in range(count)
    ]  # fmt: skip
    return Manifest.from_rows(rows, "/nowhere")


class Run:
    """A run that stops and goes on: what each checkpoint says of its sources is all that the next start knows."""

    def __init__(self, folder: Path, seed: int, micro_batch: int, micro_batches: int):
        cfg = config(folder, "a", micro_batches=micro_batches)
        data = cfg.data.model_copy(update={"micro_batch": micro_batch, "group": 2, "val_clips": 0})
        self.cfg: Config = cfg.model_copy(update={"data": data, "seed": seed})
        self.saved: list[dict[str, object]] = []

    def start(self, excluded: set[int], step: int) -> TapeSequence:
        """Go on at a step with these clips excluded."""
        rows = tuple(sorted(excluded))
        known = SourceSnapshot.listed(json.loads(json.dumps(self.saved)))
        sources = _excluded(Sources.of(clips()), known, rows)
        now = step * self.cfg.train.micro_batches
        found, tape, assignment = plan(
            self.cfg, sources, TABLE, lambda bucket: 9 * bucket.frames, float, now=now
        )
        self.saved = [dataclasses.asdict(one) for one in found.snapshots]
        assert set(np.flatnonzero(assignment.reasons == EXCLUDED).tolist()) == excluded
        return tape


def _excluded(sources: Sources, known: list[SourceSnapshot], rows: tuple[int, ...]) -> Sources:
    if known:
        blocks = (len(sources.train),) * len(known)
        sources = dataclasses.replace(sources, snapshots=tuple(known), blocks=blocks)
    return excluding(sources, rows, resumed=bool(known))


def entries(tape: TapeSequence, first: int, last: int) -> list[MicroBatch]:
    return [tape[index] for index in range(first, last)]


some_rows = st.sets(st.integers(0, CLIPS - 1), max_size=12)
starts = st.lists(st.tuples(st.integers(1, 30), some_rows), min_size=1, max_size=4).map(
    lambda pairs: sorted(pairs, key=lambda pair: pair[0])
)


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3), some_rows, starts)
@settings(max_examples=40, deadline=None)
def test_what_was_trained_stays_and_what_is_excluded_is_not_met_again(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    micro_batch: int,
    micro_batches: int,
    first: set[int],
    later: list[tuple[int, set[int]]],
):
    run = Run(tmp_path_factory.getbasetemp(), seed, micro_batch, micro_batches)
    before = run.start(first, 0)
    excluded, end = first, 45 * micro_batches
    for step, rows in later:
        now = step * micro_batches
        tape = run.start(rows, step)
        assert entries(tape, 0, now) == entries(before, 0, now), "the past is what it was"
        joint = before.end_of_epoch(now) if rows != excluded else now
        for index in range(now, joint):
            kept = [row for row in before.at(index)[index].rows if row not in rows]
            assert list(tape[index].rows) == kept, "an epoch that was begun goes on without them"
        assert not {row for entry in entries(tape, now, end) for row in entry.rows} & rows
        assert max(met(tape, 0, end).values(), default=1) == 1, "no draw is made twice"
        before, excluded = tape, rows
    last = before.parts[-1]
    whole = met(before, last.first, last.first + last.per_epoch)
    assert Counter(row for row, _ in whole) == dict.fromkeys(set(range(CLIPS)) - excluded, 1)
    again = run.start(excluded, 44)
    assert entries(again, 0, end) == entries(before, 0, end), "whoever resumes finds the same tape"


@given(st.integers(0, 3), st.integers(1, 3), some_rows, st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_ranks_share_what_is_left_and_costs_are_those_of_what_is_trained(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    micro_batch: int,
    rows: set[int],
    step: int,
    world: int,
):
    run = Run(tmp_path_factory.getbasetemp(), seed, micro_batch, 4)
    run.start(set(), 0)
    tape = run.start(rows, step)
    for at in range(16):
        of_ranks = [rows_for_rank(tape, at, 4, rank, world) for rank in range(world)]
        dealt = Counter(row for rank in of_ranks for entry in rank if entry for row in entry.rows)
        alone = Counter(
            row for entry in rows_for_rank(tape, at, 4, 0, 1) if entry for row in entry.rows
        )
        assert dealt == alone
    costs = [tape.cost(tape[index]) for index in range(64)]
    assert tape.costs(0, 64).tolist() == pytest.approx(costs)
    assert row_costs(tape, 4, world, steps=16).sum() == pytest.approx(sum(costs))


# -- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "clip-3\n\n  clip-1 \nclip-3\n",
        'key\nclip-1\n"clip-3"\n',
        "why,key,score\nmislabelled,clip-3,1.5\n,clip-1,\n",
        '{"step": 4, "key": "clip-3", "reason": "late"}\n{"key": "clip-1"}\n',
    ],
)
def test_clips_are_named_by_line_by_table_or_as_the_quarantine_does(tmp_path: Path, text: str):
    (tmp_path / "out").write_text(text)
    assert excluded_rows(tmp_path / "out", clips()) == (1, 3)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("clip-1\nclip-99\n", ("line 2", "clip-99", "sora data show")),
        ("score,key\n1,clip-1\n2,\n", ("line 3", "''")),
        ('{"key": "clip-1"}\n{"row": 4}\n', ("line 2", "row", "mend")),
        ("source,key\nb,clip-1\n", ("line 2", "clip-1", "of b")),
    ],
)
def test_a_line_that_names_no_clip_is_refused(tmp_path: Path, text: str, facts: tuple[str, ...]):
    (tmp_path / "out").write_text(text)
    with refuses(UserError, "data.exclude", *facts):
        excluded_rows(tmp_path / "out", clips())


def test_a_file_that_is_not_there_and_one_that_names_everything_are_refused(tmp_path: Path):
    stored(tmp_path / "a", 20)
    cfg = config(tmp_path, "a")

    def with_file(name: str) -> Config:
        data = cfg.data.model_copy(update={"exclude": str(tmp_path / name)})
        return cfg.model_copy(update={"data": data})

    with refuses(UserError, "data.exclude", "nothing.txt"):
        open_sources(with_file("nothing.txt"), tmp_path / "run")
    (tmp_path / "all.txt").write_text("".join(f"a{n}\n" for n in range(18)))
    with refuses(UserError, "data.exclude", "all 18"):
        open_sources(with_file("all.txt"), tmp_path / "run")
    (tmp_path / "held.txt").write_text("a19\n")
    with refuses(UserError, "line 1", "a19", "held out"):
        open_sources(with_file("held.txt"), tmp_path / "run")


def test_clips_of_one_key_in_two_sources_are_told_apart(tmp_path: Path):
    stored(tmp_path / "a", 20), stored(tmp_path / "b", 20)
    cfg = config(tmp_path, "a", "b")
    train = open_sources(cfg, tmp_path / "run").train
    twins = train.with_columns(key=np.array([key[1:] for key in train.key.tolist()], object))
    (tmp_path / "out").write_text("3\n")
    with refuses(UserError, "line 1", "2 training clips", "source,key"):
        excluded_rows(tmp_path / "out", twins)
    (tmp_path / "out").write_text("source,key\nb,3\n")
    (row,) = excluded_rows(tmp_path / "out", twins)
    assert twins.source[row] == "b" and twins.key[row] == "3"


def test_excluded_rows_join_growing_sources_and_leave_a_mix(tmp_path: Path):
    """Both changes of a resume make one part of the tape, and no earlier row gets another number."""
    stored(tmp_path / "a", 44), stored(tmp_path / "b", 33)
    cfg = config(tmp_path, "a", "b")
    first, tape = planned(cfg, open_sources(cfg, tmp_path / "run"))
    saved = SourceSnapshot.listed([dataclasses.asdict(one) for one in first.snapshots])
    stored(tmp_path / "a", 60)
    (tmp_path / "out").write_text("a1\na50\nb2\n")
    data = cfg.data.model_copy(update={"exclude": str(tmp_path / "out")})
    grown, longer = planned(
        cfg.model_copy(update={"data": data}),
        open_sources(cfg.model_copy(update={"data": data}), tmp_path / "run", saved),
        3,
    )
    joint = tape.parts[0].per_epoch
    assert [one.first for one in grown.snapshots] == [0, joint]
    gone = {row for row, key in enumerate(grown.train.key.tolist()) if key in ("a1", "a50", "b2")}
    epoch = met(longer, joint, joint + longer.parts[1].per_epoch)
    assert {row for row, _ in epoch} == set(range(len(first.train) + 16)) - gone and len(gone) == 3
    assert not {row for row, _ in met(longer, 3, joint)} & gone
    assert {row for row, _ in met(longer, 0, 3)} == {row for row, _ in met(tape, 0, 3)}

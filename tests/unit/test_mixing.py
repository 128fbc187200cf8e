"""Laws of several sources: how often each clip is met, stages of mixes, and shards that join a run."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.config import Config, MixConfig, SourceConfig
from sora_train.config.compose import compose
from sora_train.data.index.sources import ONLY, Sources, SourceSnapshot, open_sources
from sora_train.data.manifest import Manifest, empty_row
from sora_train.data.sample import Bucket
from sora_train.data.tape.buckets import BucketSpec
from sora_train.data.tape.mixture import Change, TapeSequence, repeats_of
from sora_train.data.tape.shuffle import ShuffledPasses, samples_per_epoch
from sora_train.data.tape.tape import SourceRepeats, Tape, row_costs
from sora_train.errors import ConfigError, UserError
from sora_train.training.pipeline.plan import plan

BUCKETS = [Bucket(1, 48, 48), Bucket(9, 48, 48), Bucket(9, 32, 64)]


@st.composite
def walks(draw: st.DrawFn) -> ShuffledPasses:
    count = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return ShuffledPasses(
        rng.integers(0, 3, count),
        rng.integers(0, 5, count),
        buckets=3,
        seed=draw(st.integers(0, 3)),
        number=draw(st.integers(0, 2)),
        window_shards=draw(st.integers(1, 6)),
        repeats=draw(st.sampled_from([0.1, 0.5, 0.7, 1.0, 1.3, 2.0, 3.5])),
        first_pass=draw(st.integers(0, 4)),
    )


@given(walks(), st.integers(1, 7))
@settings(max_examples=80, deadline=None)
def test_samples_of_a_bucket_are_met_equally_often_wherever_the_walk_stops(
    walk: ShuffledPasses, epochs: int
):
    met: Counter[int] = Counter()
    keys: set[tuple[int, int]] = set()
    for epoch in range(epochs):
        samples, passes = walk.epoch(epoch)
        assert (np.bincount(walk._bucket[samples], minlength=3) == walk.per_epoch).all()
        met.update(samples.tolist())
        new = set(zip(samples.tolist(), passes.tolist(), strict=True))
        assert len(new) == len(samples) and not new & keys, "no sample meets the same draw twice"
        keys |= new
    for bucket in range(3):
        times = [met[sample] for sample in np.flatnonzero(walk._bucket == bucket).tolist()]
        assert not times or max(times) - min(times) <= 1
    assert max(number for _, number in keys) < walk.passes_begun(epochs)


@given(walks(), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_an_epoch_of_a_walk_does_not_depend_on_what_was_asked_before(
    walk: ShuffledPasses, epoch: int
):
    before = walk.epoch(epoch)
    walk.epoch(0)
    after = walk.epoch(epoch)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_every_pass_goes_through_shards_and_their_samples_in_an_order_of_its_own():
    """One shard at a time, of six with ten samples each."""
    shard = np.repeat(np.arange(6), 10)
    walk = ShuffledPasses(np.zeros(60, int), shard, buckets=1, seed=0, window_shards=1)
    passes = [walk.epoch(number)[0] for number in range(4)]
    shards = [shard[samples].reshape(6, 10) for samples in passes]
    assert all((of_shard == of_shard[:, :1]).all() for of_shard in shards), (
        "whole shards, one by one"
    )
    assert len({tuple(of_shard[:, 0].tolist()) for of_shard in shards}) == 4
    within = {tuple(samples[shard[samples] == 3].tolist()) for samples in passes}
    assert len(within) == 4
    other = ShuffledPasses(np.zeros(60, int), shard, buckets=1, seed=0, number=1, window_shards=1)
    assert other.epoch(0)[0].tolist() != passes[0].tolist()


def two_sources(repeats: tuple[float, float], clips: tuple[int, int] = (400, 100)) -> Tape:
    source = np.repeat([0, 1], clips)
    bucket = np.arange(sum(clips)) % 3
    return Tape(
        bucket,
        np.arange(sum(clips)) // 10,
        BUCKETS,
        dict.fromkeys(BUCKETS, 4),
        seed=1,
        group=2,
        source_of_row=source,
        mix=[SourceRepeats(often) for often in repeats],
    )


def met(tape: Tape | TapeSequence, first: int, last: int) -> Counter[tuple[int, int]]:
    entries = [tape[index] for index in range(first, last)]
    return Counter(pair for entry in entries for pair in zip(entry.rows, entry.epochs, strict=True))


@pytest.mark.parametrize("repeats", [(1.0, 1.0), (0.25, 1.0), (1.0, 3.0), (0.5, 2.5)])
def test_sources_are_met_as_often_as_the_mix_says(repeats: tuple[float, float]):
    tape = two_sources(repeats)
    epochs = 8
    drawn = met(tape, 0, epochs * tape.per_epoch)
    assert max(drawn.values()) == 1, "a sample meets each of its epochs once"
    rows = Counter(row for row, _ in drawn)
    for low, high, often in ((0, 400, repeats[0]), (400, 500, repeats[1])):
        times = [rows[row] for row in range(low, high)]
        assert max(times) - min(times) <= 2, "one between clips of a bucket, one between buckets"
        assert np.mean(times) == pytest.approx(epochs * often, rel=0.02)


def test_sources_are_spread_evenly_over_an_epoch():
    tape = two_sources((1.0, 1.0), (900, 90))
    order = [row for index in range(tape.per_epoch) for row in tape[index].rows]
    tenths = np.array_split(np.array(order) >= 900, 10)
    assert all(3 <= part.sum() <= 15 for part in tenths)


def test_a_source_alone_is_walked_as_one_of_several_is():
    alone = Tape(
        np.arange(400) % 3,
        np.arange(400) // 10,
        BUCKETS,
        dict.fromkeys(BUCKETS, 4),
        seed=1,
        group=2,
    )
    resting = two_sources((1.0, 0.0))
    assert [resting[n] for n in range(alone.per_epoch)] == [
        alone[n] for n in range(alone.per_epoch)
    ]


def test_weights_are_shares_of_the_clips_and_meet_every_clip():
    repeats = repeats_of([3.0, 1.0], [1000, 100])
    assert repeats == pytest.approx((1.0, 1000 / 3 / 100))
    assert repeats_of([1.0, 0.0], [10, 5]) == (1.0, 0.0)
    counts = np.array([0, 3, 27, 1000])
    assert samples_per_epoch(counts, 0.1).tolist() == [0, 1, 3, 100], "2.7 are 3"
    assert samples_per_epoch(counts, 0.0).tolist() == [0, 0, 0, 0]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=8, max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_parts_follow_each_other_and_no_draw_is_made_twice(firsts: list[int], often: list[float]):
    bucket, shards, source = np.arange(90) % 3, np.arange(90) // 9, np.repeat([0, 1], 45)
    changes = [
        Change(first, 90, (often[2 * n] or 1.0, often[2 * n + 1]))
        for n, first in enumerate([0, *sorted(firsts)])
    ]

    def make(change: Change, source_repeats: list[SourceRepeats], first_epoch: int) -> Tape:
        return Tape(
            bucket,
            shards,
            BUCKETS,
            dict.fromkeys(BUCKETS, 3),
            seed=2,
            group=2,
            source_of_row=source,
            mix=source_repeats,
            first=change.first,
            first_epoch=first_epoch,
        )

    tape = TapeSequence(changes, make)
    total = 80
    assert max(met(tape, 0, total).values()) == 1
    assert [tape[index].index for index in range(total)] == list(range(total))
    epochs = [tape[index].epoch for index in range(total)]
    assert epochs == sorted(epochs)
    for step in range(0, total, 7):
        assert tape.index_after(tape.epochs_before(step)) == step or step in firsts
    costs = [tape.cost(tape[index]) for index in range(total)]
    assert tape.costs(0, total).tolist() == pytest.approx(costs)
    assert row_costs(tape, 4, 2, steps=20).sum() == pytest.approx(sum(costs))


# -- sources of a run ------------------------------------------------------------------------------


def stored(folder: Path, count: int, *, broken: int = 0) -> Path:
    """A folder with a manifest of `count` clips in one file that stands for their shards."""
    folder.mkdir(exist_ok=True)
    (folder / "shard.tar").write_bytes(bytes(100 * count))
    rows = [
        empty_row(
            shard="shard.tar", key=f"{folder.name}{n}", kind="video", offset=100 * n, length=100,
            codec="h264", frames=9, fps=8.0, height=48, width=48, duration=1.0, caption="a clip",
            sample_digest=f"{folder.name}{n}", drop_reason="unreadable" if n < broken else "",
        )
        for n in range(count)
    ]  # fmt: skip
    Manifest.from_rows(rows, folder).save(folder / "manifest.parquet")
    return folder


def config(tmp_path: Path, *names: str, mix: tuple[MixConfig, ...] = (), micro_batches: int = 1):
    cfg = compose(["experiment=parity_tiny"]).config
    sources = tuple(SourceConfig(name=name, source=str(tmp_path / name)) for name in names)
    data = cfg.data.model_copy(
        update={"source": "", "sources": sources, "mix": mix, "val_clips": 4}
    )
    train = cfg.train.model_copy(update={"micro_batches": micro_batches})
    return cfg.model_copy(update={"data": data, "train": train})


def planned(cfg: Config, sources: Sources, step: int = 0) -> tuple[Sources, TapeSequence]:
    table = [BucketSpec(Bucket(9, 48, 48), "48px", "1:1", 1.0)]
    found, tape, _ = plan(
        cfg, sources, table, lambda bucket: 27, float, now=step * cfg.train.micro_batches
    )
    return found, tape


def test_rows_of_several_sources_have_whole_paths_names_and_held_out_clips(tmp_path: Path):
    stored(tmp_path / "a", 40, broken=1), stored(tmp_path / "b", 30)
    sources = open_sources(config(tmp_path, "a", "b"), tmp_path / "run")
    assert len(sources.val) == 4 and len(sources.train) == 66
    assert Counter(sources.train.source.tolist()) == {"a": 38, "b": 28}
    assert sources.source_of_row.tolist() == [0] * 38 + [1] * 28
    assert sources.train.path(0) == str(tmp_path / "a" / "shard.tar")
    assert sources.train.path(40) == str(tmp_path / "b" / "shard.tar")
    assert not {*sources.train.key.tolist()} & {*sources.val.key.tolist()}


def test_mixes_of_stages_are_met_from_their_step_on(tmp_path: Path):
    stored(tmp_path / "a", 44), stored(tmp_path / "b", 22)
    mix = (MixConfig(weights={"a": 1.0}), MixConfig(from_step=30, weights={"a": 1.0, "b": 3.0}))
    cfg = config(tmp_path, "a", "b", mix=mix, micro_batches=2)
    sources, tape = planned(cfg, open_sources(cfg, tmp_path / "run"))
    of_b = [np.mean(sources.source_of_row[list(tape[index].rows)]) for index in range(60 + 4 * 40)]
    assert np.mean(of_b[:60]) == 0.0
    assert np.mean(of_b[60:]) == pytest.approx(0.75, abs=0.05)


def test_new_clips_join_at_the_end_of_the_epoch_and_keep_every_earlier_row(tmp_path: Path):
    stored(tmp_path / "a", 44), stored(tmp_path / "b", 33)
    cfg = config(tmp_path, "a", "b")
    first, tape = planned(cfg, open_sources(cfg, tmp_path / "run"))
    assert [snapshot.first for snapshot in first.snapshots] == [0]

    stored(tmp_path / "a", 60)
    state = [dataclasses.asdict(snapshot) for snapshot in first.snapshots]
    step = tape.parts[0].per_epoch + 2
    grown, longer = planned(
        cfg, open_sources(cfg, tmp_path / "run", SourceSnapshot.listed(state)), step
    )
    joint = 2 * tape.parts[0].per_epoch
    assert [snapshot.first for snapshot in grown.snapshots] == [0, joint]
    assert [longer[index] for index in range(joint)] == [tape[index] for index in range(joint)]
    assert grown.train.key[: len(first.train)].tolist() == first.train.key.tolist()
    assert grown.val.key.tolist() == first.val.key.tolist()
    epoch = met(longer, joint, joint + longer.parts[1].per_epoch)
    assert {row for row, _ in epoch} == set(range(len(first.train) + 16))
    assert min(number for _, number in epoch) == 2

    # Whoever goes on later, from before or behind the joint, finds the same tape.
    state = [dataclasses.asdict(snapshot) for snapshot in grown.snapshots]
    again, same = planned(
        cfg, open_sources(cfg, tmp_path / "run", SourceSnapshot.listed(state)), step + 1
    )
    assert again.snapshots == grown.snapshots
    assert [same[index] for index in range(3 * joint)] == [longer[n] for n in range(3 * joint)]


def test_a_source_that_is_not_what_it_was_is_refused(tmp_path: Path):
    stored(tmp_path / "a", 44), stored(tmp_path / "b", 33)
    cfg = config(tmp_path, "a", "b")
    snapshots = open_sources(cfg, tmp_path / "run").snapshots
    stored(tmp_path / "b", 20)
    with refuses(UserError, "source", "b", "trained"):
        open_sources(cfg, tmp_path / "run", snapshots)
    stored(tmp_path / "b", 33, broken=2)
    with refuses(UserError, "new shards", "end"):
        open_sources(cfg, tmp_path / "run", snapshots)
    with refuses(UserError, "sources", "a, b"):
        open_sources(config(tmp_path, "a"), tmp_path / "run", snapshots)


def test_one_manifest_is_one_source():
    rows = [empty_row(key=str(n), frames=9, fps=8.0, height=48, width=48) for n in range(5)]
    sources = Sources.of(Manifest.from_rows(rows, "/nowhere"))
    assert sources.names == (ONLY,) and sources.blocks == (5,)


ONE = ["data.source=''", "data.sources=[{name:a,source:x}]"]
TWO = ["data.source=''", "data.sources=[{name:a,source:x},{name:b,source:y}]"]


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (ONE[1:], ("data.source=shapes", "data.sources")),
        ([ONE[0], "data.sources=[{name:a,source:x},{name:a,source:y}]"], ("name of its own",)),
        ([*ONE, "data.mix=[{weights:{a:1}}]"], ("needs several sources",)),
        ([*TWO, "data.mix=[{weights:{c:1}}]"], ("'c'",)),
        ([*TWO, "data.mix=[{weights:{a:0}}]"], ("every source rest",)),
        ([*TWO, "data.mix=[{from_step:5,weights:{a:1}}]"], ("the first is 0",)),
        ([*TWO, "data.mix=[{weights:{a:1},repeats:{a:1}}]"], ("one of the two",)),
        ([*TWO, "data.mix=[{weights:{a:1}}]"], ("'b'",)),
        ([*TWO, "data.mix=[{weights:{a:-1}}]"], ("0 or more",)),
    ],
)
def test_a_mix_that_says_nothing_sensible_is_refused(overrides: list[str], facts: tuple[str, ...]):
    with refuses(ConfigError, *facts):
        compose(["experiment=parity_tiny", *overrides])

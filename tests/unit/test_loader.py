"""The loader: the tape's clips in the tape's order, whatever fails and however it is read."""

import gc
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from clip_files import inflate, number_of, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.config import BucketClass, BucketsConfig, DataConfig
from sora_train.data import loader as loader_module
from sora_train.data.decode.frames import DecodeRequest
from sora_train.data.decode.worker import TEST_HOOK
from sora_train.data.index.folder import open_source
from sora_train.data.latents.cache import LatentCache, latent_key
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.quarantine import Quarantine
from sora_train.data.sample import Bucket, Clip, Failure
from sora_train.data.tape.buckets import assign, build_buckets
from sora_train.data.tape.tape import Tape
from sora_train.errors import Fault, UserError

BUCKETS = BucketsConfig(
    fps=8, classes=(BucketClass(name="c", pixels=1536, frames=(1, 5), aspect_ratios=("3:2",)),)
)
TABLE = build_buckets(BUCKETS, temporal_factor=4, spatial_multiple=16)
NUM_CLIPS = 12


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(NUM_CLIPS):
        clip = folder / f"clip{number:02d}.mp4"
        # Each its own size, so that no two have the same bytes.
        write_clip(
            clip,
            count=12 if number % 4 else 3,
            height=32 + 2 * number,
            width=48 + 3 * number // 2 * 2,
        )
        clip.with_suffix(".txt").write_text(f"caption {number}")
    return open_source(str(folder), work_dir=folder / ".work")


def make(
    manifest: Manifest, *, micro_batches: int = 2, options: dict | None = None, **given: object
) -> Loader:
    found = assign(manifest, TABLE, BUCKETS, seed=0)
    buckets = [spec.bucket for spec in TABLE]
    tape = Tape(
        found.bucket_of_row, manifest.shard, buckets, dict.fromkeys(buckets, 2), seed=0, group=2
    )
    cfg = DataConfig(**{"max_drop_fraction": 0.5, "decode_timeout": 30.0, **(options or {})})
    return Loader(
        manifest,
        tape,
        BUCKETS,
        cfg,
        seed=0,
        micro_batches=micro_batches,
        reasons=found.reasons,
        **given,
    )


def seen(clip: Clip) -> tuple:
    assert clip.pixels is not None
    return clip.row, clip.epoch, clip.fps, clip.caption, clip.pixels.tobytes()


def walk(loader: Loader, steps: range) -> list[list[tuple]]:
    with loader:
        return [
            [seen(clip) for batch in loader.step(step) for clip in batch.clips] for step in steps
        ]


def test_clips_are_the_tapes_in_its_order(manifest: Manifest):
    with make(manifest) as loader:
        for step in range(5):
            for batch in loader.step(step):
                assert batch.micro_batch == loader.tape[batch.micro_batch.index]
                assert [clip.row for clip in batch.clips] == list(batch.micro_batch.rows)
                assert batch.weight == len(batch.clips) and not batch.failures
                for clip in batch.clips:
                    bucket = batch.micro_batch.bucket
                    assert clip.pixels.shape == (bucket.frames, bucket.height, bucket.width, 3)
                    assert (
                        clip.caption == f"caption {clip.row}"
                        and clip.digest == manifest.sample_digest[clip.row]
                    )
                    assert clip.fps == (8.0 if bucket.frames > 1 else 0.0)
                    numbers = [number_of(frame) for frame in clip.pixels]
                    assert (np.diff(numbers) == 1).all(), (
                        "consecutive frames at the clip's own rate"
                    )
        assert loader.wait_seconds > 0


def test_workers_prefetch_and_seeks_change_nothing(manifest: Manifest):
    plain = walk(make(manifest, options={"num_workers": 1, "prefetch": 1}), range(8))
    assert walk(make(manifest, options={"num_workers": 3, "prefetch": 9}), range(8)) == plain
    assert walk(make(manifest), range(6, 8)) == plain[6:]
    order = [7, 0, 3, 3, 1]
    assert walk(make(manifest), order) == [plain[step] for step in order]
    epoch = NUM_CLIPS // 4
    windows = {clip[0]: clip[4] for step in plain[:epoch] for clip in step}
    assert any(
        clip[4] != windows.get(clip[0], clip[4]) for step in plain[epoch:] for clip in step
    ), "another epoch shows other moments"


def test_ranks_share_what_one_would_read(manifest: Manifest):
    world = 3
    alone = walk(make(manifest, micro_batches=4), range(2))
    for step in range(2):
        together: list[tuple] = []
        slots = set()
        for rank in range(world):
            with make(manifest, micro_batches=4, rank=rank, world_size=world) as loader:
                batches = loader.step(step)
            slots.add(len(batches))
            for batch in batches:
                together += [seen(clip) for clip in batch.clips]
                if not batch.micro_batch.rows:
                    assert batch.weight == 0 and batch.micro_batch.bucket in loader.tape.buckets
        assert len(slots) == 1
        assert sorted(together) == sorted(alone[step])


@pytest.mark.parametrize(
    ("action", "reason"), [("spin", "decode_timeout"), ("abort", "decoder_crashed")]
)
def test_a_bad_clip_is_quarantined_and_nothing_stands_in_for_it(
    manifest, tmp_path, monkeypatch, action, reason
):
    monkeypatch.setenv(TEST_HOOK, f"{action}=clip05")
    options = {"decode_timeout": 1.0}
    with make(manifest, run_dir=tmp_path, options=options) as loader:
        steps = [loader.step(step) for step in range(2 * loader.tape.per_epoch // 2)]
    failed = [
        (step, failure)
        for step, batches in enumerate(steps)
        for b in batches
        for failure in b.failures
    ]
    assert {(failure.row, failure.reason) for _, failure in failed} == {(5, reason)} and len(
        failed
    ) == 2
    for batches in steps:
        for batch in batches:
            assert len(batch.clips) + len(batch.failures) == len(batch.micro_batch.rows)
            assert batch.weight == len(batch.clips)
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["step"], entry["row"], entry["key"], entry["reason"]) == (
        failed[0][0],
        5,
        "clip05.mp4",
        reason,
    )

    # A run that goes on, or starts over, meets the same failure without touching the clip again.
    monkeypatch.delenv(TEST_HOOK)
    with make(manifest, run_dir=tmp_path, options=options) as loader:
        again = [loader.step(step) for step in range(len(steps))]
    assert [[b.failures for b in batches] for batches in again] == [
        [b.failures for b in batches] for batches in steps
    ]


def test_too_many_losses_stop_the_run(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv(TEST_HOOK, "abort=clip0")
    with (
        make(manifest, run_dir=tmp_path, options={"max_drop_fraction": 0.2}) as loader,
        refuses(Fault, "3 of 12", "25.0 %", "decoder_crashed 3", "max_drop_fraction=0.2"),
    ):
        for step in range(8):
            loader.step(step)


def test_losses_known_before_the_run_are_the_users_to_mend(manifest: Manifest):
    lost = manifest.select(np.arange(len(manifest)))
    lost.drop_reason[:3] = "unreadable"
    with refuses(UserError, "3 of 12", "25.0 %", "unreadable 3"):
        make(lost, options={"max_drop_fraction": 0.2})


def test_missing_files_stop_the_run_and_are_not_counted(manifest: Manifest, tmp_path: Path):
    moved = manifest.select(np.arange(len(manifest)))
    moved.root = tmp_path / "unmounted"
    with make(moved, run_dir=tmp_path) as loader, pytest.raises(Fault, match="check the storage"):
        loader.step(0)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_stored_latents_come_instead_of_pixels(manifest: Manifest, tmp_path: Path):
    cache = LatentCache(tmp_path)
    with make(manifest, cache=cache, vae_digest="v1") as loader:
        chunks = loader.cache_chunks(3)
        assert sorted(row for _, rows in chunks for row in rows) == loader.tape.rows.tolist()
        assert [loader.cache_chunks(3, part, 2) for part in (0, 1)] == [chunks[0::2], chunks[1::2]]
        fps = {}
        for bucket, clips, failures in loader.chunks(chunks):
            assert not failures
            for clip in clips:
                assert clip.pixels.shape[0] == bucket.frames
                fps[clip.row] = clip.fps
                loader.store(clip.row, np.full((2, 2, 2, 2), clip.row, np.float32))
        assert loader.cache_chunks(3) == []
    with make(manifest, cache=cache, vae_digest="v1") as loader:
        for step in range(8):
            for batch in loader.step(step):
                for clip in batch.clips:
                    assert clip.pixels is None and (clip.latents == clip.row).all()
                    assert clip.fps == fps[clip.row] and clip.caption == f"caption {clip.row}"
        lost = loader.tape[40].rows[0]
        cache.path(loader.latent_key(lost)).write_bytes(b"torn")
        (clip,) = [c for batch in loader.step(20) for c in batch.clips if c.row == lost]
        assert clip.latents is None and clip.pixels is not None and cache.unreadable == 1
        assert [row for _, rows in loader.cache_chunks(3) for row in rows].count(lost) == 1
    with make(manifest, cache=cache, vae_digest="v2") as loader:
        assert loader.cache_chunks(3) == chunks, "another VAE's latents are not these"


def test_latent_keys_name_everything_that_matters():
    plain = {
        "digest": "d",
        "bucket": Bucket(5, 32, 48),
        "times": (0.0, 0.125),
        "crop": (0.0, 1.0, 2.0, 3.0),
    }
    changes = [
        {}, {"digest": "e"}, {"bucket": Bucket(5, 48, 32)}, {"times": (0.0, 0.25)},
        {"times": (0.01, 0.125)}, {"crop": (0.5, 1.0, 2.0, 3.0)}, {"crop": (0.0, 1.5, 2.0, 3.0)},
        {"crop": (0.0, 1.0, 2.5, 3.0)}, {"crop": (0.0, 1.0, 2.0, 4.0)}, {"vae_digest": "w"}, {"version": 99},
        {"dtype": "bfloat16"}, {"decoder": "decord 1"}, {"transform": 99},
    ]  # fmt: skip
    assert len({latent_key(**{**plain, "vae_digest": "v", **change}) for change in changes}) == len(
        changes
    )


def test_decord_is_refused_where_it_cannot_read(manifest: Manifest):
    pytest.importorskip("decord")
    av1 = manifest.select(np.arange(len(manifest)))
    av1.codec[3] = "av1"
    with refuses(UserError, "data.decoder=decord", "av1", "clip03.mp4"):
        make(av1, options={"decoder": "decord"})


def test_quarantine_is_shared_and_applies_from_its_step(tmp_path: Path):
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path, total=100, limit=0.05, dropped={"no_caption": 2})
    second = Quarantine(path, total=100, limit=0.05, dropped={"no_caption": 2})
    first.add(7, Failure(3, "unreadable", "x"), key="k")
    first.add(9, Failure(3, "unreadable", "again"))
    second.refresh()
    assert second.failure(3, 6) is None and second.failure(3, 7) == Failure(3, "unreadable", "x")
    assert second.counts() == {"no_caption": 2, "unreadable": 1}
    second.add(8, Failure(4, "decode_timeout", "y"))
    with path.open("a") as file:
        file.write('{"step": 1, "row": 5, "rea')
    first.refresh()
    assert first.counts() == {"no_caption": 2, "unreadable": 1, "decode_timeout": 1}, (
        "a torn line waits"
    )
    assert len(path.read_text().splitlines()) == 3


def test_a_warm_loader_does_not_make_its_caller_wait(manifest: Manifest):
    with make(manifest, options={"prefetch": 4}) as loader:
        loader.step(0)
        time.sleep(1.0)
        before = loader.wait_seconds
        loader.step(1)
        assert loader.wait_seconds - before < 0.25


def test_a_checkpoint_takes_the_quarantine_along(tmp_path: Path):
    options = {"total": 100, "limit": 0.03, "dropped": {}}
    first = Quarantine(tmp_path / "a" / "quarantine.jsonl", **options)
    first.add(7, Failure(3, "unreadable", "x"), shard="s.tar", key="k", backend="pyav")
    first.add(2, Failure(9, "decode_timeout", "y"), shard="s.tar", key="l", backend="pyav")
    lines = json.loads(json.dumps(first.lines()))
    assert [(line["row"], line["step"], line["key"]) for line in lines] == [
        (3, 7, "k"),
        (9, 2, "l"),
    ]

    elsewhere = Quarantine(tmp_path / "b" / "quarantine.jsonl", **options)
    beside = Quarantine(elsewhere.path, **options)
    elsewhere.restore(lines, record=True)
    beside.restore(lines, record=False)
    for found in (elsewhere, beside, Quarantine(elsewhere.path, **options)):
        assert found.lines() == lines and found.counts() == first.counts()
        assert found.failure(3, 6) is None and found.failure(9, 2) == Failure(
            9, "decode_timeout", "y"
        )
    first.restore(lines, record=True)
    assert len(first.path.read_text().splitlines()) == 2, "nothing is written twice"
    with pytest.raises(Fault, match="max_drop_fraction=0.03"):
        first.restore([{**lines[0], "row": row} for row in (11, 12)], record=True)


def damaged_set(folder: Path) -> Path:
    """Sixty captioned clips of which three look right to a probe of the header, and are not."""
    folder.mkdir()
    for number in range(60):
        clip = folder / f"clip{number:02d}.mp4"
        write_clip(clip, count=5, height=32 + 2 * number, width=48 + 3 * number // 2 * 2)
        clip.with_suffix(".txt").write_text(f"caption {number}")
    for number in (7, 31):
        clip = folder / f"clip{number:02d}.mp4"
        data = clip.read_bytes()
        clip.write_bytes(data[:-30] + bytes(30))  # the last two of its five frames
    clip = folder / "clip44.mp4"
    clip.write_bytes(inflate(clip.read_bytes()))
    return folder


def test_a_set_that_is_damaged_beyond_the_limit_stops_with_the_table_of_reasons(tmp_path: Path):
    source = damaged_set(tmp_path / "clips")
    made = open_source(str(source), work_dir=tmp_path / "work", probe="header")
    assert made.dropped() == {}, "no header tells of the damage"
    steps = range(40)
    with (
        make(made, run_dir=tmp_path / "strict", options={"max_drop_fraction": 0.04}) as loader,
        refuses(
            Fault,
            "3 of 60",
            "5.0 %",
            "too_few_frames 1",
            "unreadable 2",
            "data.max_drop_fraction=0.04",
        ),
    ):
        for step in steps:
            loader.step(step)
    lines = [
        json.loads(line)
        for line in (tmp_path / "strict" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert {(line["shard"], line["key"], line["reason"], line["backend"]) for line in lines} == {
        (f"clip{number}.mp4", f"clip{number}.mp4", reason, "pyav")
        for number, reason in (("07", "unreadable"), ("31", "unreadable"), ("44", "too_few_frames"))
    }
    assert all(line["step"] in steps and line["detail"] for line in lines)
    with make(made, run_dir=tmp_path / "lax", options={"max_drop_fraction": 0.05}) as loader:
        used = [
            clip.row
            for step in range(loader.tape.per_epoch // 2)
            for batch in loader.step(step)
            for clip in batch.clips
        ]
        lost = loader.quarantine.counts()
    assert sorted(used) == sorted(set(range(60)) - {7, 31, 44})
    assert len(used) + sum(lost.values()) == len(made)


# -- memory ---------------------------------------------------------------------------------------

MB = 1_000_000
CLIP_MB = 5 * 32 * 48 * 3 / MB


class StandInPool:
    """Answers at once with pixels of the size asked for."""

    alive = True

    def __init__(self, *_: object, **__: object):
        """As many processes as are asked for: none."""

    def submit(self, request: DecodeRequest, *, convert: Callable) -> Future:
        future: Future = Future()
        pixels = np.zeros((len(request.times), request.height, request.width, 3), np.uint8)
        future.set_result(convert(pixels))
        return future

    def close(self) -> None:
        """Nothing to end."""


def delivered(loader: Loader, steps: int, bound: float) -> list[list[tuple]]:
    """What comes in `steps`, none of them with more than `bound` bytes ahead once it has come."""
    found = []
    for step in range(steps):
        batches = loader.step(step)
        ahead = [
            future.result().pixels.nbytes
            for futures, _ in loader._pending.values()
            for future in futures
        ]
        assert sum(ahead) <= bound
        found.append([(clip.row, clip.epoch, clip.fps) for b in batches for clip in b.clips])
    return found


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 20 * CLIP_MB), st.integers(1, 12), st.integers(1, 4), st.integers(1, 2))
def test_no_more_waits_ahead_than_the_bound_and_it_changes_nothing(
    manifest: Manifest, room_mb: float, prefetch: int, micro_batches: int, world_size: int
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "DecodePool", StandInPool)
        how = {"micro_batches": micro_batches, "world_size": world_size}
        with make(manifest, options={"prefetch_mb": 1e6, "prefetch": 1}, **how) as loader:
            plain = delivered(loader, 6, np.inf)
        options = {"prefetch_mb": room_mb, "prefetch": prefetch}
        with make(manifest, options=options, **how) as loader:
            assert delivered(loader, 6, room_mb * MB) == plain
            assert len(loader._pending) <= prefetch


def test_the_bound_is_used_up(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    """Otherwise a loader that reads nothing ahead would keep to every bound."""
    monkeypatch.setattr(loader_module, "DecodePool", StandInPool)
    for prefetch_mb, expected in ((1000, 4), (0, 0), (2 * CLIP_MB, 1)):
        with make(manifest, options={"prefetch_mb": prefetch_mb}) as loader:
            found = []
            for step in range(6):
                loader.step(step)
                found.append(len(loader._pending))
            # A micro-batch holds two clips, of five frames or of one.
            assert max(found) >= expected and (expected or not max(found)), found
            assert prefetch_mb != 1000 or set(found) == {4}


def test_stored_latents_count_with_their_own_bytes(manifest: Manifest, tmp_path: Path):
    cache = LatentCache(tmp_path)
    latents = np.zeros((4, 2, 4, 6), np.float32)
    room = 2.1 * 2 * (latents.nbytes + 128) / MB
    with make(manifest, cache=cache, options={"prefetch_mb": room, "prefetch": 9}) as loader:
        for row in loader.tape.rows.tolist():
            loader.store(row, latents)
        for step in range(4):
            loader.step(step)
            ahead = sum(len(futures) for futures, _ in loader._pending.values())
            assert 3 <= ahead <= 4, "room for four clips; a micro-batch holds two, or one left over"


def test_what_was_delivered_is_forgotten_without_the_garbage_collector(manifest: Manifest):
    """Clips held by objects that hold each other stay until a collection that may be long in coming."""

    def alive(kind: type) -> int:
        return sum(isinstance(found, kind) for found in gc.get_objects())

    with make(manifest, options={"prefetch": 4}) as loader:
        loader.step(0)
        gc.collect()
        gc.disable()
        try:
            # Two clips a micro-batch, two of these in the step and four ahead; a few on their way.
            most = 2 * (2 + 4) + loader._cfg.num_workers
            for step in range(1, 40):
                loader.step(step)
            assert alive(Future) <= most and alive(Clip) <= most
        finally:
            gc.enable()

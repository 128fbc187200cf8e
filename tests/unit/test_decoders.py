"""`data.decoder=auto`: the choice follows the measured table alone, shows PyAV's pixels, and is made once."""

import importlib.util
from concurrent.futures import Future
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clip_files import write_coded
from hypothesis import given
from hypothesis import strategies as st

from sora_train.config import BucketClass, BucketsConfig, DataConfig
from sora_train.data.decode.frames import TimedRequest
from sora_train.data.decode.pool import DecodePool
from sora_train.data.index import decoders
from sora_train.data.index.folder import open_source
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.tape.buckets import assign, build_buckets
from sora_train.data.tape.tape import Tape

H264, AV1 = "a.mp4", "b.mp4"
BUCKETS = BucketsConfig(
    fps=8, classes=(BucketClass(name="c", pixels=8192, frames=(9,), aspect_ratios=("2:1",)),)
)
TABLE = build_buckets(BUCKETS, temporal_factor=4, spatial_multiple=16)
SECONDS = st.floats(1e-4, 10)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A clip of H.264 and one of AV1, which decord's wheel cannot read; a keyframe each 12 frames."""
    if any(importlib.util.find_spec(name) is None for name in decoders.OTHERS):
        pytest.skip("decord and torchcodec are not both installed")
    folder = tmp_path_factory.mktemp("clips")
    for name, codec, options in (
        (H264, "libx264", {"g": "12"}),
        (AV1, "libsvtav1", {"preset": "13", "g": "12"}),
    ):
        path = folder / name
        write_coded(path, list(range(84)), Fraction(1, 25), codec=codec, options=options)
        path.with_suffix(".txt").write_text(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoders, "LIGHT_BYTES", 0)
        return open_source(str(folder), work_dir=folder / "work")


def row_of(manifest: Manifest, key: str) -> int:
    return manifest.key.tolist().index(key)


def with_times(manifest: Manifest, key: str, **times: float) -> Manifest:
    """The manifest where these times were measured for the kind of a clip, in every pattern."""
    made = manifest.select(np.arange(len(manifest)))
    patterns = (decoders.STILL, decoders.RUN, decoders.SPREAD)
    kind = decoders.kind_of(manifest, row_of(manifest, key))
    made.decoders = {kind: dict.fromkeys(patterns, times)}
    return made


def open_loader(manifest: Manifest, **options: object) -> Loader:
    found = assign(manifest, TABLE, BUCKETS, seed=0)
    (bucket,) = [spec.bucket for spec in TABLE]
    tape = Tape(found.bucket_of_row, manifest.shard, [bucket], {bucket: 1}, seed=0, group=1)
    data = DataConfig(**{"max_drop_fraction": 0.0, "num_workers": 1, **options})
    return Loader(manifest, tape, BUCKETS, data, seed=0, micro_batches=1)


@given(st.dictionaries(st.sampled_from(decoders.OTHERS), SECONDS), SECONDS)
def test_the_fastest_is_taken_where_it_saves_a_tenth(others: dict[str, float], pyav: float):
    chosen = decoders.fastest({**others, "pyav": pyav})
    assert decoders.fastest(dict(reversed([*others.items(), ("pyav", pyav)]))) == chosen
    best = min(others.values(), default=pyav)
    if best <= 0.9 * pyav:
        assert others[chosen] == best
    else:
        assert chosen == "pyav"
    assert decoders.fastest({}) == "pyav"


def test_a_pattern_is_how_far_apart_the_frames_are():
    assert decoders.pattern_of((3.0,), 24) == decoders.STILL
    assert decoders.pattern_of((3.0, 3.0 + 2 / 24), 24) == decoders.RUN
    assert decoders.pattern_of((3.0, 3.0 + 3 / 24), 24) == decoders.SPREAD


def test_every_kind_is_measured_in_every_pattern_and_kept(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kinds = {key: decoders.kind_of(manifest, row_of(manifest, key)) for key in (H264, AV1)}
    assert kinds[H264].startswith("h264 yuv420p") and kinds[H264].endswith("sd keys_near")
    assert set(manifest.decoders) == set(kinds.values())
    for key, names in ((H264, {"pyav", *decoders.OTHERS}), (AV1, {"pyav", "torchcodec"})):
        times = manifest.decoders[kinds[key]]
        assert set(times) == {decoders.STILL, decoders.RUN, decoders.SPREAD}
        assert all(set(times[pattern]) == names for pattern in times), key
        assert all(0 < spent < 60 for each in times.values() for spent in each.values())
    manifest.save(tmp_path / "manifest.parquet")
    again = Manifest.load(tmp_path / "manifest.parquet")
    assert again.decoders == manifest.decoders and again.digest() == manifest.digest()
    # What is known is never measured again.
    monkeypatch.setattr(decoders, "LIGHT_BYTES", 0)
    monkeypatch.setattr(decoders, "DecodePool", None)
    assert decoders.measured(again, 60.0).decoders == manifest.decoders
    joined = Manifest.joined([with_times(again, AV1, pyav=1.0), again], tmp_path, {})
    assert joined.decoders == {**again.decoders, kinds[AV1]: joined.decoders[kinds[AV1]]}
    assert joined.decoders[kinds[AV1]][decoders.RUN] == {"pyav": 1.0}, "the first counts"


class SomeOtherPixel(DecodePool):
    """A pool in which decord's last pixel is one brighter, as a decoder's rounding might make it."""

    def submit(self, request: TimedRequest) -> Future:  # type: ignore[override]
        def brighter(answer: tuple[float, np.ndarray]) -> tuple[float, np.ndarray]:
            if request.backend == "decord":
                answer[1][-1, -1, -1, -1] ^= 1
            return answer

        return super().submit(request, convert=brighter)


def test_a_decoder_with_another_pixel_is_never_taken(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decoders, "DecodePool", SomeOtherPixel)
    monkeypatch.setattr(decoders, "LIGHT_BYTES", 0)
    manifest = manifest.select(np.array([row_of(manifest, H264)]))
    manifest.decoders = {}
    (times,) = decoders.measured(manifest, 60.0).decoders.values()
    assert all(set(each) == {"pyav", "torchcodec"} for each in times.values())


def test_the_loader_goes_by_the_table(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    row = row_of(manifest, H264)
    by_decord = with_times(manifest, H264, pyav=1.0, decord=0.5, torchcodec=0.7)
    by_torchcodec = with_times(manifest, H264, pyav=1.0, torchcodec=0.7)
    pixels, keys = [], []
    for table, name, program in (
        (by_decord, "decord", "pyav"),
        (by_torchcodec, "torchcodec", "torchcodec"),
        (with_times(manifest, H264, pyav=1.0, decord=0.95), "pyav", "pyav"),
        (with_times(manifest, AV1, pyav=1.0, torchcodec=0.5), "pyav", "torchcodec"),
    ):
        with open_loader(table) as loader:
            assert (loader.request(row, 0).backend, loader.program) == (name, program)
            keys.append(loader.latent_key(row))
            if name == program or name == "decord":
                (clip,), failures = loader.decode_rows([row])
                assert not failures
                pixels.append(clip.pixels.tobytes())
    assert len(pixels) == 3 and len(set(pixels)) == len(set(keys)) == 1
    with open_loader(by_decord, decoder="torchcodec") as loader:
        assert loader.request(row, 0).backend == "torchcodec"
    marked = by_decord.with_columns(traits=np.full(len(by_decord), "gaps", object))
    with open_loader(marked) as loader:
        assert loader.request(row, 0).backend == "pyav"
    monkeypatch.setattr(decoders, "installed", list)
    with open_loader(by_decord) as loader:
        assert (loader.request(row, 0).backend, loader.program) == ("pyav", "pyav")


def test_a_clip_that_the_fastest_cannot_read_is_read_by_pyav(manifest: Manifest):
    row = row_of(manifest, AV1)
    with (
        open_loader(with_times(manifest, AV1, pyav=1.0, decord=0.1)) as loader,
        DecodePool(1, 60.0) as pool,
    ):
        request = loader.request(row, 0)
        assert request.backend == "decord"
        assert pool.submit(request).result().reason == "unreadable"
        (clip,), failures = loader.decode_rows([row])
        ours = pool.submit(replace(request, backend="pyav")).result()
        assert not failures and np.array_equal(clip.pixels, ours)
        assert len(loader.quarantine) == 0

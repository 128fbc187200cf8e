"""Remote bytes: the right ones or a fault of storage in time, whatever the server does."""

import functools
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from clip_files import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from range_server import RangeServer
from s3_server import S3Server
from sentences import refuses, says

from sora_train.config import BucketClass, BucketsConfig, DataConfig
from sora_train.data.decode.probe import ProbeRequest, _digest
from sora_train.data.decode.worker import TEST_HOOK
from sora_train.data.index.shard_writer import ShardWriter
from sora_train.data.index.shards import HowToIndex, index_shards
from sora_train.data.index.tars import MemberKeys
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.storage import cached_reads as reading
from sora_train.data.storage import remote
from sora_train.data.storage.cached_reads import read_range, require
from sora_train.data.storage.disk_cache import DiskCache
from sora_train.data.storage.ranges import StorageFault
from sora_train.data.storage.retry import ReadPolicy
from sora_train.data.tape.buckets import assign, build_buckets
from sora_train.data.tape.tape import Tape
from sora_train.errors import Fault, UserError

QUICK = ReadPolicy(retries=3, timeout=2.0, first_pause=0.02)
HASTY = ReadPolicy(retries=1, timeout=0.5, first_pause=0.02)
DATA = bytes(range(256)) * 40


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(DATA)
    with RangeServer(folder) as made:
        yield made


@pytest.mark.parametrize(
    "faults", [[], ["503", "503"], ["half"], ["stall"], ["other", "429", "half"], ["trickle"]]
)
def test_passing_faults_change_no_byte(server: RangeServer, faults: list[str]):
    server.faults.extend(faults)
    assert read_range(server.url("a.tar"), 512, 1000, QUICK) == DATA[512:1512]
    assert server.asked == [("/a.tar", "bytes=512-1511")] * (len(faults) + 1)


@pytest.mark.parametrize(
    ("always", "facts"),
    [
        ("503", ("HTTP 503",)),
        ("half", ("closed", "500 of 1000 bytes")),
        ("stall", ("data.read_timeout=0.5 s",)),
        ("trickle", ("data.read_timeout=0.5 s",)),
        ("other", ("another range", "bytes 1-1000/10240")),
    ],
)
def test_lasting_faults_end_in_time_and_say_what_was_tried(
    server: RangeServer, always: str, facts: tuple[str, ...]
):
    server.always = always
    began = time.monotonic()
    with pytest.raises(StorageFault) as caught:
        read_range(server.url("a.tar"), 0, 1000, HASTY)
    assert time.monotonic() - began < HASTY.deadline + 3
    says(caught.value, server.url("a.tar"), "1000 bytes from 0", "2 attempts", *facts)
    assert len(server.asked) == HASTY.retries + 1


@pytest.mark.parametrize(
    ("always", "name", "offset", "facts"),
    [
        ("", "b.tar", 0, ("HTTP 404 Not Found",)),
        ("403", "a.tar", 0, ("HTTP 403 Forbidden",)),
        ("whole", "a.tar", 512, ("no byte ranges",)),
        ("", "a.tar", len(DATA) - 10, (f"byte {len(DATA)}", "before the index")),
        ("", "a.tar", len(DATA) + 10, ("before the index",)),
    ],
)
def test_what_another_attempt_cannot_mend_is_not_tried_again(server, always, name, offset, facts):
    server.always = always
    with refuses(StorageFault, *facts) as caught:
        read_range(server.url(name) + "?signature=secret", offset, 1000, QUICK)
    assert "(1 attempt in" in str(caught.value) and len(server.asked) == 1
    assert "secret" not in str(caught.value)


def test_a_loose_file_needs_no_ranges_and_no_bytes_no_server(server: RangeServer):
    server.always = "whole"
    assert read_range(server.url("a.tar"), 0, len(DATA), QUICK) == DATA
    assert read_range("http://127.0.0.1:1/gone", 0, 0, QUICK) == b""


def test_a_server_that_is_not_there():
    with pytest.raises(StorageFault, match=r"http://127\.0\.0\.1:1/a\.tar.*4 attempts"):
        read_range("http://127.0.0.1:1/a.tar", 0, 5, QUICK)


def test_other_schemes_go_through_fsspec():
    with fsspec.open("memory://reading/a.tar", "wb") as file:
        file.write(DATA)
    assert read_range("memory://reading/a.tar", 300, 50, QUICK) == DATA[300:350]
    with refuses(StorageFault, "memory://reading/b.tar", "1 attempt"):
        read_range("memory://reading/b.tar", 300, 50, QUICK)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, scheme: str, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*sora_train\[{scheme}\]"):
        require(["local.tar", f"{scheme}://bucket/a.tar"])
    require(["local.tar", "https://host/a.tar"])


def test_a_cache_folder_that_cannot_be_is_refused_before_the_run(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with refuses(UserError, "data.disk_cache_dir", "cache", "local disk"):
        require(["https://host/a.tar"], str(tmp_path / "cache"))
    require(["local.tar"], str(tmp_path / "cache"))


@given(st.integers(0, 12), st.integers(0, 1 << 40))
def test_pauses_are_keyed_and_grow_within_bounds(attempt: int, offset: int):
    policy = ReadPolicy(first_pause=0.5)
    pause = policy.pause(attempt, "u", offset)
    assert pause == policy.pause(attempt, "u", offset) != policy.pause(attempt, "u", offset + 1)
    mean = min(10.0, 0.5 * 2**attempt)
    assert 0.5 * mean <= pause <= 1.5 * mean


def test_what_was_read_is_read_once(server: RangeServer, tmp_path: Path):
    policy = ReadPolicy(0, 5.0, str(tmp_path / "cache"), 100_000)
    url = server.url("a.tar")
    for _ in range(3):
        assert read_range(url, 100, 50, policy) == DATA[100:150]
    assert len(server.asked) == 1
    read_range(url, 100, 51, policy)
    read_range(url, 100, 50, policy, digest=sha256(DATA[100:150]))
    assert len(server.asked) == 3
    for path in (tmp_path / "cache").glob("??/*.bytes"):
        path.write_bytes(path.read_bytes().replace(DATA[110:112], b"??"))
    assert read_range(url, 100, 50, policy) == DATA[100:150], "a damaged file is read again"
    server.always = "404"
    with pytest.raises(StorageFault):
        read_range(url, 0, 7, policy)


# -- blocks ---------------------------------------------------------------------------------------

STAMP = (len(DATA), "fingerprint")


def blocks(folder: Path, block: int = 1000, bound: int = 100_000) -> ReadPolicy:
    return ReadPolicy(1, 5.0, str(folder), bound, first_pause=0.02, block_bytes=block)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_ranges_in_any_order_take_each_block_once(data: st.DataObject):
    block = data.draw(st.integers(300, 6000))
    starts = st.integers(0, len(DATA) - 1)
    ranges = data.draw(st.lists(st.tuples(starts, st.integers(1, 4000)), min_size=1, max_size=8))
    asked: list[range] = []

    def served(_url: str, offset: int, length: int, *_: object) -> bytes:
        asked.append(range(offset, offset + length))
        assert offset + length <= len(DATA), "nothing is asked beyond the end"
        return DATA[offset : offset + length]

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "fetch", served)
        for start, length in ranges:
            end = min(len(DATA), start + length)
            found = read_range(
                "http://h/a.tar", start, end - start, blocks(Path(folder), block), stamp=STAMP
            )
            assert found == DATA[start:end]
    numbers = [
        number for run in asked for number in range(run.start // block, -(-run.stop // block))
    ]
    assert len(numbers) == len(set(numbers)), "no block is asked for twice"
    assert all(run.start % block == 0 for run in asked)
    assert sum(map(len, asked)) == sum(min(block, len(DATA) - n * block) for n in numbers)


def test_many_small_clips_are_few_requests(server: RangeServer, tmp_path: Path):
    policy = blocks(tmp_path / "cache", block=4096)
    for start in range(0, len(DATA) - 50, 50):
        found = read_range(server.url("a.tar"), start, 50, policy, stamp=STAMP)
        assert found == DATA[start : start + 50]
    assert server.asked == [
        ("/a.tar", f"bytes={start}-{min(start + 4096, len(DATA)) - 1}") for start in (0, 4096, 8192)
    ]
    read_range(server.url("a.tar"), 0, 50, policy, stamp=(len(DATA), "of a newer file"))
    assert len(server.asked) == 4


def test_a_wide_range_is_one_request_for_what_is_missing(server: RangeServer, tmp_path: Path):
    policy = blocks(tmp_path / "cache")
    read_range(server.url("a.tar"), 3500, 10, policy, stamp=STAMP)
    assert read_range(server.url("a.tar"), 500, 7000, policy, stamp=STAMP) == DATA[500:7500]
    assert [asked for _, asked in server.asked] == [
        "bytes=3000-3999", "bytes=0-2999", "bytes=4000-7999"
    ]  # fmt: skip


def test_processes_that_want_a_block_at_once_fetch_it_once(server: RangeServer, tmp_path: Path):
    server.pause = 0.3
    code = (
        "import sys\n"
        "from sora_train.data.storage.cached_reads import read_range\n"
        "from sora_train.data.storage.retry import ReadPolicy\n"
        "policy = ReadPolicy(0, 30.0, sys.argv[2], 100_000, block_bytes=4096)\n"
        "print('up', flush=True); sys.stdin.read()\n"
        f"print(read_range(sys.argv[1], 4000, 200, policy, stamp={STAMP}).hex())\n"
    )
    command = [sys.executable, "-c", code, server.url("a.tar"), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in running:
        assert process.stdout.readline() == "up\n"
    for process in running:
        process.stdin.close()
        process.stdin = None
    for process in running:
        assert bytes.fromhex(process.communicate(timeout=240)[0]) == DATA[4000:4200]
    assert [asked for _, asked in server.asked] == ["bytes=0-8191"]


def test_a_holder_that_is_stuck_blocks_nobody_for_long(tmp_path: Path):
    cache = DiskCache(tmp_path, 1000)
    with cache.fetching(["aaa1", "bbb1"], time.monotonic()):
        began = time.monotonic()
        with cache.fetching(["bbb2", "ccc1"], began + 0.2):
            assert 0.2 <= time.monotonic() - began < 10
    began = time.monotonic()
    with cache.fetching(["bbb2", "bbb3"], began + 60):
        assert time.monotonic() - began < 20, "the lock went with its holder"


# -- what was indexed -----------------------------------------------------------------------------


def ends_digest(data: bytes) -> str:
    request = ProbeRequest(0, "k", "p", 0, len(data), "video", count="header")
    return _digest(io.BytesIO(data), request)


@pytest.mark.parametrize("digest_of", [sha256, ends_digest])
@pytest.mark.parametrize("cached", [False, True])
def test_bytes_that_are_not_those_indexed_stop_the_run(server, tmp_path, digest_of, cached):
    policy = blocks(tmp_path / "cache") if cached else QUICK
    url, digest = server.url("a.tar") + "?signature=secret", digest_of(DATA[500:2500])
    assert read_range(url, 500, 2000, policy, digest=digest, stamp=STAMP) == DATA[500:2500]
    with refuses(StorageFault, "a.tar", "2000 bytes from 501", "changed", "index") as caught:
        read_range(url, 501, 2000, policy, digest=digest, stamp=STAMP)
    assert "secret" not in str(caught.value)


def test_a_cache_of_another_file_is_read_afresh(server: RangeServer, tmp_path: Path):
    """A change that the shard's fingerprint does not tell: the sample's digest does."""
    policy, url = blocks(tmp_path / "cache"), server.url("a.tar")
    read_range(url, 0, 3000, policy, stamp=STAMP)
    changed = DATA[:1500] + b"another" + DATA[1507:]
    (server.folder / "a.tar").write_bytes(changed)
    found = read_range(url, 1200, 600, policy, stamp=STAMP, digest=sha256(changed[1200:1800]))
    assert found == changed[1200:1800]
    assert read_range(url, 1200, 600, policy, stamp=STAMP) == found


def test_a_cache_that_cannot_be_written_is_named(server: RangeServer, tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    policy = ReadPolicy(0, 5.0, str(tmp_path / "cache"), 1000)
    with refuses(StorageFault, "data.disk_cache_dir", "cache"):
        read_range(server.url("a.tar"), 0, 7, policy)


def stored(cache: DiskCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.glob("??/*"))


def test_the_least_recently_used_go_first_and_the_bound_holds(tmp_path: Path):
    cache = DiskCache(tmp_path, 1000)
    for number in range(9):
        cache.put(f"k{number:02d}", bytes([number]) * 96)
        os.utime(cache.path(f"k{number:02d}"), (number, number))
    assert cache.get("k00") == bytes(96)
    for number in range(9, 12):
        cache.put(f"k{number:02d}", bytes([number]) * 96)
        assert stored(cache) <= 1000
    assert cache.get("k00") is not None, "it was used last"
    assert cache.get("k01") is None and cache.get("k11") == bytes([11]) * 96
    cache.put("large", bytes(2000))
    assert cache.get("large") is None and cache.get("k11") is not None
    cache.put("whole", bytes(996))
    assert cache.get("whole") == bytes(996) and stored(cache) == 1000


def test_a_lost_account_and_files_left_over_are_dealt_with(tmp_path: Path):
    cache = DiskCache(tmp_path, 1000)
    for number in range(9):
        cache.put(f"k{number:02d}", bytes(96))
    left = tmp_path / "k0" / ".k0.1.1.tmp"
    left.write_bytes(bytes(50))
    os.utime(left, (0, 0))
    (tmp_path / "bytes.txt").write_text("nonsense")
    cache.put("k90", bytes(96))
    assert not left.exists() and cache.get("k90") is not None
    cache.put("k91", bytes(96))
    assert stored(cache) <= 1000


def test_processes_share_a_cache(tmp_path: Path):
    code = (
        "import sys; from sora_train.data.storage.disk_cache import DiskCache\n"
        "cache = DiskCache(sys.argv[1], 5000)\n"
        "for number in range(150):\n"
        "    key = f'{number * 7 % 40:02d}'\n"
        "    found = cache.get(key)\n"
        "    assert found in (None, key.encode() * 100), key\n"
        "    cache.put(key, key.encode() * 100)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    cache = DiskCache(tmp_path, 5000)
    assert 0 < stored(cache) <= 5000
    assert int((tmp_path / "bytes.txt").read_text()) >= stored(cache), "at least what is there"
    assert not list(tmp_path.glob("??/.*"))


# -- end to end: the loader trains from remote shards ---------------------------------------------

BUCKETS = BucketsConfig(
    fps=8, classes=(BucketClass(name="c", pixels=1536, frames=(1, 5), aspect_ratios=("3:2",)),)
)
TABLE = build_buckets(BUCKETS, temporal_factor=4, spatial_multiple=16)
NUM_CLIPS = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("shards")
    clips = tmp_path_factory.mktemp("clips")
    with ShardWriter(folder / "out", max_bytes=8000) as writer:
        for number in range(NUM_CLIPS):
            height, width = 32 + 2 * number, 48 + 4 * number
            clip = write_clip(clips / f"{number}.mp4", 12, height=height, width=width)
            meta: dict[str, object] = {
                "kind": "video", "codec": "h264", "frames": 12, "fps": 8.0, "duration": 1.5,
                "height": height, "width": width,
            }  # fmt: skip
            meta["sample_digest"] = sha256(clip.read_bytes())
            writer.write(f"clip{number}", clip.read_bytes(), "mp4", f"caption {number}", meta)
    return Manifest.load(folder / "out" / "manifest.parquet")


def remote_of(manifest: Manifest, server: RangeServer) -> Manifest:
    made = manifest.select(np.arange(len(manifest)))
    made.shard[:] = [server.url(shard) for shard in manifest.shard]
    made.root = Path("/nowhere")
    return made


def loader_of(manifest: Manifest, run_dir: Path | None = None, **options: object) -> Loader:
    found = assign(manifest, TABLE, BUCKETS, seed=0)
    buckets = [spec.bucket for spec in TABLE]
    # Both manifests name their shards in the same order, so they have the same tape.
    tape = Tape(
        found.bucket_of_row, manifest.shard, buckets, dict.fromkeys(buckets, 2), seed=0, group=2
    )
    cfg = DataConfig(**{"max_drop_fraction": 0.5, "decode_timeout": 30.0, **options})
    return Loader(
        manifest,
        tape,
        BUCKETS,
        cfg,
        seed=0,
        micro_batches=2,
        reasons=found.reasons,
        run_dir=run_dir,
    )


def pixels(loader: Loader, steps: int) -> dict[tuple[int, int], bytes]:
    with loader:
        return {
            (clip.epoch, clip.row): clip.pixels.tobytes()
            for step in range(steps)
            for batch in loader.step(step)
            for clip in batch.clips
            if clip.pixels is not None
        }


def test_remote_shards_give_the_pixels_of_local_ones(shards: Manifest, tmp_path: Path):
    assert len(set(shards.shard)) > 1
    local = pixels(loader_of(shards), 4)
    assert len(local) >= NUM_CLIPS
    with RangeServer(shards.root) as server:
        server.faults.extend(["503", "half", "503", "half"])
        far = remote_of(shards, server)
        options = {"disk_cache_dir": str(tmp_path / "cache"), "read_timeout": 5.0}
        found = pixels(loader_of(far, tmp_path, **options), 4)
        assert found == local
        asked = len(server.asked)
        assert asked >= NUM_CLIPS
        assert pixels(loader_of(far, tmp_path, **options), 4) == local
        assert len(server.asked) == asked, "the second run reads from the local disk"
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("always", ["503", "stall"])
def test_a_server_that_stays_down_stops_the_run_and_blames_no_clip(
    shards: Manifest, tmp_path: Path, always: str
):
    with RangeServer(shards.root) as server:
        server.always = always
        # The clip's own deadline is the shorter one: waiting for storage must not count against it.
        options = {"read_retries": 1, "read_timeout": 1.2, "decode_timeout": 1.0}
        with loader_of(remote_of(shards, server), tmp_path, **options) as loader:
            began = time.monotonic()
            with refuses(Fault, ".tar", "2 attempts", "storage"):
                loader.step(0)
            assert time.monotonic() - began < 10, "the processes' start included"
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_a_remote_clip_that_spins_has_its_own_deadline_not_the_storages(
    shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(TEST_HOOK, "spin=clip1")
    with RangeServer(shards.root) as server:
        options = {"read_timeout": 60.0, "decode_timeout": 1.0}
        with loader_of(remote_of(shards, server), tmp_path, **options) as loader:
            began = time.monotonic()
            failures = [
                failure
                for step in range(2)
                for batch in loader.step(step)
                for failure in batch.failures
            ]
            # Far below the six attempts of a minute that storage would have.
            assert time.monotonic() - began < 60
    assert [(failure.row, failure.reason) for failure in failures] == [(1, "decode_timeout")]


# -- S3 -------------------------------------------------------------------------------------------


def shards_in(bucket: Path, shards: Manifest) -> None:
    """The shards as plain webdataset tars of someone else's."""
    bucket.mkdir(parents=True)
    for shard in sorted(set(shards.shard.tolist())):
        (bucket / shard).write_bytes((shards.root / shard).read_bytes())


def test_s3_from_the_index_to_the_loader(
    shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Index by a pattern, then train through the cache, while the server is busy and hangs up half way."""
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(remote, "_of_scheme", functools.lru_cache(remote._of_scheme.__wrapped__))
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    shards_in(tmp_path / "served" / "bucket", shards)
    with S3Server(tmp_path / "served") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.faults.extend(["503", "half"])
        how = HowToIndex(MemberKeys(captions=("txt",)))
        far = index_shards("s3://bucket/*.tar", tmp_path / "index", how, workers=1)
        assert not server.faults
        assert far is not None and far.dropped() == {} and len(far) == NUM_CLIPS
        assert far.path(0).startswith("s3://bucket/") and set(far.shards) == set(far.shard)
        assert far.sample_digest.tolist() == shards.sample_digest.tolist()
        indexing = len(server.asked)
        local = pixels(loader_of(shards), 3)
        server.faults.extend(["503", "half"])
        options = {"disk_cache_dir": str(tmp_path / "cache"), "num_workers": 1}
        found = pixels(loader_of(far, tmp_path, **options), 3)
        assert list(found.values()) == list(local.values()) and not server.faults
        assert len(server.asked) - indexing == len(set(far.shard)) + 2, "a shard is one block here"

        with refuses(StorageFault, "s3://bucket/gone.tar", "10 bytes", "does not exist"):
            read_range("s3://bucket/gone.tar", 0, 10, QUICK)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_a_cache_too_small_for_its_blocks_is_refused_with_the_configuration():
    with refuses(ValueError, "data.disk_cache_gb=0.05", "8 blocks", "read_block_mb=8"):
        DataConfig(disk_cache_dir="/local/cache", disk_cache_gb=0.05)
    DataConfig(disk_cache_dir="/local/cache", disk_cache_gb=0.05, read_block_mb=4)

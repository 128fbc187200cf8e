"""Members that hold latents and embeddings: written, indexed, assigned to buckets and read, without torch."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from clip_files import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sentences import refuses

from sora_train.config import BucketClass, BucketsConfig, DataConfig
from sora_train.data.index.folder import open_source
from sora_train.data.index.shard_writer import ShardWriter
from sora_train.data.index.shards import HowToIndex, index_shards
from sora_train.data.latents import members as stored
from sora_train.data.latents.check import (
    first_of_each,
    refuse_latents,
    require_latents,
    require_text,
)
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.sample import Bucket
from sora_train.data.storage import cached_reads as reading
from sora_train.data.storage.retry import ReadPolicy
from sora_train.data.tape.buckets import assign, build_buckets
from sora_train.data.tape.tape import Tape
from sora_train.errors import Fault, UserError

BUCKETS = BucketsConfig(
    fps=8, classes=(BucketClass(name="c", pixels=1536, frames=(1, 5), aspect_ratios=("3:2",)),)
)
TABLE = build_buckets(BUCKETS, temporal_factor=4, spatial_multiple=16)
PIXELS = Bucket(5, 32, 48)
VAE = "a" * 64
DIGITS = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
FINITE = st.floats(-1e4, 1e4, width=32)


def latents(row: int, dtype: str = "float32", pixels: Bucket = PIXELS) -> bytes:
    values = np.full((2, 2, 4, 6), row + 0.5, np.float32)
    return stored.pack_latents(values, vae_digest=VAE, fps=8.0, pixels=pixels, dtype=dtype)


def text(caption: str) -> bytes:
    values = np.full((3, 4), len(caption), np.float32)
    return stored.pack_text(values, encoder_digest="b" * 64, caption=caption)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=4, max_dims=4, max_side=3), elements=FINITE),
    st.sampled_from(sorted(DIGITS)),
)
def test_a_member_is_read_back_to_its_precision(values: np.ndarray, dtype: str):
    data = stored.pack_latents(values, vae_digest=VAE, fps=7.5, pixels=PIXELS, dtype=dtype)
    found = stored.unpack(data, stored.LATENTS)
    assert found.dtype == np.float32 and found.shape == values.shape
    # Below 2^-14 the numbers of float16 have fewer digits.
    np.testing.assert_allclose(found, values, rtol=DIGITS[dtype], atol=2**-24)
    said = stored.describe_bytes(data, stored.LATENTS)
    assert said["vae_digest"] == VAE and said["fps"] == 7.5 and said["shape"] == [*values.shape]


@pytest.mark.parametrize("dtype", sorted(DIGITS))
def test_a_log_variance_stands_beside_its_mean(dtype: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load, save

    both = np.random.default_rng(0).standard_normal((2, 2, 2, 4, 6)).astype(np.float32)
    data = stored.pack_latents(
        both[0], vae_digest=VAE, fps=8.0, pixels=PIXELS, dtype=dtype, logvar=both[1]
    )
    theirs = load(data)
    (tmp_path / "a").write_bytes(data)
    said = stored.as_members(
        {stored.LATENTS: (0, len(data))},
        {stored.LATENTS: stored.describe_bytes(data, stored.LATENTS)},
    )
    place, _ = stored.stored_of(said)
    assert place.logvar and place.shape == (2, 2, 4, 6)
    found = stored.read_member(str(tmp_path / "a"), place, stored.LATENTS, ReadPolicy())
    for ours, name, wanted in zip(found, ("latents", "logvar"), both, strict=True):
        assert np.array_equal(ours, theirs[name].float().numpy())
        np.testing.assert_allclose(ours, wanted, rtol=DIGITS[dtype], atol=1e-6)
    other = save({"latents": torch.ones(1, 1, 1, 2), "logvar": torch.ones(1, 1, 2, 1)}, {"a": "b"})
    with pytest.raises(stored.DamagedMember):
        stored.unpack(other, stored.LATENTS)
    assert not stored.stored_of(
        stored.as_members({stored.LATENTS: (0, 9)}, {stored.LATENTS: stored.describe_bytes(latents(0), stored.LATENTS)})
    )[0].logvar  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), max_size=20))
def test_one_row_of_each_description_is_looked_at(kinds: list[tuple[int, int, bool]]):
    """Rows that differ in their bytes' places and their captions alone are one; all others are told apart."""
    members, wanted = [], {}
    for row, (fps, width, has_text) in enumerate(kinds):
        data = stored.pack_latents(
            np.zeros((2, 2, 4, 6), np.float32), vae_digest=VAE, fps=fps, pixels=PIXELS
        )
        says = {stored.LATENTS: stored.describe_bytes(data, stored.LATENTS)}
        if has_text:
            embedding = np.zeros((3, 4 + width), np.float32)
            packed = stored.pack_text(embedding, encoder_digest="b" * 64, caption=f"caption {row}")
            says[stored.TEXT] = stored.describe_bytes(packed, stored.TEXT)
        members.append(stored.as_members({name: (row * 1000, 10 * row) for name in says}, says))
        wanted.setdefault((fps, width if has_text else None), row)
    array = np.array([*members, "", ""], object)
    assert first_of_each(array, range(len(array))) == list(wanted.values())


def test_remote_members_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By way of the disk cache where the shard's stamp is known; never kept where it is not."""
    data = latents(3)
    said = stored.as_members(
        {stored.LATENTS: (512, len(data))},
        {stored.LATENTS: stored.describe_bytes(data, stored.LATENTS)},
    )
    place, _ = stored.stored_of(said)
    shard, asked = b"x" * 512 + data, []

    def fetch(url: str, offset: int, length: int, *_: object) -> bytes:
        asked.append((offset, length))
        return shard[offset : offset + length]

    monkeypatch.setattr(reading, "fetch", fetch)
    policy = ReadPolicy(cache_dir=str(tmp_path), cache_bytes=10**6)
    for stamp, requests in (((len(shard), "s"), 1), (None, 2)):
        asked.clear()
        for _ in range(2):
            found, _ = stored.read_member(
                "https://h/a.tar", place, stored.LATENTS, policy, stamp=stamp
            )
            assert (found == 3.5).all()
        assert len(asked) == requests


@pytest.mark.parametrize("dtype", sorted(DIGITS))
def test_others_read_what_is_written(dtype: str):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load, save

    values = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    data = stored.pack_latents(values, vae_digest=VAE, fps=8.0, pixels=PIXELS, dtype=dtype)
    wanted = torch.from_numpy(values).to(getattr(torch, dtype))
    assert torch.equal(load(data)["latents"], wanted)
    theirs = save({"latents": wanted}, {"vae_digest": VAE})
    assert np.array_equal(stored.unpack(theirs, stored.LATENTS), wanted.float().numpy())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_told_and_never_a_crash(data: st.DataObject):
    member = bytearray(latents(1))
    if data.draw(st.booleans()):
        member = member[: data.draw(st.integers(0, len(member) - 1))]
    else:
        at = data.draw(st.integers(0, 7))
        member[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(stored.DamagedMember):
        stored.unpack(bytes(member), stored.LATENTS)


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and latents in every combination."""
    folder = tmp_path_factory.mktemp("shards")
    write_clip(folder / "clip.mp4", count=8, height=32, width=48)
    clip = (folder / "clip.mp4").read_bytes()
    (folder / "clip.mp4").unlink()
    tar_of(
        folder / "a.tar",
        {
            "only.latents.safetensors": latents(0),
            "only.txt": b"one",
            "only.text.safetensors": text("one"),
            "clip.mp4": clip,
            "clip.txt": b"two",
            "both.latents.safetensors": latents(2, "bfloat16"),
            "both.mp4": clip,
            "both.txt": b"three",
            "both.text.safetensors": text("another"),
            "wrong.latents.safetensors": latents(3, pixels=Bucket(9, 32, 48)),
            "wrong.txt": b"four",
            "bad.latents.safetensors": latents(4)[:-4],
            "bad.txt": b"five",
            "last.latents.safetensors": latents(5, "float16"),
            "last.txt": b"six",
        },
    )
    return folder


@pytest.fixture(scope="module")
def manifest(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    found = index_shards(str(shards), tmp_path_factory.mktemp("index"), HowToIndex(), workers=1)
    assert found is not None
    return found


def test_the_index_lists_members_by_their_bytes(manifest: Manifest, shards: Path):
    assert manifest.key.tolist() == ["only", "clip", "both", "wrong", "bad", "last"]
    assert manifest.kind.tolist() == ["latents", "video", "video", "latents", "latents", "latents"]
    assert manifest.drop_reason.tolist() == ["", "", "", "", "stored_damaged", ""]
    assert "bad.latents.safetensors" in manifest.drop_detail[4]
    tar = (shards / "a.tar").read_bytes()
    for row, wanted in ((0, latents(0)), (2, latents(2, "bfloat16")), (5, latents(5, "float16"))):
        place, _ = stored.stored_of(manifest.members[row])
        assert tar[place.offset : place.offset + place.length] == wanted
        assert (place.vae_digest, place.fps, place.pixels) == (VAE, 8.0, PIXELS)
    assert manifest.members[1] == ""
    assert (manifest.frames[0], manifest.height[0], manifest.width[0]) == (5, 32, 48)
    assert manifest.codec[0] == "latents" and manifest.fps[0] == 8.0
    assert len(set(manifest.sample_digest[[0, 5]])) == 2


def test_a_folder_of_such_shards_is_a_source(manifest: Manifest, shards: Path, tmp_path: Path):
    found = open_source(str(shards), work_dir=tmp_path)
    assert found.members.tolist() == manifest.members.tolist()
    assert (found.drop_reason != "").tolist() == (manifest.drop_reason != "").tolist()
    assert found.sample_digest[0] == manifest.sample_digest[0]


def test_latents_fit_the_bucket_of_their_shape_alone(manifest: Manifest):
    found = assign(manifest, TABLE, BUCKETS, seed=0)
    assert found.reasons.tolist() == ["", "", "", "latents_shape", "stored_damaged", ""]
    assert {TABLE[found.bucket_of_row[row]].bucket for row in (0, 2, 5)} == {PIXELS}
    pixels = assign(manifest, TABLE, BUCKETS, seed=0, latents=False)
    only = "latents_only"
    assert pixels.reasons.tolist() == [only, "", "", only, "stored_damaged", only]


def make(manifest: Manifest, cfg: BucketsConfig = BUCKETS, **options: object) -> Loader:
    use = options.get("stored_latents", "use") == "use"
    found = assign(manifest, TABLE, BUCKETS, seed=0, latents=use)
    buckets = [spec.bucket for spec in TABLE]
    sizes = dict.fromkeys(buckets, 4)
    tape = Tape(found.bucket_of_row, manifest.shard, buckets, sizes, seed=0, group=1)
    data = DataConfig(**{"max_drop_fraction": 0.9, "num_workers": 1, **options})
    return Loader(manifest, tape, cfg, data, seed=0, micro_batches=1, reasons=found.reasons)


def test_kinds_mix_in_a_micro_batch(manifest: Manifest):
    with make(manifest) as loader:
        batch = loader.step(0)[0]
        held_out, failures = loader.decode_rows([0, 1, 2])
    clips = {clip.row: clip for clip in batch.clips}
    assert sorted(clips) == [0, 1, 2, 5] and not batch.failures and not failures
    for row in (0, 2, 5):
        assert clips[row].pixels is None and clips[row].fps == 8.0
        assert np.array_equal(clips[row].latents, np.full((2, 2, 4, 6), row + 0.5))
    assert clips[1].latents is None and clips[1].pixels.shape == (5, 32, 48, 3)
    assert np.array_equal(clips[0].text, np.full((3, 4), 3))
    # The embedding beside this clip is another caption's.
    assert clips[2].text is None and clips[1].text is None
    assert [clip.latents is None for clip in held_out] == [False, True, False]


def test_what_is_stored_can_be_ignored(manifest: Manifest):
    with make(manifest, stored_latents="ignore", stored_text="ignore") as loader:
        clips = loader.step(0)[0].clips
    assert sorted(clip.row for clip in clips) == [1, 2]
    assert all(clip.latents is None and clip.text is None for clip in clips)


def test_beside_a_clip_latents_of_another_shape_are_left_alone(manifest: Manifest):
    members = manifest.members.copy()
    members[2] = members[2].replace('"frames": 5', '"frames": 9')
    with make(manifest.with_columns(members=members)) as loader:
        clips = {clip.row: clip for clip in loader.step(0)[0].clips}
    assert clips[2].pixels is not None and clips[0].pixels is None


def test_latents_keep_the_rate_they_were_encoded_at(manifest: Manifest):
    slower = BUCKETS.model_copy(update={"fps": 4.0})
    with make(manifest, slower) as loader:
        clips = loader.decode_rows([0, 5])[0]
    assert [clip.fps for clip in clips] == [8.0, 8.0]


def test_an_embedding_may_stand_beside_a_clip_that_is_decoded(manifest: Manifest):
    place, known = stored.stored_of(manifest.members[0])
    members = manifest.members.copy()
    members[1] = stored.as_members(
        {stored.TEXT: (known.offset, known.length)},
        {
            stored.TEXT: {
                "text_digest": "b",
                "caption_digest": known.caption_digest,
                "shape": [3, 4],
            }
        },
    )
    captions = manifest.caption.copy()
    captions[1] = "one"
    with make(manifest.with_columns(members=members, caption=captions)) as loader:
        clip = next(clip for clip in loader.step(0)[0].clips if clip.row == 1)
    assert clip.pixels is not None and np.array_equal(clip.text, np.full((3, 4), 3))
    assert place is not None


def test_damage_costs_the_sample_and_missing_storage_the_run(manifest: Manifest, shards, tmp_path):
    data = bytearray((shards / "a.tar").read_bytes())
    place, _ = stored.stored_of(manifest.members[5])
    data[place.offset + place.length - 2 : place.offset + place.length] = b"\x00\x7c"  # infinity
    (tmp_path / "a.tar").write_bytes(data)
    broken = Manifest({name: getattr(manifest, name) for name in manifest.row(0)}, tmp_path)
    name = str(broken.shard[0])
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
    with make(broken) as loader:
        batch = loader.step(0)[0]
    assert [(failure.row, failure.reason) for failure in batch.failures] == [(5, "stored_damaged")]
    (tmp_path / name).unlink()
    with make(broken) as loader, pytest.raises(Fault, match=r"latents\.safetensors"):
        loader.decode_rows([0])


def test_another_networks_members_are_refused(manifest: Manifest):
    shape = {Bucket(5, 32, 48): (2, 2, 4, 6)}

    def latent_shape(*pixels: int) -> tuple[int, ...]:
        return shape[Bucket(*pixels)]

    require_latents(manifest, [0, 1, 2, 5], VAE, latent_shape)
    with pytest.raises(UserError, match=f"'only'.*{VAE}.*{'c' * 64}.*vae.path"):
        require_latents(manifest, [1, 0], "c" * 64, latent_shape)
    with refuses(UserError, "log-variance", "data.latents=sample"):
        require_latents(manifest, [0], VAE, latent_shape, drawn=True)
    with refuses(UserError, "[2, 2, 4, 6]", "[2, 2, 4, 7]"):
        require_latents(manifest, [0], VAE, lambda *_: (2, 2, 4, 7))
    require_text(manifest, [0, 1, 2], "b" * 64, False, 3)
    require_text(manifest, [1, 5], "c" * 64, True, 3)
    for digest, trainable, longest, told in (
        ("b" * 64, True, 3, "text.trainable=true"),
        ("c" * 64, False, 3, "c" * 64),
        ("b" * 64, False, 2, "text.max_length=2"),
    ):
        with pytest.raises(UserError, match=told):
            require_text(manifest, [0], digest, trainable, longest)


def test_latents_are_refused_where_frames_are_encoded_from_pixels(manifest: Manifest):
    refuse_latents(manifest, [1], "train t2v alone")
    with refuses(UserError, "only", "data.stored_latents=ignore"):
        refuse_latents(manifest, [1, 0], "train t2v alone")


def test_the_writer_knows_where_it_put_members(tmp_path: Path):
    with ShardWriter(tmp_path) as writer:
        beside = {stored.TEXT: text("one")}
        writer.write("a", latents(0), stored.LATENTS, "one", {"kind": "latents"}, beside)
        writer.write("b", b"clip", "mp4", "two", {"kind": "video"}, {stored.LATENTS: latents(1)})
        writer.write("c", b"clip", "mp4", "three", {"kind": "video"})
    found = Manifest.load(tmp_path / "manifest.parquet")
    tar = (tmp_path / "shard-000000.tar").read_bytes()
    a, b = json.loads(found.members[0]), json.loads(found.members[1])
    for place, wanted in (
        (a[stored.LATENTS], latents(0)),
        (a[stored.TEXT], text("one")),
        (b[stored.LATENTS], latents(1)),
        ((found.offset[1], found.length[1]), b"clip"),
    ):
        assert tar[place[0] : place[0] + place[1]] == wanted
    assert a[stored.LATENTS] == [found.offset[0], found.length[0]] and found.members[2] == ""


def test_nothing_here_needs_torch():
    modules = "sora_train.data.latents.members, sora_train.data.index.listing_worker"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

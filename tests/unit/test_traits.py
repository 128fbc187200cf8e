"""What the index says of files that need care, and what a run makes of it."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from clip_files import numbered, write_clip
from PIL import Image
from sentences import refuses, says

from sora_train.config import BucketClass, BucketsConfig, DataConfig
from sora_train.config.compose import compose
from sora_train.data.decode.probe import traits_told
from sora_train.data.index.folder import open_source
from sora_train.data.index.sources import open_sources
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.tape.buckets import assign, build_buckets
from sora_train.data.tape.tape import Tape
from sora_train.errors import ConfigError
from sora_train.tools.data.command import index_source

BUCKETS = BucketsConfig(
    fps=8, classes=(BucketClass(name="c", pixels=1536, frames=(1, 5), aspect_ratios=("3:2",)),)
)
PQ_TAG = 16
NAMES = ("plain.mp4", "clear.png", "bright.mp4")


def write_pq(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.color_trc = PQ_TAG
        for index, image in enumerate(numbered(12)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain clip, a picture that is half transparent, and a clip in HDR."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "plain.mp4", count=12)
    half = np.zeros((32, 48, 4), np.uint8)
    half[:, 24:] = (200, 100, 50, 255)
    Image.fromarray(half).save(folder / "clear.png")
    write_pq(folder / "bright.mp4")
    lines = [json.dumps({"file": name, "caption": name}) for name in NAMES]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def row_of(manifest: Manifest, key: str) -> int:
    return manifest.key.tolist().index(key)


def loader(manifest: Manifest, **options: object) -> Loader:
    table = build_buckets(BUCKETS, temporal_factor=4, spatial_multiple=16)
    buckets = [spec.bucket for spec in table]
    found = assign(manifest, table, BUCKETS, seed=0)
    tape = Tape(
        found.bucket_of_row, manifest.shard, buckets, dict.fromkeys(buckets, 1), seed=0, group=1
    )
    config = DataConfig(source="x", num_workers=1, max_drop_fraction=1.0, **options)
    return Loader(manifest, tape, BUCKETS, config, seed=0, micro_batches=1)


def test_the_index_tells_what_needs_care_and_what_is_done(folder: Path, tmp_path: Path):
    said = index_source([f"source={folder}", f"work_dir={tmp_path}"])
    says(said, "1 transparent", "data.alpha_background", "1 in HDR (PQ)", "data.hdr", "3 usable")
    manifest = open_source(str(folder), work_dir=tmp_path)
    assert dict(zip(manifest.key, manifest.traits, strict=True)) == {
        "plain.mp4": "", "clear.png": "alpha", "bright.mp4": "pq",
    }  # fmt: skip
    says(
        "\n".join(traits_told(manifest, "teal", "decord")),
        "data.alpha_background=teal",
        "2",
        "decord",
    )


def test_hdr_is_dropped_with_its_reason_where_that_is_asked_for(folder: Path, tmp_path: Path):
    """From the same index: the key needs no second look into the clips."""
    keys = ["experiment=parity_tiny", f"data.source={folder}", "data.val_clips=0"]
    shown, dropped = (
        open_sources(compose([*keys, f"data.hdr={hdr}"]).config, tmp_path).train
        for hdr in ("tonemap", "drop")
    )
    assert len(list((tmp_path / "data").iterdir())) == 1
    assert shown.dropped() == {} and dropped.dropped() == {"hdr": 1}
    row = row_of(dropped, "bright.mp4")
    says(dropped.drop_detail[row], "data.hdr=tonemap")
    assert shown.digest() != dropped.digest()


def test_a_run_reads_by_its_keys(folder: Path, tmp_path: Path):
    pytest.importorskip("decord")
    manifest = open_source(str(folder), work_dir=tmp_path)
    clear, plain = row_of(manifest, "clear.png"), row_of(manifest, "plain.mp4")
    with loader(manifest) as black, loader(manifest, alpha_background="#0a141e") as other:
        (clip,), _ = other.decode_rows([clear])
        assert (clip.pixels[0, :, :20] == (10, 20, 30)).all()
        (clip,), _ = black.decode_rows([clear])
        assert (clip.pixels[0, :, :20] == 0).all()
        # Latents of other pixels have another name; those of plain clips keep theirs.
        assert black.latent_key(clear) != other.latent_key(clear)
        assert black.latent_key(plain) == other.latent_key(plain)
    with loader(manifest, decoder="decord") as by_decord:
        backends = {name: by_decord.request(row_of(manifest, name), 0).backend for name in NAMES}
    assert backends == {"plain.mp4": "decord", "clear.png": "pyav", "bright.mp4": "pyav"}


def test_a_manifest_from_before_there_were_traits_is_read(folder: Path, tmp_path: Path):
    manifest = open_source(str(folder), work_dir=tmp_path)
    manifest.save(tmp_path / "new.parquet")
    table = pq.read_table(tmp_path / "new.parquet")
    metadata = {**table.schema.metadata, b"sora_train.manifest": b"3"}
    pq.write_table(
        table.drop_columns(["traits"]).replace_schema_metadata(metadata), tmp_path / "old.parquet"
    )
    old = Manifest.load(tmp_path / "old.parquet")
    assert old.traits.tolist() == [""] * 3
    assert old.digest() == manifest.digest()


def test_a_background_that_is_no_colour_is_refused():
    with refuses(ConfigError, "data.alpha_background=blakc", "#rrggbb"):
        compose(["experiment=parity_tiny", "data.alpha_background=blakc"])

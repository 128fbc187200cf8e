"""The bucket table, and that every clip gets exactly one bucket or one reason."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.config import BucketClass, BucketsConfig
from sora_train.data.manifest import Manifest, empty_row
from sora_train.data.sample import Bucket
from sora_train.data.tape.buckets import assign, build_buckets
from sora_train.data.transforms import crop, crop_size, sampled_frames, uniform, window
from sora_train.errors import ConfigError

CFG = BucketsConfig(
    fps=8,
    classes=(
        BucketClass(
            name="small", pixels=2304, frames=(1, 5, 9), aspect_ratios=("1:1", "2:1", "1:2")
        ),
        BucketClass(name="large", pixels=9216, frames=(1, 9), probability=3.0),
    ),
)
TABLE = build_buckets(CFG, temporal_factor=4, spatial_multiple=16)


def clips(*rows: dict[str, object]) -> Manifest:
    plain = {"kind": "video", "frames": 9, "fps": 8.0, "height": 48, "width": 48}
    return Manifest.from_rows(
        [empty_row(key=str(n), **{**plain, **row}) for n, row in enumerate(rows)], "."
    )


def bucket_of(seed: int = 0, cfg: BucketsConfig = CFG, **row: object) -> tuple[Bucket | None, str]:
    table = build_buckets(cfg, temporal_factor=4, spatial_multiple=16)
    found = assign(clips(row), table, cfg, seed)
    index = found.bucket_of_row[0]
    return (table[index].bucket if index >= 0 else None), found.reasons[0]


def test_table_is_classes_by_durations_by_ratios():
    assert {spec.bucket.name for spec in TABLE} == {
        *(f"{frames}x{size}" for frames in (1, 5, 9) for size in ("48x48", "32x64", "64x32")),
        *(f"{frames}x96x96" for frames in (1, 9)),
    }
    assert [spec.probability for spec in TABLE if spec.class_name == "large"] == [3.0, 3.0]


@pytest.mark.parametrize("ratio", ["16:9", "9:16", "1:1", "2.39:1", "4:3"])
@pytest.mark.parametrize("pixels", [256 * 256, 480 * 854, 720 * 1280])
def test_sizes_are_near_area_and_ratio_in_whole_multiples(ratio: str, pixels: int):
    cls = BucketClass(name="c", pixels=pixels, frames=(17,), aspect_ratios=(ratio,))
    (spec,) = build_buckets(BucketsConfig(classes=(cls,)), temporal_factor=4, spatial_multiple=16)
    height, width = spec.bucket.height, spec.bucket.width
    wide, high = map(float, ratio.split(":"))
    assert height % 16 == width % 16 == 0
    assert abs(np.log(width / height / (wide / high))) < 0.06
    assert 0.9 < height * width / pixels < 1.1


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"frames": (8,)}, ("buckets.classes[0].frames=8", "1 + k * 4", "5 or 9")),
        ({"frames": ()}, ("buckets.classes[0].frames", "empty")),
        ({"frames": (5, 5)}, ("clip length", "twice")),
        ({"aspect_ratios": ("wide",)}, ("aspect_ratios='wide'", "width:height")),
        ({"aspect_ratios": ("1:0",)}, ("aspect_ratios='1:0'", "width:height")),
        ({"aspect_ratios": ("1:1", "100:99")}, ("1:1", "'c'")),
        ({"pixels": 64}, ("pixels=64", "multiples of 16")),
    ],
)
def test_impossible_tables_name_the_key(change: dict, facts: tuple[str, ...]):
    cls = BucketClass(**{"name": "c", "pixels": 2304, "frames": (5,), **change})
    with refuses(ConfigError, *facts):
        build_buckets(BucketsConfig(classes=(cls,)), temporal_factor=4, spatial_multiple=16)


def test_longest_duration_and_nearest_ratio():
    assert bucket_of()[0] == Bucket(9, 48, 48)
    assert bucket_of(frames=8)[0] == Bucket(5, 48, 48)
    assert bucket_of(frames=4)[0] == Bucket(1, 48, 48), "a video too short for more is a picture"
    assert bucket_of(kind="image", frames=1, fps=0.0)[0] == Bucket(1, 48, 48)
    assert bucket_of(height=32, width=60)[0] == Bucket(9, 32, 64)
    assert bucket_of(height=64, width=36)[0] == Bucket(9, 64, 32)


def test_duration_counts_time_not_frames():
    assert bucket_of(fps=30.0, frames=31)[0] == Bucket(9, 48, 48)
    assert bucket_of(fps=30.0, frames=30)[0] == Bucket(5, 48, 48)
    assert bucket_of(fps=4.0, frames=9)[0] == Bucket(9, 48, 48), "a slow clip keeps its own rate"
    rate = 24000 / 1001
    assert sampled_frames(np.array([101]), np.array([rate]), 16.0)[0] == 67


def test_reasons():
    cfg = BucketsConfig(
        fps=8, max_crop=0.3, classes=(BucketClass(name="c", pixels=2304, frames=(9,)),)
    )
    assert bucket_of(cfg=cfg, frames=8) == (None, "too_short")
    assert bucket_of(cfg=cfg, height=30, width=30) == (None, "too_small")
    assert bucket_of(cfg=cfg, height=48, width=96) == (None, "aspect_ratio")
    assert bucket_of(cfg=cfg, drop_reason="unreadable") == (None, "unreadable")
    assert bucket_of(cfg=cfg, height=39, width=39)[0] == Bucket(9, 48, 48), (
        "enlarged by 1.25 at most"
    )


def test_classes_are_drawn_by_probability_and_by_seed_and_sample_only():
    many = clips(*[{"height": 128, "width": 128}] * 4000)
    found = assign(many, TABLE, CFG, seed=0).bucket_of_row
    large = np.array([TABLE[index].class_name == "large" for index in found])
    assert abs(large.mean() - 0.75) < 0.03
    assert (found == assign(many, TABLE, CFG, seed=0).bucket_of_row).all()
    assert (found != assign(many, TABLE, CFG, seed=1).bucket_of_row).any()
    assert (
        found[:100]
        == assign(clips(*[{"height": 128, "width": 128}] * 100), TABLE, CFG, 0).bucket_of_row
    ).all()


rows = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["video", "image"]),
        "frames": st.integers(1, 200),
        "fps": st.sampled_from([4.0, 8.0, 12.5, 24000 / 1001, 60.0]),
        "height": st.integers(8, 400),
        "width": st.integers(8, 400),
        "drop_reason": st.sampled_from(["", "", "", "unreadable"]),
    }
)


@given(st.lists(rows, min_size=1, max_size=30), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_used_and_dropped_are_all_and_what_is_used_can_be_cut(listed: list[dict], seed: int):
    listed = [{**row, "frames": 1, "fps": 0.0} if row["kind"] == "image" else row for row in listed]
    manifest = clips(*listed)
    found = assign(manifest, TABLE, CFG, seed)
    used = found.bucket_of_row >= 0
    assert ((found.reasons == "") == used).all()
    assert used.sum() + sum(found.dropped().values()) == len(manifest)
    assert sum(found.clips_per_bucket(TABLE).values()) == used.sum()
    for row in np.flatnonzero(used):
        bucket = TABLE[found.bucket_of_row[row]].bucket
        frames, fps = int(manifest.frames[row]), float(manifest.fps[row])
        for u in (0.0, 1 - 2**-53):
            times, effective = window(frames, fps, bucket, CFG.fps, u)
            assert len(times) == bucket.frames and times[0] >= 0
            assert times[-1] <= (frames - 1) / (fps or 1) + 0.011 / (fps or 1)
            assert effective <= CFG.fps
        height, width = int(manifest.height[row]), int(manifest.width[row])
        assert crop_size(height, width, bucket)[0] * CFG.max_upscale >= bucket.height - 1e-6
        for u in (0.0, 0.5, 1.0):
            top, left, crop_height, crop_width = crop(height, width, bucket, u, 1 - u)
            assert (
                0 <= top <= height - crop_height + 1e-6 and 0 <= left <= width - crop_width + 1e-6
            )
            assert crop_width / crop_height == pytest.approx(bucket.width / bucket.height)
            assert crop_height * crop_width / (height * width) >= 1 - CFG.max_crop - 1e-6


def test_windows_run_at_natural_speed():
    times, fps = window(300, 30.0, Bucket(9, 48, 48), 8.0, 0.5)
    assert fps == 8 and np.allclose(np.diff(times), 1 / 8)
    times, fps = window(40, 5.0, Bucket(9, 48, 48), 8.0, 0.0)
    assert fps == 5 and np.allclose(np.diff(times), 1 / 5)
    assert window(1, 0.0, Bucket(1, 48, 48), 8.0, 0.9) == ((0.0,), 0.0)
    starts = {
        window(20, 8.0, Bucket(9, 48, 48), 8.0, uniform(0, "window", 0, row))[0][0]
        for row in range(300)
    }
    assert starts == {start / 8 for start in range(12)}, "every start a clip allows, and no other"

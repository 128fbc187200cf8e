"""Deduplication: who is kept depends on no order, every dropped clip names a kept one, runs remember each other."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dedup.groups import groups_of
from data_prep.dedup.index import ENTRIES, read_index, write_index
from data_prep.dedup.volume import SIDE, TIMES
from data_prep.stage import DROPS, Workspace
from data_prep.stages.dedup import STAGE, DedupConfig, dedup
from sora_train.errors import UserError
from tests.sentences import refuses

COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),
        ("digest", pa.string()),
        ("source_digest", pa.string()),
        ("begin", pa.float64()),
        ("end", pa.float64()),
        ("frames", pa.int64()),
        ("duration", pa.float64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("bit_rate", pa.int64()),
        ("fingerprint", pa.binary()),
        ("vector", pa.list_(pa.float64())),
        *DROPS,
    ]
)


def volume(seed: int, noise: int = 0) -> bytes:
    """A smooth moving picture of its own, uint8 (TIMES, SIDE, SIDE); `noise`: another encoding of it."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    made = np.zeros((TIMES, SIDE, SIDE))
    for _ in range(8):
        a, b, c, phase = draws.uniform(-9, 9, 4)
        time = np.arange(TIMES)[:, None, None] / TIMES
        made += 12 * np.sin(a * x + b * y + 0.3 * c * time + phase)
    made += np.random.default_rng(1000 * seed + noise).normal(0, 1.0 if noise else 0, made.shape)
    return np.clip(np.rint(made + 120), 0, 255).astype(np.uint8).tobytes()


def mirrored(stored: bytes) -> bytes:
    return np.frombuffer(stored, np.uint8).reshape(TIMES, SIDE, SIDE)[..., ::-1].tobytes()


def row(key: str, **values: Any) -> dict[str, Any]:
    usual = {"kind": "video", "digest": f"digest of {key}", "source_digest": f"source of {key}"}
    sizes = {"frames": 96, "duration": 4.0, "begin": 0.0, "end": 4.0, "width": 320, "height": 180}
    return {
        "key": key,
        **usual,
        **sizes,
        "bit_rate": 1000,
        **dict.fromkeys(DROPS.names, ""),
    } | values


def run(
    rows: Sequence[dict[str, Any]], out: str = "/nowhere/run", **keys: Any
) -> dict[str, dict[str, Any]]:
    """What the stage says of each row, by key."""
    table = pa.Table.from_pylist(list(rows), schema=COLUMNS)
    found = dedup(table, DedupConfig(**keys), Workspace(Path(out)))
    assert found.schema.names[: len(STAGE.adds)] == STAGE.adds.names
    return dict(zip(table["key"].to_pylist(), found.to_pylist(), strict=True))


def kept(found: dict[str, dict[str, Any]]) -> set[str]:
    return {key for key, told in found.items() if not told["drop_reason"]}


def test_the_best_copy_is_kept_by_size_then_length_then_bits_then_name() -> None:
    copies = [row(f"k{n}", fingerprint=volume(1, n)) for n in range(5)]
    assert kept(run(copies)) == {"k0"}
    copies[3]["bit_rate"] = 2000
    assert kept(run(copies)) == {"k3"}
    copies[2] |= {"duration": 4.1, "frames": 98}
    assert kept(run(copies)) == {"k2"}
    copies[1] |= {"width": 640, "height": 360}
    found = run(copies)
    assert kept(found) == {"k1"}
    assert found["k4"]["duplicate_of"] == "k1" and found["k4"]["drop_reason"] == "duplicate"
    assert found["k4"]["duplicate_kind"] == "perceptual" and found["k4"]["duplicate_distance"] < 0.1
    assert found["k4"]["drop_detail"].startswith("of k1 (perceptual, distance 0.0")


def test_kinds_of_copies() -> None:
    rows = [
        row("a", fingerprint=volume(1), width=640),
        row("bytes", digest="digest of a"),
        row("times", source_digest="source of a"),
        row("turned", fingerprint=mirrored(volume(1, 3))),
        row("other", fingerprint=volume(2)),
        row("longer", fingerprint=volume(1, 4), duration=6.0, frames=144),
        row("image", fingerprint=volume(1, 5), kind="image"),
        row("black", fingerprint=None),
        row("black too", fingerprint=None),
        row("elsewhere", source_digest="source of a", begin=4.0, end=8.0),
    ]
    found = run(rows)
    assert {key: told["duplicate_kind"] for key, told in found.items() if told["drop_reason"]} == {
        "bytes": "exact",
        "times": "same_source",
        "turned": "mirrored",
    }
    assert {told["duplicate_of"] for told in found.values()} == {"", "a"}
    assert found["bytes"]["duplicate_distance"] == 0.0
    assert found["a"]["duplicate_distance"] is None
    assert all(told["fingerprint"] is None for told in found.values())


def test_rows_that_were_dropped_before_take_no_part() -> None:
    rows = [
        row("a", fingerprint=volume(1), width=640, drop_reason="black"),
        row("b", fingerprint=volume(1)),
    ]
    assert run(rows)["b"]["drop_reason"] == "" and run(rows)["a"]["duplicate_of"] == ""


def test_a_copy_of_a_copy_is_in_the_group() -> None:
    rows = [
        row("a", fingerprint=volume(1), width=640),
        row("b", fingerprint=volume(1, 1), digest="shared"),
        row("c", digest="shared"),
    ]
    found = run(rows)
    assert kept(found) == {"a"}
    assert found["c"]["duplicate_of"] == "a" and found["c"]["duplicate_distance"] is None


items = st.lists(
    st.fixed_dictionaries(
        {
            "scene": st.integers(0, 3),
            "noise": st.integers(0, 2),
            "turned": st.booleans(),
            "width": st.sampled_from([160, 320]),
            "duration": st.sampled_from([4.0, 4.1]),
            "digest": st.sampled_from(["", "p", "q"]),
            "dropped": st.sampled_from(["", "", "", "black"]),
        }
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=20, deadline=None)
@given(items, st.randoms(use_true_random=False))
def test_order_does_not_count_and_all_that_is_dropped_names_what_is_kept(
    made: list[dict[str, Any]], random: Any
) -> None:
    rows = []
    for number, item in enumerate(made):
        stored = volume(item["scene"] + 1, item["noise"])
        given_digest = {"digest": item["digest"]} if item["digest"] else {}
        rows.append(
            row(
                f"k{number}",
                fingerprint=mirrored(stored) if item["turned"] else stored,
                width=item["width"],
                duration=item["duration"],
                drop_reason=item["dropped"],
                **given_digest,
            )
        )
    found = run(rows)
    shuffled = random.sample(rows, len(rows))
    assert run(shuffled) == found
    living = {r["key"] for r in rows if not r["drop_reason"]}
    survivors = {key for key in living if not found[key]["drop_reason"]}
    for key in living - survivors:
        assert found[key]["duplicate_of"] in survivors
    # What shows the same is never kept twice, and a scene that came in comes out unless its bytes were another's.
    scenes = [made[int(key[1:])]["scene"] for key in survivors]
    assert len(scenes) == len(set(scenes))
    assert not living or survivors


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data())
def test_groups_are_the_components_of_the_pairs(count: int, data: Any) -> None:
    number = st.integers(0, count - 1)
    pairs = data.draw(st.lists(st.tuples(number, number)))
    reach = np.eye(count, dtype=bool)
    for i, j in pairs:
        reach[i, j] = reach[j, i] = True
    for _ in range(count):
        reach = reach @ reach
    wanted = {tuple(np.flatnonzero(line).tolist()) for line in reach if line.sum() > 1}
    found = groups_of(count, pairs)
    assert {tuple(group) for group in found} == wanted and len(found) == len(wanted)
    assert groups_of(count, pairs[::-1]) == found


# -- embeddings --


def test_near_embeddings_are_copies_where_asked() -> None:
    draws = np.random.default_rng(0)
    base = draws.standard_normal(32)
    rows = [
        row("a", vector=base.tolist(), width=640),
        row("b", vector=(3 * base + 0.1 * draws.standard_normal(32)).tolist()),
        row("c", vector=draws.standard_normal(32).tolist()),
        row("none", vector=None),
        row("zero", vector=[0.0] * 32),
    ]
    assert kept(run(rows)) == {"a", "b", "c", "none", "zero"}
    found = run(rows, embedding="vector")
    assert kept(found) == {"a", "c", "none", "zero"}
    assert found["b"]["duplicate_kind"] == "embedding" and found["b"]["duplicate_distance"] < 0.05
    with refuses(UserError, "dedup.embedding=vectors", "columns:", "vector"):
        run(rows, embedding="vectors")
    with refuses(UserError, "dedup.embedding=vector", "b", "31"):
        run([rows[0], row("b", vector=[1.0] * 31)], embedding="vector")
    with refuses(UserError, "dedup.embedding=key", "string", "lists of numbers"):
        run(rows, embedding="key")


def test_embeddings_of_another_model_in_the_index_are_passed_over(tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    run([row("a", vector=[1.0, 0.0, 0.5])], "/runs/one", index=index, embedding="vector")
    rows = [row("b", vector=[1.0, 0.0]), row("c", vector=[1.0, 0.01])]
    assert kept(run(rows, "/runs/two", index=index, embedding="vector")) == {"b"}


# -- the index --


def both(index: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    first = [row("a", fingerprint=volume(1)), row("b", fingerprint=volume(2))]
    second = [
        row("a", fingerprint=volume(1, 7), digest="again", source_digest="again", width=640),
        row("z", fingerprint=volume(3), digest="z", source_digest="z"),
    ]
    return first, second


def files(index: Path) -> list[str]:
    return sorted(path.name for path in index.iterdir())


def test_what_another_run_kept_is_dropped_and_names_the_run(tmp_path: Path) -> None:
    index = tmp_path / "index"
    first, second = both(index)
    assert kept(run(first, "/runs/one", index=str(index))) == {"a", "b"}
    found = run(second, "/runs/two", index=str(index))
    assert kept(found) == {"z"}
    assert found["a"]["duplicate_of"] == "/runs/one:a"
    assert found["a"]["duplicate_distance"] < 0.1
    assert read_index(index)["key"].to_pylist() == ["a", "b", "z"]
    named = run(second, "/runs/three", index=str(index), run="three")
    assert named["z"]["duplicate_of"] == "/runs/two:z" and not kept(named)


def test_a_run_is_not_hurt_by_its_own_entries(tmp_path: Path) -> None:
    index = tmp_path / "index"
    first, second = both(index)
    one = run(first, "/runs/one", index=str(index))
    two = run(second, "/runs/two", index=str(index))
    before = files(index)
    for _ in range(2):
        assert run(first, "/runs/one", index=str(index)) == one
        assert run(second, "/runs/two", index=str(index)) == two
    assert files(index) == before and len(before) == 2
    anew = [one | {"digest": f"another encoding of {one['key']}"} for one in first]
    assert kept(run(anew, "/runs/one", index=str(index))) == {"a", "b"}
    # Another rows' run of the same name leaves only what it keeps now.
    more = [*first, row("c", fingerprint=volume(9))]
    assert kept(run(more, "/runs/one", index=str(index))) == {"a", "b", "c"}
    assert len(files(index)) == 2
    assert kept(run(first[:1], "/runs/one", index=str(index))) == {"a"}
    assert [r["key"] for r in read_index(index).to_pylist()] == ["a", "z"]


def test_two_runs_at_once_keep_what_they_kept(tmp_path: Path) -> None:
    """Neither saw the other: a copy stays in both, and neither is emptied by running again."""
    first, second = both(tmp_path)
    for name, rows in (("one", first), ("two", second)):
        run(rows, f"/runs/{name}", index=str(tmp_path / name))
    index = tmp_path / "index"
    index.mkdir()
    for name in ("one", "two"):
        for path in (tmp_path / name).iterdir():
            shutil.copy(path, index)
    assert kept(run(first, "/runs/one", index=str(index))) == {"a", "b"}
    assert kept(run(second, "/runs/two", index=str(index))) == {"a", "z"}


def test_a_run_killed_while_it_writes_the_index_does_no_harm(tmp_path: Path) -> None:
    index = tmp_path / "index"
    first, second = both(index)
    run(first, "/runs/one", index=str(index))
    (index / f".{files(index)[0]}.0123.tmp").write_bytes(b"half a file")
    old = files(index)[-1]
    shutil.copy(index / old, tmp_path / old)
    run([*first, row("c", fingerprint=volume(9))], "/runs/one", index=str(index))
    # Killed before it removed the file that the new one replaces.
    shutil.copy(tmp_path / old, index / old)
    assert kept(run(second, "/runs/two", index=str(index))) == {"z"}
    again = run([*first, row("c", fingerprint=volume(9))], "/runs/one", index=str(index))
    assert kept(again) == {"a", "b", "c"} and old not in files(index)


def test_an_index_that_is_none_is_named(tmp_path: Path) -> None:
    rows = [row("a", fingerprint=volume(1))]
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with refuses(UserError, "dedup.index=", "x.parquet", "remove it"):
        run(rows, index=str(tmp_path))
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "x.parquet")
    with refuses(UserError, "dedup.index=", "x.parquet"):
        run(rows, index=str(tmp_path))
    with refuses(UserError, "dedup.index=", "is a file"):
        STAGE.check(DedupConfig(index=str(tmp_path / "x.parquet")))


def test_entries_of_an_older_format_count_by_their_bytes_alone(tmp_path: Path) -> None:
    entry = {name: None for name in ENTRIES.names} | row("a", fingerprint=b"old" * 5)
    old = {name: entry[name] for name in ENTRIES.names} | {"run": "r", "format": 0}
    write_index(tmp_path, "r", pa.Table.from_pylist([old], schema=ENTRIES))
    rows = [row("b", fingerprint=volume(1)), row("c", digest="digest of a", fingerprint=volume(2))]
    found = run(rows, index=str(tmp_path))
    assert kept(found) == {"b"} and found["c"]["duplicate_of"] == "r:a"


# -- how it grows --


def synthetic(count: int, draws: np.random.Generator) -> np.ndarray:
    """uint8 (count, TIMES, SIDE, SIDE): pictures whose detail falls as nature's does, with slow changes."""
    frequency = np.hypot(np.fft.fftfreq(24)[:, None], np.fft.rfftfreq(24)[None])
    frequency[0, 0] = 1
    waves = np.cos(np.pi * np.arange(1, 5)[:, None] * (np.arange(TIMES) + 0.5) / TIMES)
    made = np.empty((count, TIMES, SIDE, SIDE), np.uint8)
    for begin in range(0, count, 2000):
        size = min(2000, count - begin)
        noise = np.fft.rfft2(draws.standard_normal((size, 5, 24, 24), np.float32)) / frequency**1.3
        fields = np.fft.irfft2(noise)[..., :SIDE, :SIDE]
        fields /= fields.std((2, 3), keepdims=True)
        still = fields[:, :1] * draws.uniform(15, 50, (size, 1, 1, 1))
        moving = np.einsum("ct,ncyx->ntyx", waves, fields[:, 1:])
        moving *= draws.uniform(1.5, 8, (size, 1, 1, 1))
        made[begin : begin + size] = np.clip(still + moving + 120, 0, 255)
    return made


def copies_among(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of which every tenth is a copy, and every tenth has the ground of one static camera."""
    draws = np.random.default_rng(seed)
    volumes, tenth = synthetic(count, draws), count // 10
    copied = volumes[:tenth].astype(np.int16) + draws.integers(-1, 2, (tenth, TIMES, SIDE, SIDE))
    volumes[-tenth:] = np.clip(copied, 0, 255)
    same = volumes[tenth : 2 * tenth].astype(np.float32)
    ground = same[0].mean(0) - same.mean(1, keepdims=True)
    volumes[tenth : 2 * tenth] = np.clip(same + ground, 0, 255)
    return [row(f"{n:07d}", fingerprint=v.tobytes()) for n, v in enumerate(volumes)]


def copies_found(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """(recall, precision) of the clips dropped."""
    found, tenth = run(rows), len(rows) // 10
    dropped = {key: told["duplicate_of"] for key, told in found.items() if told["drop_reason"]}
    right = sum(int(key) - int(of) == len(rows) - tenth for key, of in dropped.items())
    return right / tenth, right / max(1, len(dropped))


def test_copies_are_found_among_thousands() -> None:
    recall, precision = copies_found(copies_among(3000, seed=1))
    assert recall >= 0.99 and precision >= 0.99


@pytest.mark.slow
def test_a_hundred_thousand_clips_take_seconds() -> None:
    seconds = {}
    for count in (12_500, 100_000):
        rows = copies_among(count, seed=2)
        began = time.process_time()
        recall, precision = copies_found(rows)
        seconds[count] = time.process_time() - began
        print(
            f"{count} clips: {seconds[count]:.1f} s, recall {recall:.4f}, precision {precision:.4f}"
        )
        assert recall >= 0.98 and precision >= 0.99
    # Eight times the clips: the work of each grows little until its bands are full.
    assert seconds[100_000] < 16 * seconds[12_500]

"""Several captions a clip: what is drawn follows the weights and nothing else, and no caption is lost on the way."""

import io
import json
import math
import random
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clip_files import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses, says

from data_prep.shards import write_shards
from sora_train.config import BucketClass, BucketsConfig, Config, DataConfig
from sora_train.data.captions.choice import (
    CaptionChoice,
    caption_counts,
    captions_by_name,
    require_captions,
    without_weighted,
)
from sora_train.data.captions.tables import Texts, read_table
from sora_train.data.captions.texts import FIELD_ORDER, as_prompt, dumped, named_captions
from sora_train.data.index.folder import open_source
from sora_train.data.index.shards import HowToIndex, index_shards
from sora_train.data.index.tars import MemberKeys, captions_of, scores_of
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest, empty_row
from sora_train.data.tape.buckets import assign, build_buckets
from sora_train.data.tape.tape import Tape
from sora_train.errors import UserError
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.tools.data.command import index_source
from sora_train.training.pipeline.validation_clips import read_validation

FIELDS = {"style": "flat", "subject": "a red ball", "action": "rolls left", "camera": "still"}
CAPTIONS = dumped({"short": "ball", "dense": "a red ball that rolls", "fields": FIELDS})
DRAWS = 4000
BUCKETS = BucketsConfig(
    fps=8, classes=(BucketClass(name="c", pixels=1536, frames=(5,), aspect_ratios=("3:2",)),)
)
TABLE = build_buckets(BUCKETS, temporal_factor=4, spatial_multiple=16)


def manifest_of(*texts: tuple[str, str], **columns: str) -> Manifest:
    rows = [
        empty_row(key=str(number), caption=main, captions=captions, **columns)
        for number, (main, captions) in enumerate(texts)
    ]
    return Manifest.from_rows(rows, "clips")


def drawn(choice: CaptionChoice, keys: list[tuple[int, int]]) -> list[str]:
    return [choice.prompt("main", CAPTIONS, epoch, row) for epoch, row in keys]


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def indexed(source: Path, output: Path, members: MemberKeys | None = None) -> Manifest:
    how = HowToIndex(members or MemberKeys(), "header")
    found = index_shards(str(source), output, how, workers=1)
    assert found is not None
    return found


def make_loader(manifest: Manifest, **options: object) -> Loader:
    """A loader of two clips a micro-batch and two micro-batches a step."""
    rows = assign(manifest, TABLE, BUCKETS, seed=0).bucket_of_row
    buckets = [spec.bucket for spec in TABLE]
    tape = Tape(rows, manifest.shard, buckets, dict.fromkeys(buckets, 2), seed=0, group=2)
    return Loader(manifest, tape, BUCKETS, DataConfig(**options), seed=0, micro_batches=2)


# -- the law of the draw --------------------------------------------------------------------------


def test_frequencies_are_the_weights():
    weights = {"caption": 5.0, "short": 3.0, "dense": 0.0, "fields": 2.0}
    choice = CaptionChoice(7, weights)
    for keys in ([(0, row) for row in range(DRAWS)], [(epoch, 3) for epoch in range(DRAWS)]):
        found = Counter(drawn(choice, keys))
        wanted = {"main": 0.5, "ball": 0.3, as_prompt(FIELDS): 0.2}
        assert found.keys() == wanted.keys()
        chi2 = sum((found[text] - DRAWS * p) ** 2 / (DRAWS * p) for text, p in wanted.items())
        assert chi2 < 13.8, found  # two degrees of freedom: exceeded once in a thousand seeds


def test_a_draw_belongs_to_its_sample_and_epoch_alone():
    choice = CaptionChoice(7, {"caption": 1.0, "short": 1.0, "fields": 1.0}, field_dropout=0.3)
    keys = [(epoch, row) for epoch in range(3) for row in range(60)]
    told = dict(zip(keys, drawn(choice, keys), strict=True))
    mixed = random.Random(0).sample(keys, len(keys))
    turned = CaptionChoice(7, {"fields": 1.0, "short": 1.0, "caption": 1.0}, field_dropout=0.3)
    assert drawn(turned, mixed) == [told[key] for key in mixed]
    epochs = [[told[epoch, row] for row in range(60)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert drawn(CaptionChoice(8, choice.weights, 0.3), keys) != list(told.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.6, 1.0])
def test_fields_are_dropped_at_their_rate_and_never_all(dropout: float):
    choice = CaptionChoice(7, {"fields": 1.0}, dropout)
    prompts = drawn(choice, [(0, row) for row in range(DRAWS)])
    assert all(prompts)
    # All would be dropped with p^n; then one of the n is kept after all, each as often.
    n, p = len(FIELDS), dropout
    rate = p - p**n / n
    slack = 4 * math.sqrt(rate * (1 - rate) / DRAWS) if dropout < 1 else 0.03
    kept = [[text for text in FIELDS.values() if f"{text}." in prompt] for prompt in prompts]
    for text in FIELDS.values():
        assert abs(1 - sum(text in one for one in kept) / DRAWS - rate) <= slack
    together = sum("flat" in one and "still" in one for one in kept) / DRAWS
    if dropout in (0.0, 0.1, 0.6):
        assert abs(together - (1 - p) ** 2) <= 0.04, "fields are dropped independently"
    assert not dropout or len({tuple(one) for one in kept}) > 3


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["caption", "short", "dense", "gone"]), st.floats(0, 9)),
    st.dictionaries(
        st.sampled_from(["short", "dense", "more"]),
        st.text("abc", min_size=1)
        | st.dictionaries(st.text("xyz", min_size=1), st.text("abc", min_size=1), min_size=1),
    ),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_what_is_drawn_is_a_caption_of_the_clip(
    weights: dict[str, float], captions: dict, dropout: float, row: int
):
    told = CaptionChoice(1, weights, dropout).prompt("main", dumped(captions), 0, row)
    there = {"caption": "main", **captions}
    possible = [there[name] for name, weight in weights.items() if weight > 0 and name in there]
    assert told
    if not possible:
        assert told == "main"
    elif not any(isinstance(said, dict) for said in possible):
        assert told in possible
    if dropout == 0:
        assert told in ["main", *map(as_prompt, possible)]


def test_without_weights_a_caption_is_the_main_one():
    assert set(drawn(CaptionChoice(7, {}, 0.5), [(0, row) for row in range(50)])) == {"main"}


@given(st.permutations(["subject", "camera motion", "Lighting", "zoom", "extra"]))
def test_fields_are_told_in_one_order(names: list[str]):
    fields = {name: name for name in names}
    assert as_prompt(fields) == "subject. camera motion. Lighting. extra. zoom."
    assert as_prompt({"style": "Old film!", "subject": "A cat."}) == "A cat. Old film!"
    assert FIELD_ORDER.index("subject") < FIELD_ORDER.index("camera_motion")


def test_a_caption_that_no_clip_has_is_refused():
    manifest = manifest_of(("a", ""), ("b", dumped({"short": "s"})), ("", dumped({"dense": "d"})))
    require_captions(manifest, {"caption": 1.0, "short": 0.0, "dense": 2.0})
    require_captions(manifest, {})
    with refuses(UserError, "shrot", "caption, short, dense"):
        require_captions(manifest, {"caption": 1.0, "shrot": 1.0})
    with refuses(UserError, "names caption", "none"):
        require_captions(manifest_of(("", "")), {"caption": 1.0})
    assert caption_counts(manifest) == {"caption": 2, "short": 1, "dense": 1}
    assert captions_by_name(manifest)["dense"] == {2: "d"}
    assert without_weighted(manifest, {}) == 0
    assert without_weighted(manifest, {"short": 1.0, "caption": 0.0}) == 2
    assert without_weighted(manifest, {"short": 1.0, "caption": 1.0}) == 1


def test_weights_are_numbers_and_not_all_nought():
    for weights, words in {
        "short=-1": "caption_weights.short=-1.0 is no weight",
        "short=inf": "is no weight",
        "short=nan": "is no weight",
        "short=0": "gives every caption the weight 0",
    }.items():
        name, _, value = weights.partition("=")
        with pytest.raises(ValueError, match=words):
            DataConfig(caption_weights={name: float(value)})


# -- where captions come from ---------------------------------------------------------------------


def test_captions_by_name_from_the_members():
    said = {"caption": {"short": "s", "fields": {"subject": ["a", "b"], "mood": None}}, "n": 3}
    texts = {"json": json.dumps(said), "txt": " plain "}
    keys = ["short=json:caption.short", "dense=txt", "fields=json:caption.fields", "n=json:n"]
    named = {"short": "s", "dense": "plain", "fields": {"subject": "a, b"}}
    # Without a word on the main caption it is the first of the others.
    assert captions_of(texts, keys) == ("s", dumped(named))
    assert captions_of(texts, ["txt", *keys]) == ("plain", dumped(named))
    assert captions_of(texts, ["txt"]) == ("plain", "")
    assert captions_of(texts, ["short=json:gone", "short=txt", "txt"])[1] == '{"short": "plain"}'
    assert captions_of({"json": "[broken"}, keys) == ("", "") == captions_of({"json": "[]"}, keys)
    # An unnamed place of fields is no text.
    assert captions_of(texts, ["json:caption", "txt"])[0] == "plain"


def test_the_json_member_names_captions_and_scores_by_default():
    known = {
        "captions": {"short": "s", "bad": 3, "": "x", "fields": {"subject": "ball"}},
        "scores": {"aesthetic": 5, "motion": 0.25, "no": "high", "yes": True, "nan": math.nan},
    }  # fmt: skip
    texts = {"json": json.dumps(known)}
    named = {"short": "s", "fields": {"subject": "ball"}}
    assert captions_of(texts, MemberKeys().captions) == ("s", dumped(named))
    assert captions_of({**texts, "txt": "main"}, ["txt", "json", "short=txt"]) == (
        "main",
        dumped({**named, "short": "main"}),
    )
    assert scores_of(texts) == '{"aesthetic": 5.0, "motion": 0.25}'
    assert scores_of({"json": '{"scores": 3}'}) == "" == scores_of({})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_hold_captions_and_scores(tmp_path: Path, kind: str):
    rows: list[dict] = [
        {"file": "a.mp4", "caption": "main", "caption_short": "s", "score_aesthetic": 5.5},
        {"file": "b.mp4", "caption": "", "caption_short": "only", "score_aesthetic": None},
    ]
    path = tmp_path / f"captions.{kind}"
    if kind == "csv":
        lines = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]))
    elif kind == "jsonl":
        rows[0] |= {"captions": {"fields": {"subject": "ball"}}, "scores": {"motion": 2}}
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        rows[0] |= {"captions": {"fields": {"subject": "ball", "mood": None}}, "scores": None}
        pq.write_table(pa.Table.from_pylist(rows), path)
    more = {} if kind == "csv" else {"fields": {"subject": "ball"}}
    scores = {"aesthetic": 5.5, **({"motion": 2.0} if kind == "jsonl" else {})}
    assert read_table(path).texts == {
        "a.mp4": Texts("main", dumped({"short": "s", **more}), dumped(scores)),
        "b.mp4": Texts("only", dumped({"short": "only"}), ""),
    }


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({"captions": "text"}, ("row 1", "captions", "caption_NAME")),
        ({"caption_short": 3}, ("row 1", "'short'", "text")),
        ({"captions": {"f": {"subject": 3}}}, ("'f'",)),
        ({"score_a": "high"}, ("row 1", "'a'", "number", "'high'")),
        ({"scores": {"a": True}}, ("'a'", "number", "True")),
    ],
)
def test_a_table_that_says_nonsense_is_refused(tmp_path: Path, row: dict, facts: tuple[str, ...]):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"file": "a.mp4", "caption": "main", **row}))
    with refuses(UserError, *facts):
        read_table(path)


# -- the way through manifests --------------------------------------------------------------------


def test_the_digest_knows_other_captions_but_not_scores():
    plain, named = manifest_of(("a", "")), manifest_of(("a", dumped({"short": "s"})))
    assert plain.digest() == "ca0adafdba49ccf9e24e144f26ade64a"
    assert len({one.digest() for one in (plain, named, manifest_of(("a", '{"short": "t"}')))}) == 3
    assert manifest_of(("a", ""), scores='{"a": 1.0}').digest() == plain.digest()


def test_nothing_is_lost_from_tar_to_manifest_to_shards_and_back(tmp_path: Path):
    clip = write_clip(tmp_path / "clip.mp4").read_bytes()
    known = {"caption": {"short": "s", "fields": FIELDS}, "scores": {"aesthetic": 5}}
    make_tar(
        tmp_path / "in" / "0.tar",
        {
            "a.json": json.dumps(known).encode(),
            "a.mp4": clip,
            "a.txt": b"dense one",
            "b.mp4": clip,
            "b.txt": b"alone",
        },
    )
    keys = ("txt", "short=json:caption.short", "fields=json:caption.fields", "none=json:none")
    manifest = indexed(tmp_path / "in", tmp_path / "index", MemberKeys((), keys))
    told = index_source(
        [
            f"source={tmp_path / 'in'}",
            f"work_dir={tmp_path / 'work'}",
            "probe=header",
            "workers=1",
            f"caption_keys=[{','.join(keys)}]",
        ]
    )
    says(told, "2 caption", "1 fields", "1 short", "0 none")
    assert manifest.caption.tolist() == ["dense one", "alone"]
    assert named_captions(manifest.captions[0]) == {"short": "s", "fields": FIELDS}
    assert manifest.captions[1] == "" == manifest.scores[1]
    assert json.loads(manifest.scores[0]) == {"aesthetic": 5.0}
    shards = write_shards(str(tmp_path / "index"), str(tmp_path / "out"), workers=1)
    again = indexed(tmp_path / "out", tmp_path / "again")
    found = open_source(str(tmp_path / "index"), work_dir=tmp_path / "work")
    for other in (found, shards, again):
        for name in ("caption", "captions", "scores"):
            assert getattr(other, name).tolist() == getattr(manifest, name).tolist(), name


def test_the_loader_tells_the_caption_of_the_sample_and_its_epoch(tmp_path: Path):
    for number in range(6):
        write_clip(tmp_path / f"{number}.mp4", count=5)
    rows = [
        {"file": f"{number}.mp4", "caption": f"main {number}", "caption_short": f"short {number}"}
        for number in range(6)
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = open_source(str(tmp_path), work_dir=tmp_path / ".work")
    weights = {"caption": 1.0, "short": 1.0}
    choice = CaptionChoice(0, weights, 0.1)
    told: dict[int, dict[tuple[int, int], str]] = {}
    for workers in (1, 2):
        options = {"caption_weights": weights, "num_workers": workers, "prefetch": workers}
        with make_loader(manifest, **options) as loader:
            batches = [batch for step in range(4) for batch in loader.step(step)]
        clips = [clip for batch in batches for clip in batch.clips]
        told[workers] = {(clip.epoch, clip.row): clip.caption for clip in clips}
    assert told[1] == told[2] and len({epoch for epoch, _ in told[1]}) > 1
    for (epoch, row), caption in told[1].items():
        assert caption == choice.prompt(manifest.caption[row], manifest.captions[row], epoch, row)
    assert {caption.split()[0] for caption in told[1].values()} == {"main", "short"}
    with refuses(UserError, "names long"):
        make_loader(manifest, caption_weights={"long": 1.0})
    # Validation compares steps and runs: it always has the main caption.
    cfg = Config(data={"caption_weights": {"short": 1.0}, "num_workers": 1}, buckets=BUCKETS)
    control = ControlPlane(World(0, 1, 0, 1, torch.device("cpu")))
    held_out = read_validation(cfg, manifest, TABLE, torch.nn.Linear(1, 1), False, control)
    assert [clip.caption for clip in held_out] == manifest.caption.tolist()

"""Captions are text or an error: every input is read as it is, or its clip is dropped with file, row and reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sentences import refuses, says

from sora_train.data.index.folder import open_source
from sora_train.data.index.listing import Member, list_source
from sora_train.errors import UserError

PLAIN = "a red square moves right"
Told = dict[str, str | tuple[str, ...]]
"""By clip: its caption, or the facts that its fault tells."""

READ: dict[str, tuple[str, Told]] = {
    "01-jsonl-u0085": (
        "tau#354, datalad#3523",
        {"c0.mp4": PLAIN, "c1.mp4": "a red square\x85moves right", "c2.mp4": PLAIN},
    ),
    "01-jsonl-u2028": (
        "tau#354, datalad#3523",
        {"c0.mp4": PLAIN, "c1.mp4": "a red square\u2028moves right", "c2.mp4": PLAIN},
    ),
    "01-jsonl-u2029": (
        "tau#354, datalad#3523",
        {"c0.mp4": PLAIN, "c1.mp4": "a red square\u2029moves right", "c2.mp4": PLAIN},
    ),
    "02-sidecar-encodings": (
        "ai-toolkit#792, fluxgym#436",
        {
            "c0.mp4": "a café scene, “red” square moves right",
            "c1.mp4": "a café scene, “red” square moves right",
            "c2.mp4": ("c2.txt", "byte 0xe9 at offset 5", "UTF-8"),
            "c3.mp4": ("c3.txt", "byte 0xba at offset 0", "UTF-8"),
        },
    ),
    "03-lone-surrogate": (
        "tiktoken#82, transformers#8886",
        {
            "c0.mp4": ("captions.jsonl", "row 1", "U+D83D", "character 26"),
            "c1.mp4": "a red square moves left",
            "c2.mp4": "a red square stands still",
        },
    ),
    "09-csv-commas": (
        "mindone#133, video2dataset#117",
        {
            "c0.mp4": ("captions.csv", "line 2", "4 cells", "2", "quotes"),
            "c1.mp4": "a square moves left",
            "c2.mp4": "a square, quoted, stands",
        },
    ),
    "10-caption-types": (
        "img2dataset#46, inspect_ai#4627",
        {
            "c0.mp4": ("row 1", "a list"),
            "c1.mp4": ("row 2", "an object"),
            "c2.mp4": ("row 3", "NaN"),
            "c3.mp4": ("row 4", "null"),
            "c4.mp4": ("row 5", "True"),
            "c5.mp4": "a plain text",
        },
    ),
    "22-table-backslash": (
        "SimpleTuner#594",
        {f"sub/c{number}.mp4": f"caption {number}" for number in range(3)},
    ),
    "22-table-dot": (
        "SimpleTuner#594",
        {f"c{number}.mp4": f"caption {number}" for number in range(3)},
    ),
    "22-table-double": (
        "SimpleTuner#594",
        {f"sub/c{number}.mp4": f"caption {number}" for number in range(3)},
    ),
    "22-table-mixed": ("SimpleTuner#594", {"m0.mp4": "one", "m1.mp4": "two", "m2.mp4": "three"}),
    "31-csv-semicolon": (
        "mindone#133",
        {"c0.mp4": "a red square, moving", "c1.mp4": "a blue one"},
    ),
    "31-metadata-csv": (
        "video2dataset#117",
        {"c0.mp4": "a red square, moving", "c1.mp4": "a blue one"},
    ),
}

REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "10-parquet-list": ("img2dataset#46", ("captions.parquet", "row 1", "a list", "3 rows")),
    "10-parquet-nan": ("img2dataset#46", ("captions.parquet", "row 1", "NaN", "caption")),
    "31-csv-quotes": ("mindone#133", ("captions.csv", "line 4", "quote", "correct")),
    "32-hf-parquet": ("", ("no clips", "1 .parquet")),
    "32-hf-parquet/list.jsonl": ("", ("list.jsonl", "line 1", "a list", "a.mp4")),
    "32-hf-parquet/train-00000-of-00001.parquet": (
        "",
        ("datasets library", "'video'", "bytes", "captions.jsonl"),
    ),
}


def said(member: Member) -> str:
    return member.fault or member.lacks


@pytest.mark.parametrize("name", READ)
def test_captions_are_what_is_written_or_their_clip_is_dropped(
    cases: Path, row: Callable[..., None], name: str
):
    after, wanted = READ[name]
    found = {member.key: member for member in list_source(cases / name, "").members}
    assert found.keys() == wanted.keys()
    for clip, facts in wanted.items():
        if isinstance(facts, str):
            assert (found[clip].caption, said(found[clip])) == (facts, ""), clip
        else:
            assert found[clip].caption == ""
            says(said(found[clip]), *facts)
    dropped = [said(member) for member in found.values() if said(member)]
    reasons = "; ".join(text.removeprefix(f"{cases / name}/") for text in dropped)
    row(name, after, f"{len(found) - len(dropped)} of {len(found)} clips", reasons or "every one")


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_is_spoiled_as_a_whole_is_refused_before_a_clip_is_probed(
    cases: Path, tmp_path: Path, row: Callable[..., None], name: str
):
    after, facts = REFUSED[name]
    with refuses(UserError, *facts) as caught:
        open_source(str(cases / name), work_dir=tmp_path)
    row(name, after, "refused", str(caught.value).replace(f"{cases}/", "")[:160])

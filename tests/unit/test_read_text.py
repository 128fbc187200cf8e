"""Text that people wrote is read as exactly what is there, or refused with its place: tables, prompts, configs."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentences import refuses, says

from sora_train.base.text import NotText, decode_text, lines_of, printable, require_text
from sora_train.config.yaml_files import load_yaml
from sora_train.data.captions.tables import Table, Texts, read_table
from sora_train.errors import ConfigError, UserError
from sora_train.sampling.prompts.file import read_prompts

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=40)
LINE_SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf"
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")


def table_of(folder: Path, name: str, data: bytes | str) -> Table:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_table(path)


def captions(table: Table) -> dict[str, str]:
    return {name: texts.caption for name, texts in table.texts.items() if not texts.fault}


# -- bytes ----------------------------------------------------------------------------------------


@given(TEXT, st.sampled_from(ENCODINGS))
@example("ÿþ", "utf-8")
@example("\U0001f600 café", "utf-16")
def test_a_text_reads_back_equal_in_every_encoding(text: str, encoding: str):
    assert decode_text(text.encode(encoding), "a.txt") == text


@given(st.binary(max_size=30))
@example(b"\xff\xfea\0\0\0")
@example(b"\xff\xfe\0\0a\0\0\0")
@example(b"a\0b\0")
@example(b"\xef\xbb\xbfab\xe9")
@example(b"\xed\xa0\x80")
def test_any_bytes_are_their_text_or_refused_with_the_offset(data: bytes):
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        wanted = data.decode(encoding)
    except UnicodeDecodeError as error:
        mark = 3 if encoding == "utf-8-sig" and data.startswith(b"\xef\xbb\xbf") else 0
        offset = error.start + mark
        if encoding == "utf-8-sig" and b"\0" in data[:offset]:
            offset = data.index(b"\0")
        elif encoding == "utf-16":
            offset = error.start
        with refuses(NotText, "a.txt", f"offset {offset}", f"0x{data[offset]:02x}", "UTF-8"):
            decode_text(data, "a.txt")
        return
    if "\0" not in wanted:
        assert decode_text(data, "a.txt") == wanted
        return
    with refuses(NotText, "a.txt", "0x00", "UTF-8"):
        decode_text(data, "a.txt")


def test_half_a_pair_is_no_text_and_can_be_told():
    with refuses(NotText, "prompt 1", "U+D83D", "character 3"):
        require_text("a \ud83d", "prompt 1")
    assert printable("caf\udce9 \ud83d é") == "caf\\xe9 \\ud83d é"
    assert lines_of(f"one\r\n{LINE_SEPARATORS}\rthree\n") == ["one", LINE_SEPARATORS, "three", ""]


# -- tables ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(st.integers(0, 99).map("c{}.mp4".format), TEXT, min_size=1, max_size=4),
    st.sampled_from(ENCODINGS),
    st.sampled_from([("captions.csv", ","), ("captions.csv", ";"), ("captions.tsv", "\t")]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_every_table_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    texts: dict[str, str],
    encoding: str,
    kind: tuple[str, str],
    end: str,
):
    folder = tmp_path_factory.mktemp("table")
    wanted = {name: text.strip() for name, text in texts.items()}
    jsonl = end.join(
        json.dumps({"file": name, "caption": text}, ensure_ascii=False)
        for name, text in texts.items()
    )
    assert captions(table_of(folder, "captions.jsonl", jsonl.encode(encoding))) == wanted
    written = io.StringIO(newline="")
    # Left to itself it does not quote a lone carriage return.
    writer = csv.writer(written, delimiter=kind[1], lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("video", "prompt"), *texts.items()])
    assert captions(table_of(folder, kind[0], written.getvalue().encode(encoding))) == wanted
    columns = {"path": list(texts), "text": list(texts.values())}
    pq.write_table(pa.table(columns), folder / "captions.parquet")
    assert captions(read_table(folder / "captions.parquet")) == wanted


CELLS = st.one_of(
    TEXT, st.none(), st.booleans(), st.floats(), st.integers(), st.lists(TEXT, max_size=2),
    st.dictionaries(st.sampled_from(["short", "bytes"]), TEXT, max_size=2), st.just("half \ud83d"),
)  # fmt: skip
JUNK = st.sampled_from(
    ["", "{", "[1]", "null", '{"file": 3}', '{"caption": "x"}', "\udce9", "[" * 9999]
)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.one_of(CELLS.map(lambda cell: ("cell", cell)), JUNK.map(lambda j: ("junk", j)))))
def test_rows_used_and_dropped_are_all(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, object]]
):
    folder = tmp_path_factory.mktemp("rows")
    whole = {"file": "whole.mp4", "caption": "kept"}
    written = [json.dumps(whole)] + [
        json.dumps({"file": f"{number}.mp4", "caption": value}) if kind == "cell" else str(value)
        for number, (kind, value) in enumerate(lines)
    ]
    data = "\n".join(written).encode("utf-8", "surrogateescape")
    table = table_of(folder, "captions.jsonl", data)
    assert len(table.texts) + len(table.nameless) == sum(bool(line.strip()) for line in written)
    for number, (kind, value) in enumerate(lines):
        if kind == "cell":
            texts = table.texts[f"{number}.mp4"]
            is_text = isinstance(value, str) and "\ud83d" not in value
            assert (texts.caption, bool(texts.caption or texts.lacks or texts.fault)) == (
                str(value).strip() if is_text else "",
                True,
            )
    for said in [
        *table.nameless.values(),
        *(one.fault + one.lacks for one in table.texts.values()),
    ]:
        said.encode()


@pytest.mark.parametrize(
    ("name", "data", "facts"),
    [
        ("a.csv", 'file,caption\na.mp4,"open\nb.mp4,x\n', ("line 2", "quote")),
        ("a.csv", 'file,caption\na.mp4,x\nb.mp4,"say "hi" now"\n', ("line 3", "quote")),
        ("a.csv", "clip,caption\na.mp4,x\n", ("a.csv", "file", "clip, caption")),
        ("a.csv", "a.mp4,x\nb.mp4,y\n", ("a.csv", "file", "the columns are a.mp4, x")),
        ("a.csv", "file,caption,caption\na.mp4,x,y\n", ("'caption'", "twice")),
        ("a.csv", "file,caption\na.mp4,x\na.mp4,y\n", ("line 3", "'a.mp4'", "before")),
        ("a.csv", "file,caption\na.mp4,x,y\n", ("line 2", "3 cells", "2")),
        ("a.jsonl", '{"file": "a.mp4", "caption": "x", "caption": "y"}', ("line 1", "caption", "twice")),
        ("a.jsonl", '{"file": "a.mp4", "score_\\ud83d": 1}', ("line 1", "U+D83D")),
        ("a.jsonl", '{"file": "a.mp4", "caption_\\ud83d": "x"}', ("line 1", "U+D83D")),
        ("a.jsonl", '[{"file": "a.mp4"}]', ("line 1", "object")),
        ("a.csv", "file,caption\na.mp4,caf\xe9\n".encode("latin-1"), ("line 2", "0xe9", "offset 22")),
        ("a.csv", "file,caption\na.mp4,x\n".encode("utf-16")[:-1], ("a.csv", "UTF-16", "truncated")),
        ("a.csv", "file,caption\na.mp4,x\n".encode("utf-16-le"), ("line 1", "0x00", "offset 1")),
        ("a.json", "[]", ("a.json", ".jsonl")),
        ("a.parquet", b"PAR1", ("a.parquet", "parquet")),
    ],
)  # fmt: skip
def test_a_table_that_is_spoiled_is_refused_with_its_line(
    tmp_path: Path, name: str, data: str | bytes, facts: tuple[str, ...]
):
    with refuses(UserError, *facts):
        table_of(tmp_path, name, data)


def test_one_bad_row_costs_its_clip_alone(tmp_path: Path):
    rows = b'file,caption\na.mp4,fine\nb.mp4,caf\xe9\nc.mp4,one,two\nd.mp4\n,nameless\ne.mp4,12" wide\n'
    table = table_of(tmp_path, "captions.csv", rows)
    assert captions(table) == {"a.mp4": "fine", "e.mp4": '12" wide'}
    says(table.texts["b.mp4"].fault, "line 3", "0xe9", "offset 33")
    says(table.texts["c.mp4"].fault, "line 4", "3 cells")
    says(table.texts["d.mp4"].fault, "line 5", "1 cells")
    ((place, fault),) = table.nameless.items()
    says(f"{place} {fault}", "line 6", "no column names the clip")


def test_parquet_holds_bytes_that_are_no_text(tmp_path: Path):
    strings = pa.array([b"fine", b"caf\xe9"]).cast(pa.binary()).view(pa.string())
    table = pa.table({"file": ["a.mp4", "b.mp4"], "caption": strings})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read_table(tmp_path / "a.parquet")
    assert found.texts["a.mp4"] == Texts("fine")
    says(found.texts["b.mp4"].fault, "row 2", "caption", "0xe9", "offset 3")


def test_columns_are_known_by_their_names(tmp_path: Path):
    for header in (
        "file,caption",
        "video,prompt",
        "file_name,text",
        "Path , Caption",
        "image_path,text",
    ):
        assert captions(table_of(tmp_path, "a.csv", f"{header}\na.mp4,x\n")) == {"a.mp4": "x"}
    says(
        table_of(tmp_path, "a.csv", "file,title\na.mp4,x\n").texts["a.mp4"].lacks, "title", "line 2"
    )


# -- prompts and configs --------------------------------------------------------------------------


def test_prompts_are_lines_of_text(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    for encoding in ENCODINGS:
        path.write_bytes(f"one\r\n\r\n {LINE_SEPARATORS}\nthree".encode(encoding))
        assert [one.prompt for one in read_prompts(path)] == ["one", LINE_SEPARATORS, "three"]
    path.write_bytes(b"caf\xe9")
    with refuses(UserError, "--prompts", "prompts.txt", "0xe9", "offset 3"):
        read_prompts(path)


def test_configs_are_text(tmp_path: Path):
    path = tmp_path / "a.yaml"
    for encoding in ENCODINGS:
        path.write_bytes("name: café\n".encode(encoding))
        assert load_yaml(path) == {"name": "café"}
    path.write_bytes(b"name: caf\xe9\n")
    with refuses(ConfigError, "a.yaml", "0xe9", "offset 9"):
        load_yaml(path)

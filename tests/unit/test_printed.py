"""What people wrote is printed as they wrote it, and what is to be run next can be pasted into a shell."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.types import QuotedString
from hypothesis import example, given
from hypothesis import strategies as st
from rich.table import Table
from sentences import refuses

from sora_train.base.console import plain_console
from sora_train.base.progress import Progress
from sora_train.cli import run
from sora_train.config.overrides import parse_overrides
from sora_train.errors import UserError
from sora_train.tools.convert.stored_weights import WEIGHTS, StoredWeights
from sora_train.tools.data.command import source_of
from sora_train.tools.terminal import with_json_file, write_json

PACKAGE = Path(__file__).resolve().parents[2] / "sora_train"
TEXT = st.text(st.sampled_from("[]/a:\\=b@#*"), min_size=1, max_size=30)


@given(TEXT)
@example("a [red cat] and [/bold]")
@example(":smile: [link=x]")
def test_brackets_and_colons_are_text(text: str) -> None:
    file = io.StringIO()
    console = plain_console(file=file, width=200)
    table = Table(title=text, title_justify="left")
    table.add_column(text)
    table.add_row(text)
    console.print(text)
    console.print(table)
    assert file.getvalue().count(text) >= 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_the_name_of_a_run_as_it_is() -> None:
    file = Terminal()
    with Progress(2, "sampling [a] and [/b]", file=file) as bar:
        bar.update(2, prompt="[/x]")
    assert "[a] and [/b]" in file.getvalue() and "[/x]" in file.getvalue()


def test_only_the_doctor_prints_markup() -> None:
    """It escapes what it prints; everyone else has a plain console."""
    users = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if re.search(r"(?<![\w_])Console\(", path.read_text())
    ]
    assert users == ["base/console.py", "tools/doctor/start.py"]


@pytest.mark.parametrize("place", ["clips", "my clips", "it's {a,b}", "a;rm -rf=$x"])
def test_a_source_survives_the_shell_and_the_grammar(place: str) -> None:
    (word,) = shlex.split(source_of(place))
    (override,) = parse_overrides([word])
    value = override.value()
    assert (value.text if isinstance(value, QuotedString) else value) == place


def test_every_next_line_with_a_path_quotes_it() -> None:
    """A path stands in a command only inside shlex.quote, or as Python writes it."""
    bare = re.compile(r"next: sora [^\n]*\{(?!shlex\.quote|own|config|source_of|' '\.join|command)")
    for path in PACKAGE.rglob("*.py"):
        assert not bare.search(path.read_text()), path


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("plan --json", "plan --json -"),
        ("plan --json -", "plan --json -"),
        ("plan --json out.json a=1", "plan --json out.json a=1"),
        ("plan --json experiment=x --html p", "plan --json - experiment=x --html p"),
        ("doctor --json --seconds 30", "doctor --json - --seconds 30"),
    ],
)
def test_json_goes_to_a_file_or_is_printed(given: str, taken: str) -> None:
    assert with_json_file(given.split()) == taken.split()


@pytest.mark.slow
def test_the_doctor_prints_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", "--json", "--no-bandwidth"])
    assert "nodes" in json.loads(capsys.readouterr().out)


def test_json_is_written_whole_or_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json({"a": [1]}, str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1]}
    assert capsys.readouterr().out == ""
    write_json({"a": [1]}, "-")
    assert json.loads(capsys.readouterr().out) == {"a": [1]}


@pytest.mark.slow
def test_a_plan_prints_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["plan", "--json", "experiment=parity_tiny", "cluster=1xcpu", "plan.keep_layout=true"])
        == 0
    )
    assert "stages" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("diffusion_pytorch_model.fp16.safetensors", ("fp16", "variant")),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", ("index",)),
        ("diffusion_pytorch_model.bin", ("pickle", "safetensors")),
    ],
)
def test_weights_in_another_form_are_named(
    name: str, facts: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"")
    with refuses(UserError, name, WEIGHTS, *facts):
        StoredWeights(tmp_path)

"""What a stage of the preparation is: a function over rows, its section of settings, and the columns it reads and adds.

A stage that looks at each row alone runs in processes that can be killed, few rows at a time; one that needs all rows
at once (`whole`) runs in the process of the command. Neither knows which engine calls it, nor what other stages there
are.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from sora_train.config.sections.base import Section
from sora_train.errors import UserError

KEY = "key"
"""The column that names a row: of a source its place below the input, of a clip that and its times."""
DROPS = pa.schema(
    [("drop_stage", pa.string()), ("drop_reason", pa.string()), ("drop_detail", pa.string())]
)
"""Columns of every table: empty texts while a row is kept. Stages may set the last two."""
LATER = pa.schema([("later_reason", pa.string()), ("later_detail", pa.string())])
"""Columns by which a stage that gets several rows says of some what `Later` says of all."""
OF_ROW = "of_row"
"""A column of numbers by which a stage says of which row of its input each row of its output is."""
STAGE_NAME = "STAGE"


class Later(Exception):
    """A row cannot be done now, such as with a service that is down: it is dropped, and tried again in the next run."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Workspace:
    """The folders a stage may write to: `out` is the output's, `files` holds clips by the digest of how they were made.

    `input` is what the command was given, and empty in worker processes.
    """

    out: Path
    input: str = ""

    @property
    def files(self) -> Path:
        return self.out / "prep" / "files"

    @property
    def ledger(self) -> Path:
        return self.out / "prep" / "stages"


@dataclass(frozen=True)
class Stage:
    """A step of the preparation.

    `run(rows, settings, workspace)` gets a table and returns one with the columns of `adds`, a row for each, or any
    number with a column `of_row`. It sets `drop_reason` and `drop_detail` for rows that are of no use; it raises
    `BadClip` where the one row it was given cannot be read, and `Later` where it may be read another time. Rows that
    were dropped reach only stages that are `whole`.
    """

    name: str
    run: Callable[[pa.Table, Any, Workspace], pa.Table]
    config: type[Section]
    adds: pa.Schema
    reads: tuple[str, ...] = ()
    """Columns its result depends on: a row whose values in them were met before is not computed again."""
    reads_also: Callable[[Any], tuple[str, ...]] = lambda settings: ()
    """Further such columns, by its settings, such as those that a template of the user's names."""
    whole: bool = False
    is_remembered: bool = True
    """Of a stage that is whole: whether its table may stand for calling it again."""
    is_filter: bool = False
    """Whether it drops by thresholds, so that a few rows are tried with it before the long work."""
    rows_at_once: int = 1
    seconds: Callable[[Mapping[str, Any], Any], float] = lambda row, settings: 120.0
    """The deadline of a row, by its columns and the stage's settings."""
    gpus: float = 0.0
    check: Callable[[Any], None] = lambda settings: None
    """Raises UserError for a model or an extra that is missing, before any work."""
    check_sources: Callable[[pa.Table, Any], None] = lambda rows, settings: None
    """Raises UserError where the sources, as they are listed, leave nothing for it to keep."""
    is_on: Callable[[Any], bool] = lambda settings: True
    """Whether there is anything to do with these settings; else the stage is left out, and so are its columns."""
    after: str = ""
    """Of a stage of the user's: the stage behind which it stands."""
    module: str = ""
    """The module, or the file of a user's stage, that holds it as STAGE."""

    def version(self) -> str:
        """A digest of its code and of what it imports from here, without comments and docstrings."""
        return _code_version(self.module)

    def address(self, settings: Section) -> str:
        """A digest of the stage with its settings: what its results are kept under, beside their input."""
        text = json.dumps(
            [self.name, self.version(), settings.model_dump(mode="json")], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_stage(module: str) -> Stage:
    """The stage of a module of `data_prep.stages`, or of a file of the user's. Raises UserError where it holds none."""
    found = load_module(module)
    stage = getattr(found, STAGE_NAME, None)
    if not isinstance(stage, Stage):
        raise UserError(
            f"stages={module} holds no stage; give it `STAGE = Stage(name=..., run=..., ...)` as docs/prep.md shows"
        )
    return replace(stage, module=module)


def load_module(module: str) -> Any:
    """A module by its name, or by the path of its file. Raises UserError where the file cannot be imported."""
    return _module_of_file(module) if module.endswith(".py") else importlib.import_module(module)


def _module_of_file(file: str) -> Any:
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UserError(
            f"stages={file} does not exist; give the path of a Python file that holds STAGE"
        )
    name = f"sora_prep_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"stages={file} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module


@cache
def _code_version(module: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(_files_of(module)):
        digest.update(ast.dump(_without_docstrings(path)).encode())
    return digest.hexdigest()[:32]


def _files_of(module: str) -> set[Path]:
    """The file of a module and those of `data_prep` that it imports, theirs included."""
    root = Path(__file__).parent.parent
    first = Path(module).expanduser().resolve() if module.endswith(".py") else _file(root, module)
    found: set[Path] = set()
    waiting = [first] if first else []
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += [file for name in _imported(path) if (file := _file(root, name))]
    # What every stage imports decides of none what it computes.
    return found - {Path(__file__)}


def _file(root: Path, module: str) -> Path | None:
    if module.split(".")[0] != "data_prep":
        return None
    base = root.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                line
                for line in node.body
                if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return tree

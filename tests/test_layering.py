"""The shape of the code: each room imports only lower floors, no files form a circle, and each file has one idea.

The laws and the floors are in `layering.py`; every law is also shown a small house that breaks it.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import layering
import pytest
from layering import House

Law = Callable[[House], Iterator[str]]


def diffusion_beyond_torch(house: House) -> Iterator[str]:
    yield from layering.packages_beyond(house, "diffusion", {"torch", "einops", "numpy"})


def shapes_beyond_numpy(house: House) -> Iterator[str]:
    yield from layering.packages_beyond(house, "data/shapes", {"numpy"})


LAWS: tuple[Law, ...] = (
    layering.upward_imports,
    layering.disorder_inside,
    layering.cycles,
    layering.tools_that_import_tools,
    layering.outsiders_imported,
    layering.relative_imports,
    diffusion_beyond_torch,
    shapes_beyond_numpy,
    layering.models_that_know_ranks,
    layering.optional_packages,
    layering.torch_imported,
    layering.crowded_folders,
    layering.folders_without_idea,
    layering.trainer_parameters,
    layering.long_functions,
    layering.nameless_files,
    layering.swallowed_exceptions,
)

FILES = {f"sora_train/data/decode/part{number}.py": '"""A part."""' for number in range(14)}

BREACHES: dict[str, tuple[Law, dict[str, str], str]] = {
    "an import for type checkers alone": (
        layering.upward_imports,
        {
            "sora_train/config/a.py": "if TYPE_CHECKING:\n    from sora_train.training.b import B",
            "sora_train/training/b.py": "",
        },
        "sora_train/config/a.py",
    ),
    "a lazy import of a room on the same floor": (
        layering.upward_imports,
        {
            "sora_train/config/a.py": "def f():\n    import sora_train.diffusion.b",
            "sora_train/diffusion/b.py": "",
        },
        "sora_train/config/a.py",
    ),
    "a room without a floor": (
        layering.upward_imports,
        {"sora_train/cellar/a.py": ""},
        "sora_train/cellar/a.py",
    ),
    "an import against the order inside a room": (
        layering.disorder_inside,
        {
            "sora_train/data/storage/a.py": "from sora_train.data.decode import b",
            "sora_train/data/decode/b.py": "",
        },
        "sora_train/data/storage/a.py",
    ),
    "a file without a place inside a room": (
        layering.disorder_inside,
        {"sora_train/training/attic.py": ""},
        "sora_train/training/attic.py",
    ),
    "a circle of three files": (
        layering.cycles,
        {
            "sora_train/base/a.py": "from sora_train.base.b import f",
            "sora_train/base/b.py": "def f():\n    from sora_train.base import c",
            "sora_train/base/c.py": "if TYPE_CHECKING:\n    from sora_train.base.a import A",
        },
        "sora_train/base/a.py",
    ),
    "a tool that imports a tool": (
        layering.tools_that_import_tools,
        {
            "sora_train/tools/watch/a.py": "from sora_train.tools.plan.b import c",
            "sora_train/tools/plan/b.py": "",
            "sora_train/tools/launch/a.py": "from sora_train.tools.sweep.b import c",
            "sora_train/tools/sweep/b.py": "from sora_train.tools.terminal import run",
            "sora_train/tools/terminal.py": "",
        },
        "sora_train/tools/watch/a.py",
    ),
    "data preparation imported by a room": (
        layering.outsiders_imported,
        {"sora_train/data/a.py": "def f():\n    from data_prep import shards"},
        "sora_train/data/a.py",
    ),
    "data preparation that trains": (
        layering.outsiders_imported,
        {"data_prep/a.py": "import sora_train.training.b", "sora_train/training/b.py": ""},
        "data_prep/a.py",
    ),
    "a benchmark imported by a tool": (
        layering.outsiders_imported,
        {"sora_train/tools/plan/a.py": "from benchmarks import chaos"},
        "sora_train/tools/plan/a.py",
    ),
    "a relative import": (
        layering.relative_imports,
        {"sora_train/base/a.py": "from .b import c"},
        "sora_train/base/a.py",
    ),
    "diffusion that reads files of another package": (
        diffusion_beyond_torch,
        {"sora_train/diffusion/a.py": "import torch\nimport safetensors"},
        "sora_train/diffusion/a.py",
    ),
    "shapes that need an image library": (
        shapes_beyond_numpy,
        {"sora_train/data/shapes/a.py": "from PIL import Image"},
        "sora_train/data/shapes/a.py",
    ),
    "a model that knows its rank": (
        layering.models_that_know_ranks,
        {"sora_train/models/a.py": "def f():\n    from torch import distributed"},
        "sora_train/models/a.py",
    ),
    "an optional package at the top of a file": (
        layering.optional_packages,
        {"sora_train/data/a.py": "import decord"},
        "sora_train/data/a.py",
    ),
    "an optional package in two files": (
        layering.optional_packages,
        {
            "sora_train/data/a.py": "def f():\n    import decord",
            "sora_train/data/b.py": "def f():\n    importlib.import_module('decord.bridge')",
        },
        "sora_train/data/b.py",
    ),
    "a package that another room is written with": (
        layering.optional_packages,
        {
            "sora_train/serving/a.py": "import sqlalchemy",
            "sora_train/serving/b.py": "import sqlalchemy",
            "sora_train/tools/c.py": "def f():\n    import sqlalchemy",
        },
        "sora_train/tools/c.py",
    ),
    "a room of optional packages at the top of a file": (
        layering.optional_packages,
        {
            "sora_train/serving/a.py": "import fastapi",
            "sora_train/tools/b.py": "from sora_train.serving.a import c",
            "sora_train/tools/d.py": "def f():\n    from sora_train.serving.a import c",
        },
        "sora_train/tools/b.py",
    ),
    "torch behind a torch-free command": (
        layering.torch_imported,
        {
            "sora_train/__init__.py": "",
            "sora_train/cli.py": "import sora_train.models.b",
            "sora_train/models/b.py": "import torch.nn",
        },
        "sora_train/cli.py",
    ),
    "fourteen files in a folder": (layering.crowded_folders, FILES, "sora_train/data/decode"),
    "a folder without a sentence": (
        layering.folders_without_idea,
        {
            "sora_train/base/__init__.py": '"""Many things. And others."""',
            "sora_train/base/a.py": "",
        },
        "sora_train/base/__init__.py",
    ),
    "a function that takes the whole Trainer": (
        layering.trainer_parameters,
        {
            "sora_train/training/card.py": 'def show(trainer: "Trainer | None"): ...',
            "sora_train/training/logger.py": "class Log(Callback):\n    def f(self, t: Trainer): ...",
            "sora_train/training/trainer.py": "def check(trainer: Trainer): ...",
        },
        "sora_train/training/card.py",
    ),
    "a function of 61 lines": (
        layering.long_functions,
        {"sora_train/base/a.py": "def f():\n" + "    x = 1\n" * 60},
        "sora_train/base/a.py",
    ),
    "a file named for nothing": (
        layering.nameless_files,
        {"sora_train/base/utils.py": '"""Things."""'},
        "sora_train/base/utils.py",
    ),
    "a file without a docstring": (
        layering.nameless_files,
        {"sora_train/base/a.py": "x = 1"},
        "sora_train/base/a.py",
    ),
    "an exception passed over": (
        layering.swallowed_exceptions,
        {"sora_train/base/a.py": "try:\n    f()\nexcept Exception:\n    pass"},
        "sora_train/base/a.py",
    ),
}
"""What breaks a law: the law, the files of a house, and the one file that is to be named."""


@pytest.fixture(scope="module")
def house() -> House:
    return House()


def offender(line: str) -> str:
    return line.split()[0].rstrip(":")


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_house_keeps_the_law(law: Law, house: House):
    broken = list(law(house))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("breach", BREACHES.values(), ids=BREACHES.keys())
def test_a_breach_is_named(breach: tuple[Law, dict[str, str], str], tmp_path: Path):
    law, files, guilty = breach
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert {offender(line) for line in law(House(tmp_path))} == {guilty}


def test_the_picture_shows_the_imports(house: House):
    """docs/images/house.svg has the arrows of today; one that is new or gone: run `make house`."""
    picture = (layering.REPO / "docs/images/house.svg").read_text()
    drawn = set(re.findall(r'<line id="(\S+)" class="down"', picture))
    assert drawn == {"-".join(pair) for pair in layering.arrows(house)}


def test_every_law_is_shown_a_breach():
    assert {law for law, _, _ in BREACHES.values()} == set(LAWS)

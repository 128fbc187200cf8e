"""The shape of the code: each layer imports only what stands below it, and every file stays readable.

This is what keeps the model free of meshes, the decode processes free of torch, and every optional package optional.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "sora_train"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(REPO / "data_prep").rglob("*.py")])

ANYONE = {"atomic", "errors", "keys"}
"""Importable by every layer; of ours they import each other at most."""

MAY_IMPORT: dict[str, set[str]] = {
    "atomic": {"errors"},
    "errors": set(),
    "keys": set(),
    "config": set(),
    "diffusion": set(),
    "shapes": set(),
    "distributed": set(),
    "contact_sheet": set(),
    "flat_shard": set(),
    "progress": set(),
    "metrics": {"config", "distributed"},
    "models": {"config"},
    "data": {"config", "shapes"},
    "parallel": {"config", "distributed", "flat_shard", "models"},
    "optim": {"config", "distributed"},
    "ema": {"config", "distributed", "parallel", "ema_profiles"},
    "ema_profiles": set(),
    "ema_snapshots": {"checkpoint", "config", "ema", "parallel"},
    "checkpoint": {"config", "distributed", "flat_shard"},
    "stored_tensors": {"checkpoint", "ema"},
    "loss_health": {"config"},
    "out_of_memory": {"config", "data", "distributed"},
    "tracking": {"config"},
    "tracking_feed": {
        "goodput",
        "run_events",
        "tracking",
        "tracking_tensorboard",
        "tracking_wandb",
    },
    "tracking_tensorboard": set(),
    "tracking_wandb": {"tracking"},
    "notices": set(),
    "watchdog": set(),
    "device_peaks": set(),
    "gauges": {"gauges_nvml"},
    "gauges_nvml": set(),
    "code_digest": set(),
    "goodput": {"code_digest"},
    "health": {"config", "distributed", "gauges", "notices", "watchdog"},
    "report_charts": set(),
    "run_events": {"goodput"},
    "metrics_reference": {"metrics"},
    "model_sizes": {"config", "models"},
    "quality": set(),
    "run_folder": {"config", "distributed"},
    "frozen": {"config"},
    "stored_weights": set(),
    "specification": {"config", "diffusion", "models"},
    "sampling": {"config", "diffusion", "models"},
    "operations": {"config", "data", "diffusion", "models", "sampling"},
    "posterior": {"config", "diffusion", "models"},
    "adversary": {"config", "models", "optim"},
    "objectives": {"adversary", "config", "diffusion", "models", "data", "posterior"},
    "validate": {
        "config",
        "distributed",
        "diffusion",
        "models",
        "data",
        "objectives",
        "quality",
    },  # fmt: skip
}
"""The lower layers, each with all it may import."""

BELOW_THE_TRAINER = {
    "accounts",
    "card",
    "checkpointing",
    "data_encode",
    "data_report",
    "data_report_plan",
    "data_trace",
    "data_verify",
    "debug_mode",
    "encoding",
    "evaluate",
    "finish",
    "initialise",
    "probe",
    "replay",
    "report",
    "report_runtime",
    "resume",
    "rollback",
    "sample_folder",
    "self_test",
    "shared_batches",
    "spikes",
    "step_numbers",
    "training_data",
    "training_plan",
    "training_sources",
    "vae_export",
    "warm_up",
}
"""Parts of the trainer in files of their own: they may import each other and all lower layers."""

TOP = {
    "__init__": {"api", "config", "trainer"},
    "__main__": {"cli"},
    "api": None,
    "averaging": None,
    "bench": None,
    "bench_command": None,
    "checkpoint_diff": None,
    "checkpoint_tools": None,
    "ckpt_command": None,
    "cli": None,
    "commands": None,
    "config_command": None,
    "data_command": None,
    "doctor": None,
    "doctor_command": None,
    "fetch_command": None,
    "launch": None,
    "launch_command": None,
    "plan_command": None,
    "planning": None,
    "project": None,
    "replay_command": None,
    "sample_command": None,
    "stages": None,
    "sweep": None,
    "sweep_command": None,
    "train": None,
    "watch": None,
    "watch_command": None,
    "watch_view": None,
    "weights_in": None,
    "weights_out": None,
}
"""The outermost layer; None: may import everything."""

TORCH_ONLY = {"torch", "einops", "numpy"}
OPTIONAL = {
    "deepspeed",
    "flash_attn",
    "flash_attn_interface",
    "decord",
    "wandb",
    "pynvml",
    "tensorboard",
    "ray",
    "torchcodec",
    "matplotlib",
    "fastapi",
    "c2pa",
}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60


def layer_of(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        return path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "data_prep"


def allowed(layer: str) -> set[str] | None:
    if layer in MAY_IMPORT:
        return MAY_IMPORT[layer] | (ANYONE - {layer} if layer not in ANYONE else set())
    below = set(MAY_IMPORT) | BELOW_THE_TRAINER
    if layer in BELOW_THE_TRAINER:
        return below
    if layer == "trainer":
        return below
    if layer == "data_prep":
        return {"data", "models", "config", "progress"} | ANYONE
    assert layer in TOP, (
        f"give the new module sora_train/{layer} its place in {Path(__file__).name}"
    )
    return TOP[layer]


@cache
def imported(path: Path) -> tuple[tuple[str, ...], ...]:
    return tuple(imports(parsed(path)))


def imports(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Dotted names of all imports, those for type checkers alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (tuple(f"{node.module}.{alias.name}".split(".")) for alias in node.names)
        else:
            yield from imports(node)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return str(path.relative_to(REPO))


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_import_goes_upwards(path: Path):
    layer = layer_of(path)
    may = allowed(layer)
    used = {name[1] for name in imported(path) if name[0] == "sora_train" and len(name) > 1}
    upwards = set() if may is None else used - may - {layer} - {"__version__"}
    assert not upwards, f"{named(path)} is in layer '{layer}' and may not import {sorted(upwards)}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "diffusion").glob("*.py")), ids=named)
def test_diffusion_knows_torch_only(path: Path):
    outside = {name[0] for name in imported(path)} - sys.stdlib_module_names
    assert outside <= TORCH_ONLY | {"sora_train"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "shapes").glob("*.py")), ids=named)
def test_shapes_know_numpy_only(path: Path):
    outside = {name[0] for name in imported(path)} - sys.stdlib_module_names
    assert outside <= {"numpy", "sora_train"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=named)
def test_models_do_not_know_they_are_distributed(path: Path):
    assert not [name for name in imported(path) if name[:2] == ("torch", "distributed")]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_nothing_imports_data_prep_but_the_command(path: Path):
    if layer_of(path) not in ("data_prep", "commands"):
        assert not [name for name in imported(path) if name[0] == "data_prep"]


def test_an_optional_package_is_imported_in_one_file_and_lazily():
    users: dict[str, list[str]] = {}
    for path in SOURCES:
        tree = parsed(path)
        for name in imported(path):
            if name[0] in OPTIONAL:
                users.setdefault(name[0], []).append(named(path))
        eager = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [name for name in imports(ast.Module(eager, [])) if name[0] in OPTIONAL], named(
            path
        )
    assert not {package: files for package, files in users.items() if len(set(files)) > 1}


@pytest.mark.parametrize(
    "module",
    [
        "sora_train",
        "sora_train.errors",
        "sora_train.cli",
        "sora_train.config",
        "sora_train.config.compose",
        "sora_train.data",
        *(f"sora_train.data.{path.stem}" for path in sorted((PACKAGE / "data").glob("decode*.py"))),
        *(
            f"sora_train.shapes.{path.stem}"
            for path in sorted((PACKAGE / "shapes").glob("[a-z]*.py"))
        ),
    ],
)
def test_imports_without_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_files_and_functions_are_short(path: Path):
    assert path.stem not in ("utils", "helpers", "misc"), "give it the name of what it holds"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{named(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_module_says_what_it_holds(path: Path):
    assert not path.read_text(encoding="utf-8").strip() or ast.get_docstring(parsed(path))


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_exception_is_swallowed_bare(path: Path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{named(path)} line {node.lineno}: name the exception"
            body = [item for item in node.body if not isinstance(item, ast.Pass)]
            broad = isinstance(node.type, ast.Name) and node.type.id in (
                "Exception",
                "BaseException",
            )
            assert body or not broad, f"{named(path)} line {node.lineno} swallows everything"

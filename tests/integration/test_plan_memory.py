"""The memory plan against runs of the Trainer: within 5 %."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plan_memory.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_memory", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_memory"] = module
    spec.loader.exec_module(module)
    return module


def within(rows: list, allowed: float = 0.05) -> None:
    off = {
        f"{cell.layout}, {cell.checkpointing}": int(plan["peak"]) / peak - 1
        for cell, plan, peak in rows
    }
    assert off
    assert all(abs(error) <= allowed for error in off.values()), off


@pytest.mark.slow
def test_two_ranks_hold_what_was_planned(tmp_path: Path) -> None:
    bench = script()
    wanted = {("fsdp x2", "none"), ("zero2 x2", "full")}
    group = [cell for cell in bench.cells() if (cell.layout, cell.checkpointing) in wanted]
    assert len(group) == 2
    within(bench.compared(group, tmp_path))


@pytest.mark.slow
def test_every_layout_holds_what_was_planned(tmp_path: Path) -> None:
    bench = script()
    within(bench.compared(bench.cells(), tmp_path))

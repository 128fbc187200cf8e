"""What becomes of an input: every test of this folder adds a row to the table printed at the end."""

import os
from pathlib import Path

import pytest

_ROW = "case_row"
_HEADER = ("input", "after", "read", "told")


@pytest.fixture(scope="session")
def cases() -> Path:
    """The folder of small inputs after public bug reports (SORA_TEST_CASES)."""
    folder = os.environ.get("SORA_TEST_CASES")
    if not folder:
        pytest.skip("SORA_TEST_CASES names no folder of inputs after bug reports")
    if not Path(folder).is_dir():
        pytest.fail(f"SORA_TEST_CASES={folder} is no folder")
    return Path(folder)


@pytest.fixture
def row(record_property):
    """Adds a line to the table: ``row(input, after which report, what is read, what is told)``."""

    def add(given: str, after: str, read: str, told: str) -> None:
        record_property(_ROW, [given, after, read, told])

    return add


def pytest_terminal_summary(terminalreporter) -> None:
    rows = {
        tuple(str(cell) for cell in value)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == _ROW
    }
    if not rows:
        return
    terminalreporter.section("what becomes of each input")
    widths = [max(len(cells[i]) for cells in [_HEADER, *rows]) for i in range(3)]
    for cells in [_HEADER, *sorted(rows)]:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)]
        terminalreporter.write_line("  ".join([*padded, cells[3]]))

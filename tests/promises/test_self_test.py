"""Promise 1, in seconds and for every layout of two and four ranks: a step of a tiny model is that of one process.

It is the self-test that every run begins with; test_parity_matrix compares whole runs.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from self_test_worker import CHOSEN

WORKER = Path(__file__).with_name("self_test_worker.py")


@pytest.mark.timeout(300)
def test_every_layout_is_one_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    said = "\n".join(file.read_text()[-1500:] for file in sorted(tmp_path.glob("log-*")))
    assert done.returncode == 0, done.stderr[-1500:] + said
    found: dict[str, float | str] = {}
    for size in CHOSEN:
        found |= json.loads((tmp_path / f"found-{size}.json").read_text())
    assert {
        "ddp x2",
        "fsdp x2",
        "ulysses 2",
        "ring 2",
        "hsdp 2x2",
        "ulysses 2 x ring 2",
    } <= found.keys()
    wrong = {name: said for name, said in found.items() if not isinstance(said, float)}
    assert not wrong
    # Masters are float32.
    assert all(value < 5e-7 for value in found.values() if isinstance(value, float)), found

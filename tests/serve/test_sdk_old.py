"""The calls of test_sdk.py with the last release of the client's second generation, which pip brings for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "2.54.0"


@pytest.mark.slow
def test_the_client_of_the_second_generation(tmp_path: Path):
    target = tmp_path / "client"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, f"openai=={VERSION}"], check=True)
    told = "import openai; print(openai.__version__)"
    paths = os.pathsep.join([str(target), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": paths}
    shown = ran([sys.executable, "-c", told], env)
    assert shown.stdout.strip() == VERSION, shown.stderr
    tests = Path(__file__).parent / "test_sdk.py"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(tests)]
    done = ran(command, env)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


def ran(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

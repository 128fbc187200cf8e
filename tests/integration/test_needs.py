"""What is declared is all that is needed: with nothing else importable the command trains, and every need is pinned."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[2]

HIDDEN = """
import sys
from importlib.machinery import PathFinder

class Declared(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

hidden = set(sys.argv.pop(1).split(","))
already = sorted(hidden & {name.partition(".")[0] for name in sys.modules})
assert not already, already
sys.meta_path[sys.meta_path.index(PathFinder)] = Declared
sys.argv[0] = "sora"
from sora_train.cli import main
main()
"""


def needs() -> dict[str, list[Requirement]]:
    """Distribution -> who asks for it and how, from pyproject's required dependencies down, as installed here."""
    declared = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    found: dict[str, list[Requirement]] = {}
    waiting = [Requirement(text) for text in declared]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        known = found.setdefault(name, [])
        if str(requirement) in map(str, known):
            continue
        known.append(requirement)
        extras = requirement.extras or {""}
        for need in map(Requirement, requires(name) or ()):
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(need)
    return found


@pytest.fixture(scope="module")
def needed() -> dict[str, list[Requirement]]:
    return needs()


def test_the_command_trains_with_nothing_but_what_is_declared(needed: dict, tmp_path: Path):
    """Fails where code imports a package that only an extra, the tools for tests or another project brought here."""
    hidden = sorted(
        top
        for top, owners in packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & {*needed, "sora-train"}
    )
    assert {"pytest", "hypothesis"} <= set(hidden), "the tools for tests are installed beside it"
    run = tmp_path / "run"
    command = ["train", "experiment=parity_tiny", f"run.dir={run}", "train.steps=1"]
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, ",".join(hidden), *command],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "summary.json").exists()


def test_every_need_is_pinned_to_a_version_that_all_who_ask_for_it_take(needed: dict):
    """pydantic takes one version of pydantic-core: an offline list with another fails on every command."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (REPO / "constraints.txt").read_text(), re.M))
    pinned = {canonicalize_name(name): text for name, text in pins.items()}
    assert "pydantic-core" in needed
    # Wheels of torch for CUDA bring theirs.
    ours = {name for name in needed if not re.match(r"nvidia-|cuda-|triton", name)}
    assert sorted(ours - set(pinned)) == []
    for name in sorted(ours):
        for requirement in needed[name]:
            assert requirement.specifier.contains(pinned[name], prereleases=True), (
                f"constraints.txt has {name}=={pinned[name]}, and {requirement} is asked for"
            )
        assert version(name).partition("+")[0] == pinned[name], f"{name} as installed"

"""Small breaks of the package, one at a time in a copy of the tree, and whether the tests nearest to each see it.

    make mutants                                # all of them
    python tests/mutants/mutate.py --only draws --list
    python tests/mutants/mutate.py --only draws,data --out docs/parity.md

`areas/*.yaml` is the table. A break replaces a piece of text that stands exactly once in its file; a piece that no
longer does is an error, as is a test that fails without the break too. The exit status is 1 below 95 %.
"""

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).resolve().parents[2]
AREAS = Path(__file__).with_name("areas")
LEAST = 0.95
SECONDS = 300
"""A run of tests that takes longer hangs, which is a way to see a break."""
HEADING = "## Small breaks"
FAILED, PASSED, NOT_THE_COPY = 1, 0, 99
"""Of pytest's exit statuses; all others say that no test was judged."""
HEAVY = [
    "av", "diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.models.transformers.transformer_wan",
    "hydra", "hypothesis", "pyarrow", "pydantic", "pytest", "rich", "scipy", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.testing", "transformers.models.umt5",
]  # fmt: skip
"""Imported once, before the first break: nothing of them is broken."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(HEAVY)


@dataclass(frozen=True)
class Break:
    area: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""
    """Why no test can or need see it; empty: it has to be seen."""

    def broken(self, text: str) -> str:
        """The file's text with the break. Raises ValueError unless what it replaces stands there once."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.area}: {self.name}: {text.count(self.old)} places in {self.file} read {self.old!r}; one is "
                "needed, so bring the table up to date"
            )
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Result:
    made: Break
    killed: bool
    seconds: float
    by: str
    """The first test that failed, or how else it was seen."""


def read_table(areas: Sequence[str]) -> list[Break]:
    """The breaks of these areas."""
    found = []
    for area in areas:
        table = yaml.safe_load((AREAS / f"{area}.yaml").read_text())
        for entry in table["breaks"]:
            tests = tuple(table["tests"][name] for name in entry.pop("by").split())
            found.append(Break(area=area, tests=tests, **entry))
    return found


def require_current(breaks: Sequence[Break]) -> None:
    """Raises ValueError with every break that its file no longer has a place for."""
    stale = []
    for one in breaks:
        try:
            one.broken((ROOT / one.file).read_text())
        except (OSError, ValueError) as error:
            stale.append(str(error))
    if stale:
        raise ValueError("\n".join(stale))


# --- one copy of the tree ---


def copy_tree(folder: Path) -> Path:
    """The files that git knows or would know, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def write(file: Path, text: str) -> None:
    """Write a source file; its compiled form goes by the second and the size, which may be as before."""
    file.write_text(text)
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


def run_tests(folder: Path, tests: Sequence[str], seconds: float = SECONDS) -> tuple[int, str]:
    """Pytest's exit status and its output, of tests of a copy, in a process that has the heavy packages already."""
    said = folder / ".said"
    process = FORKS.Process(target=test_in, args=(folder, said, list(tests)))
    process.start()
    assert process.pid is not None
    process.join(seconds)
    status = process.exitcode
    if status is None:
        # With what it has started: all of its session.
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return FAILED, f"FAILED it hangs: no end within {seconds:g} s"
    return status, said.read_text(errors="replace")


def test_in(folder: Path, said: Path, tests: list[str]) -> None:
    """The work of such a process; it ends with pytest's exit status."""
    os.setsid()
    os.chdir(folder)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    sys.path[:] = [str(folder), *(place for place in sys.path if Path(place).resolve() != ROOT)]
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder / '.tests'}"]
    status = int(pytest.main([*options, *tests]))
    tested = Path(sys.modules["sora_train"].__file__ or "")
    sys.stdout.flush()
    os._exit(status if folder.resolve() in tested.resolve().parents else NOT_THE_COPY)


def judge(folder: Path, one: Break, known: dict[str, int]) -> Result:
    """Break the copy, run the nearest tests, mend it, and see that what failed passes in the mended one.

    Args:
        known: tests that were run without a break so far, and how they ended.

    Raises:
        RuntimeError: no test could be judged, or the one that failed fails without a break too.
    """
    began, file = time.monotonic(), folder / one.file
    whole = file.read_text()
    write(file, one.broken(whole))
    try:
        status, said = run_tests(folder, one.tests)
    finally:
        write(file, whole)
    if status not in (FAILED, PASSED):
        raise RuntimeError(f"{one.area}: {one.name}: no test was judged\n{said[-3000:]}")
    lines = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR "))]
    by = lines[-1].partition(" ")[2].split(" - ")[0] if lines else ""
    if by.count("[") > by.count("]"):
        by = by.partition("[")[0]  # a parameter with a dash in it
    if status == FAILED:
        again = [by] if "::" in by else list(one.tests)
        if str(again) not in known:
            known[str(again)] = run_tests(folder, again)[0]
        if known[str(again)] != PASSED:
            raise RuntimeError(f"{one.area}: {one.name}: {by} does not pass without a break either")
    return Result(one, status == FAILED, time.monotonic() - began, by)


# --- all of them ---


def judge_all(breaks: Sequence[Break], jobs: int) -> list[Result]:
    """Every break in one of `jobs` copies. Raises RuntimeError as `judge` does."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copies.put(copy_tree(Path(scratch) / str(number)))
        known: dict[str, int] = {}
        done = 0

        def in_a_copy(one: Break) -> Result:
            nonlocal done
            folder = copies.get()
            try:
                result = judge(folder, one, known)
            finally:
                copies.put(folder)
            done += 1
            verdict = "killed" if result.killed else "SURVIVED"
            print(
                f"[{done}/{len(breaks)}] {result.seconds:5.1f} s {verdict:8} {one.area}: {one.name}"
                + (f"  ({result.by})" if result.by else ""),
                flush=True,
            )
            return result

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(in_a_copy, breaks))


def counts(results: Sequence[Result]) -> dict[str, tuple[int, int]]:
    """(killed, all) by area."""
    areas = dict.fromkeys(one.made.area for one in results)
    return {
        area: (
            sum(one.killed for one in results if one.made.area == area),
            sum(one.made.area == area for one in results),
        )
        for area in areas
    }


def section(results: Sequence[Result]) -> str:
    """What docs/parity.md says of them."""
    rows = counts(results)
    killed, total = sum(one.killed for one in results), len(results)
    survivors = [one.made for one in results if not one.killed]
    lines = [
        HEADING,
        "",
        "`make mutants` makes one small break at a time in a copy of the tree, such as a stream of another",
        "name, a factor that is missing, a step that is late or a key that a checkpoint lacks, and runs the",
        "tests nearest to it. A break that no test sees is one that a person could make unseen. The table of",
        "breaks is [tests/mutants/areas](../tests/mutants/areas); a change of the code that a break stands in",
        "changes its line there, or the tool ends with an error. `python tests/mutants/mutate.py --list` lists",
        "them, `--only draws,data` takes some areas, `--named WORDS` some breaks.",
        "",
        f"At least {LEAST:.0%} have to be seen; the last run saw {killed} of {total}.",
        "",
        "| area | seen | of |",
        "|---|---|---|",
        *(f"| {area} | {seen} | {count} |" for area, (seen, count) in rows.items()),
        "",
        *(["No break survives."] if not survivors else ["Those that survive:", ""]),
        *(f"- {one.area}, {one.name}: {one.survives or 'no reason yet'}" for one in survivors),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    known = [file.stem for file in sorted(AREAS.glob("*.yaml"))]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(known), help="areas, with commas between")
    parser.add_argument("--named", default="", help="only breaks whose name contains this")
    parser.add_argument("--list", action="store_true", help="list the breaks and leave")
    parser.add_argument("--jobs", type=int, default=2, help="copies that are tested side by side")
    parser.add_argument("--out", type=Path, help="a page whose section on breaks is written anew")
    options = parser.parse_args()
    breaks = [one for one in read_table(options.only.split(",")) if options.named in one.name]
    if options.list:
        for one in breaks:
            print(f"{one.area:10} {one.file}: {one.name}{' (survives)' if one.survives else ''}")
        return 0
    require_current(breaks)
    results = judge_all(breaks, options.jobs)
    for area, (killed, count) in counts(results).items():
        print(f"{area:10} {killed:3} of {count}")
    killed = sum(one.killed for one in results)
    print(f"{'all':10} {killed:3} of {len(results)}, {killed / len(results):.1%}")
    for one in results:
        if not one.killed:
            print(
                f"survives: {one.made.area}: {one.made.name}: {one.made.survives or 'NO REASON GIVEN'}"
            )
    if options.out:
        before = options.out.read_text().partition(HEADING)[0].rstrip()
        options.out.write_text(f"{before}\n\n{section(results)}")
    return 0 if killed >= LEAST * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())

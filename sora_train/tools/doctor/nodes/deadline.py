"""Checks that cannot hang: each has a deadline, and is abandoned when it is over.

What may block in the kernel (a dead file server, a sick GPU) is asked in a process of its own, which is killed and
not waited for: a process with such a thread would not even end. That process runs this file, without torch:

    python -m sora_train.tools.doctor.nodes.deadline MODULE:FUNCTION ARGUMENT-AS-JSON
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sora_train.errors import Fault, sentence
from sora_train.tools.doctor.findings import FAIL, WARN, Finding

Done = TypeVar("Done")


class LateError(Exception):
    """A check gave no answer in time."""


def within(seconds: float, work: Callable[[], Done]) -> Done:
    """The result of `work()`. Raises LateError after `seconds`; its thread is then left behind."""
    results: list[Done] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not results:
        raise LateError
    return results[0]


def apart(probe: str, argument: object, seconds: float) -> Any:
    """`probe`, `module:function`, called with `argument` in a process of its own; both ways as JSON.

    Raises:
        LateError: it did not answer in time; it is killed and left behind.
        Fault: it failed.
    """
    package = str(Path(__file__).resolve().parents[4])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Not a `with`, which would wait for a process that cannot be killed.
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sora_train.tools.doctor.nodes.deadline",
            probe,
            json.dumps(argument),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        raise LateError from None
    if child.returncode:
        lines = err.strip().splitlines() or ["it printed nothing"]
        raise Fault(f"{probe} failed: {lines[-1]}")
    return json.loads(out)


def checked(
    name: str, seconds: float, check: Callable[[], list[Finding]], late: str
) -> list[Finding]:
    """What a check finds. One that fails or is late is a finding too; `late` is what to do then."""
    try:
        return within(seconds, check)
    except LateError:
        return [Finding(name, f"no answer within {seconds:g} s", FAIL, late)]
    except Exception as error:
        remedy = "this was not looked at; look at it by hand"
        return [Finding(name, sentence(error), WARN, remedy)]


def all_checked(checks: list[tuple[str, float, Callable[[], list[Finding]], str]]) -> list[Finding]:
    """Run all checks at once, findings in their order: together they take as long as the longest."""
    results: list[list[Finding]] = [[] for _ in checks]

    def run(number: int) -> None:
        results[number] = checked(*checks[number])

    threads = [
        threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(checks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [finding for part in results for finding in part]


def main() -> None:
    """Call a function in this process and print what it returns as JSON."""
    module, _, function = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), function)(json.loads(sys.argv[2]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

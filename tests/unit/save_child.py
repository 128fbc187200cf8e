"""Run as a process of its own by test_checkpoint: saves in forks of itself, which has no threads to lose in a fork.

Arguments: a mode, a step, the bytes that a file may have (0: any), then one folder a fork; a folder that is
named after a point of the save is one to be killed at. Prints the forks' exit codes, negative for signals.
"""

import json
import os
import resource
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where pytest finds the helpers of tests

from test_checkpoint import a_saver, tensors_of

from sora_train.checkpoint.points import POINTS, VARIABLE
from sora_train.errors import Fault


def save(folder: Path, mode: str, step: int, limit: int) -> None:
    if folder.name in POINTS:
        os.environ[VARIABLE] = f"kill:{folder.name}"
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    saver = a_saver(folder, mode=mode)
    try:
        saver.save(step, tensors_of(2.0, size=limit or 1000), {"step": step})
        saver.wait()
    except Fault as error:
        (folder / "said").write_text(str(error))


def main() -> None:
    mode, step, limit, *folders = sys.argv[1:]
    codes = []
    for folder in folders:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                save(Path(folder), mode, int(step), int(limit))
                code = 0
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()

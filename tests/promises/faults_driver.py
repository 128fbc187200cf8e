"""Run as a process of its own by test_faults: every rank of every cell is a fork of it, so that torch is imported once.

Arguments: a folder, the rendered clips of another run, then one JSON object a cell: name, world (or one
an attempt, `worlds`), overrides, and the plans of what the ranks do to themselves, one an attempt; after
them come undisturbed attempts until all ranks end with 0. What became of each is appended to
FOLDER/found.jsonl.
"""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import chaos
from sora_train.runtime import watchdog
from sora_train.tools.doctor.parity.worker import import_everything

MOST_ATTEMPTS = 8


def main() -> None:
    # A rank that no Python can run in has to be ended by the timer within the test's time.
    watchdog.LAST_RESORT_SECONDS, watchdog.REARM_SECONDS = 6.0, 1.0
    import_everything()
    folder, data, *cells = sys.argv[1:]
    for text in cells:
        cell = json.loads(text)
        run_dir = Path(folder) / cell["name"]
        shutil.copytree(data, run_dir / "data")
        overrides = [*chaos.SMALL_RUN, *cell["overrides"], f"run.dir={run_dir}"]
        plans = [chaos.Plan(**plan) for plan in cell["plans"]]
        for number in range(MOST_ATTEMPTS):
            plan = plans[number] if number < len(plans) else None
            environ = cell.get("environ", [])[number : number + 1] or [{}]
            worlds = cell.get("worlds", [])
            world = worlds[number] if number < len(worlds) else cell["world"]
            found = chaos.attempt(
                world, overrides, Path(folder) / f"{cell['name']}-{number}.log", plan,
                hung_seconds=240.0, environ=environ[0], others_seconds=cell.get("others_seconds", 60.0),
            )  # fmt: skip
            report = run_dir / "health" / "hang.txt"
            row = {"cell": cell["name"], "newest": chaos.newest(run_dir), **asdict(found)}
            row["report"] = report.read_text() if report.exists() else ""
            with (Path(folder) / "found.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if not any(found.codes) or (not cell.get("restart", True) and number + 1 >= len(plans)):
                break


if __name__ == "__main__":
    main()

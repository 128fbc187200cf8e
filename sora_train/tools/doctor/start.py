"""`sora doctor`: from the command line to an examination, and its report printed and written."""

import socket
import sys

from rich.console import Console

from sora_train.errors import EXIT_FAULT, SoraError, UserError, sentence
from sora_train.tools.doctor.findings import FAIL
from sora_train.tools.doctor.nodes.bandwidth import Measuring
from sora_train.tools.doctor.nodes.examination import (
    Examination,
    Patience,
    ended_after,
    examine_alone,
)
from sora_train.tools.doctor.nodes.node import PlannedRun, RankPlace
from sora_train.tools.doctor.table import show
from sora_train.tools.terminal import write_json

LEAST = 20.0
GRACE = 9.0
"""Seconds after its time is over until the process ends itself; by then all deadlines inside have passed."""


def start(
    arguments: list[str], json_file: str, name: str, seconds: float, *, bandwidth: bool
) -> int:
    """Examine, print, and return the exit code.

    Raises:
        UserError: the run is described wrongly (on one machine; among several that is a finding of its node), or
            `seconds` are too few.
        Fault: the job's store or rank 0 does not answer.
    """
    if seconds < LEAST:
        raise UserError(
            f"--seconds {seconds:g} is too short to wait for other nodes; give {LEAST:g} or more"
        )
    place = RankPlace.read(name or socket.gethostname())

    def too_late() -> None:
        print(f"error: {place.name}: the examination hung for {seconds:g} s", file=sys.stderr)

    # Its import may take long, and is no finding; the time begins after it.
    import torch

    torch.set_num_threads(1)
    with ended_after(seconds + GRACE, too_late):
        if place.size == 1:
            report = examine_alone(planned_run(arguments, alone=True), place)
            code = EXIT_FAULT if report.verdict is FAIL else 0
        else:
            # Before anything starts a thread or talks to a GPU.
            measuring = Measuring() if bandwidth else None
            run = planned_run(arguments, alone=False)
            own_report, code = Examination(place, run, Patience(seconds), measuring).take()
            if own_report is None:
                return code
            report = own_report
    if json_file != "-":
        show(report, Console())
    write_json(report.to_dict(), json_file)
    return code


def planned_run(arguments: list[str], *, alone: bool) -> PlannedRun:
    """The run that the arguments describe, none where there is no argument."""
    from sora_train.config.job import compose_job

    if not arguments:
        return PlannedRun()
    try:
        return PlannedRun(compose_job(arguments).config)
    except SoraError as error:
        if alone:
            raise
        return PlannedRun(error=sentence(error))

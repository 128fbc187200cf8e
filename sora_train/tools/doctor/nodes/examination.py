"""`sora doctor`: every node examines itself, then nodes try each other; rank 0 reports.

Ranks talk through the job's store (board.py) and wait for each other with deadlines only, so a node that is dead,
frozen or behind a firewall is named by the others. On one machine without a launcher there is nobody to ask.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sora_train.errors import EXIT_FAULT, Fault
from sora_train.tools.doctor.checks import clock, network, storage, versions
from sora_train.tools.doctor.findings import FAIL, Finding, info
from sora_train.tools.doctor.nodes import bandwidth, peers
from sora_train.tools.doctor.nodes.bandwidth import Measuring
from sora_train.tools.doctor.nodes.board import Board
from sora_train.tools.doctor.nodes.deadline import LateError, apart, checked
from sora_train.tools.doctor.nodes.node import PlannedRun, RankPlace, examine
from sora_train.tools.doctor.table import NodeReport, Report

SECONDS = 110.0
"""Of the whole, at most."""
RENAMED = 40
"""How often node 0 replaces its file while the others read it."""
STORAGE = "sora_train.tools.doctor.checks.storage"


class Patience:
    """Seconds that each part may take; together they are the whole."""

    def __init__(self, whole: float = SECONDS):
        self.whole = whole
        self.meeting = self.bandwidth = 0.22 * whole
        self.peers, self.folder = 0.08 * whole, 0.06 * whole
        # For those that have not finished when rank 0 is done.
        self.report = 0.1 * whole


def examine_alone(run: PlannedRun, place: RankPlace) -> Report:
    """Examine this machine alone."""
    began = time.monotonic()
    findings, _ = examine(place, run)
    return Report([NodeReport(place.name, findings)], [], time.monotonic() - began)


@dataclass
class Examination:
    """One rank's part of an examination of all nodes."""

    place: RankPlace
    run: PlannedRun
    patience: Patience
    measuring: Measuring | None
    """None: bandwidth is not measured."""
    board: Board = field(init=False)
    names: dict[int, str] = field(init=False)
    """Of the nodes whose first rank is there."""
    began: float = field(default_factory=time.monotonic)

    def take(self) -> tuple[Report | None, int]:
        """The report on rank 0, and the exit code on every rank.

        Raises:
            Fault: the store of the job or rank 0 does not answer.
        """
        try:
            self.board = Board(self.patience.meeting)
            self._meet()
            if self.place.examines:
                self._examine_node()
            self._measure()
            if self.place.rank:
                return None, self._await_verdict()
            report = self._gather()
            code = EXIT_FAULT if report.verdict is FAIL else 0
            self.board.post("verdict", code)
            # The store may live in this process: the others read the verdict there.
            self.board.read([f"left/{rank}" for rank in self.here if self._reported(rank)], 3)
            return report, code
        finally:
            if self.measuring is not None:
                self.measuring.end()

    # -- who is there -------------------------------------------------------------------------

    def _meet(self) -> None:
        place, host = self.place, socket.gethostname()
        self.echo_server = peers.EchoServer(self._token()) if place.examines else None
        greeting: dict[str, Any] = {"name": place.name, "host": host}
        if self.echo_server is not None:
            address = network.address_towards(os.environ["MASTER_ADDR"]) or "127.0.0.1"
            greeting |= {"address": address, "port": self.echo_server.port}
        self.board.post(f"here/{place.rank}", greeting)
        keys = {f"here/{rank}": rank for rank in range(place.size)}
        greetings = self.board.read(
            keys, self.patience.meeting - (time.monotonic() - self.began) + 5
        )
        self.here: dict[int, dict[str, Any]] = {
            keys[key]: value for key, value in greetings.items()
        }
        self.names = unique_names(
            {
                rank // place.ranks: value["name"]
                for rank, value in sorted(self.here.items())
                if rank % place.ranks == 0
            }
        )
        self.silent = [rank for rank in range(place.size) if rank not in self.here]

    def _token(self) -> bytes:
        """The token of this examination, the same on all nodes: rank 0 makes it."""
        if self.place.rank == 0:
            self.board.post("token", secrets.token_hex(16))
        values = self.board.read(["token"], self.patience.meeting)
        if not values:
            raise Fault(
                "rank 0 of this examination does not answer; look at its node, and at its log"
            )
        self.token = str(values["token"])
        return self.token.encode()

    # -- one node's part ----------------------------------------------------------------------

    def _examine_node(self) -> None:
        findings, held = examine(self.place, self.run)
        remedy = "look at this by hand: ping, nc, ls in run.dir"
        for name, seconds, check in (
            ("other nodes", 3 * self.patience.peers, self._peers),
            ("shared folder", 5 * self.patience.folder, self._shared),
        ):
            findings += checked(name, seconds, check, remedy)
        report = {"findings": [finding.to_dict() for finding in findings], "versions": held}
        self.board.post(f"report/{self.place.node}", report)

    def _peers(self) -> list[Finding]:
        place = self.place
        others = {
            node: (greeting["address"], greeting["port"])
            for node in peers.partners(place.node, place.nodes)
            if (greeting := self.here.get(node * place.ranks)) is not None
        }
        reached = peers.reach_all(others, self.token.encode(), self.patience.peers)
        findings = peers.judge(reached, self.names)
        if first := next((one for one in reached if one.node == 0 and not one.why), None):
            # What is known is node 0's clock minus ours.
            mine = clock.Offset(-first.offset.seconds, first.offset.error)
            findings.append(clock.judge(mine))
        return findings

    def _shared(self) -> list[Finding]:
        """Node 0 writes a file and replaces it again and again; the others watch."""
        if len(self.names) < 2:
            return []
        name = "run.dir, shared" if self.run.cfg else "working folder, shared"
        return self._write(name) if self.place.node == 0 else self._watch(name)

    def _write(self, name: str) -> list[Finding]:
        above = next(path for path in (self.run.folder, *self.run.folder.parents) if path.is_dir())
        path = str(above / f".sora-doctor-{self.token[:12]}" / "token")
        seconds, others = self.patience.folder, [node for node in self.names if node]
        self.board.post("file/place", path)
        try:
            # A reader that has looked before may keep in mind that there is nothing.
            looked = self.board.read([f"file/looked/{node}" for node in others], seconds)
            apart(f"{STORAGE}:write_versions", {"path": path, "first": 0, "versions": 0}, seconds)
            self.board.post("file/first", True)
            argument = {"path": path, "first": 1, "versions": RENAMED, "pause": 0.02}
            apart(f"{STORAGE}:write_versions", argument, seconds + 5)
            self.board.post("file/last", True)
            self.board.read([key.replace("looked", "done") for key in looked], 2 * seconds)
        except LateError:
            remedy = "the file system of run.dir does not answer: df and ls by hand"
            return [Finding(name, f"no answer within {seconds:g} s", FAIL, remedy)]
        finally:
            with_patience = partial(apart, f"{STORAGE}:remove", {"path": path}, seconds)
            checked(name, seconds, lambda: [info(name, str(with_patience()))], "remove it by hand")
        return [info(name, f"written for {len(others)} other node(s) to see")]

    def _watch(self, name: str) -> list[Finding]:
        seconds = self.patience.folder
        place = self.board.read(["file/place"], seconds)
        if not place:
            return [info(name, "node 0 wrote nothing")]
        read: Callable[..., Any] = partial(self._await_version, place["file/place"], seconds)
        read(0, 0.0)
        self.board.post(f"file/looked/{self.place.node}", True)
        self.board.read(["file/first"], 2 * seconds)
        first = read(0, seconds)
        # Read on while it is replaced, then until the last one is seen.
        during = read(RENAMED, 1.5)
        self.board.read(["file/last"], 2 * seconds)
        last = read(RENAMED, seconds)
        last[storage.TORN] += during[storage.TORN]
        self.board.post(f"file/done/{self.place.node}", True)
        return storage.judge_shared(name, first, last, seconds)

    def _await_version(
        self, path: str, limit: float, version: int, seconds: float
    ) -> dict[str, Any]:
        argument = {"path": path, "version": version, "seconds": seconds}
        return apart(f"{STORAGE}:await_version", argument, seconds + limit)

    def _measure(self) -> None:
        if self.measuring is None or self.silent:
            return
        device = self.run.cfg.run.device if self.run.cfg else "auto"
        measured = self.measuring.run(device, self.patience.bandwidth)
        self.board.post(f"bandwidth/{self.place.rank}", measured)

    # -- rank 0 -------------------------------------------------------------------------------

    def _gather(self) -> Report:
        nodes, between = [], self._missing()
        keys = {f"report/{node}": node for node in self.names}
        reports = self.board.read(keys, self.patience.report)
        held: dict[str, dict[str, str]] = {}
        self.reported = [self.names[keys[key]] for key in reports]
        for key, node in keys.items():
            name = self.names[node]
            if key in reports:
                findings = [Finding.from_dict(finding) for finding in reports[key]["findings"]]
                held[name] = reports[key]["versions"]
            else:
                findings = [Finding("examination", "came, and has not answered since", FAIL, GONE)]
            nodes.append(NodeReport(name, findings))
        between += versions.compare(held)
        if self.measuring is not None:
            between += self._bandwidth()
        return Report(nodes, between, time.monotonic() - self.began)

    def _reported(self, rank: int) -> bool:
        """Whether this is another rank, of a node that has reported."""
        return rank > 0 and self.names.get(rank // self.place.ranks) in self.reported

    def _missing(self) -> list[Finding]:
        ranks, place = self.silent, self.place
        nodes = sorted({rank // place.ranks for rank in ranks})
        return [
            Finding(
                f"node {node}",
                f"{self.names.get(node, 'it')} did not come within {self.patience.meeting:.0f} s: rank(s) "
                + ", ".join(str(rank) for rank in ranks if rank // place.ranks == node),
                FAIL,
                GONE,
            )
            for node in nodes
        ]

    def _bandwidth(self) -> list[Finding]:
        if self.silent:
            return [info("bandwidth", "not measured, since not all ranks came")]
        keys = {f"bandwidth/{rank}": rank for rank in range(self.place.size)}
        answers = self.board.read(keys, self.patience.report)
        measured = {keys[key]: value for key, value in answers.items()}
        names = {rank: self.names[rank // self.place.ranks] for rank in range(self.place.size)}
        return bandwidth.judge(measured, names)

    def _await_verdict(self) -> int:
        left = self.patience.whole - (time.monotonic() - self.began)
        answer = self.board.read(["verdict"], max(left, 2 * self.patience.report))
        if not answer:
            raise Fault(
                f"{self.place.name}: rank 0 gave no verdict within {self.patience.whole:g} s; its node or its way "
                "here is at fault"
            )
        self.board.post(f"left/{self.place.rank}", True)
        return int(answer["verdict"])


GONE = "look at this node and at its ranks' logs: is it up, was the job started there, does it reach MASTER_ADDR?"


def unique_names(names: dict[int, str]) -> dict[int, str]:
    """Names of nodes, with the number of the node where several have the same."""
    held = list(names.values())
    return {
        node: f"{name} (node {node})" if held.count(name) > 1 else name
        for node, name in names.items()
    }


@contextmanager
def ended_after(seconds: float, say: Callable[[], None]) -> Iterator[None]:
    """The last resort: if the body takes longer than `seconds`, the process ends, wherever it is."""

    def end() -> None:
        say()
        os._exit(EXIT_FAULT)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

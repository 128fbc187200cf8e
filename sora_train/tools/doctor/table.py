"""The report of an examination: a table for each node, what differs between them, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sora_train.tools.doctor.findings import FAIL, WARN, Finding, Verdict, count, worst

STYLES = {"info": "dim", "ok": "green", "warn": "yellow", "fail": "bold red"}
WHOLE = 4
"""Of more nodes than this only the first one's table is whole; the others' show what is wrong."""


@dataclass(frozen=True)
class NodeReport:
    name: str
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        findings = [finding.to_dict() for finding in self.findings]
        return {"node": self.name, "verdict": str(worst(self.findings)), "findings": findings}


@dataclass(frozen=True)
class Report:
    """Of all nodes; `between` is what was measured between them."""

    nodes: list[NodeReport]
    between: list[Finding]
    seconds: float

    @property
    def all(self) -> list[tuple[str, Finding]]:
        own = [(node.name, finding) for node in self.nodes for finding in node.findings]
        return [*own, *(("", finding) for finding in self.between)]

    @property
    def verdict(self) -> Verdict:
        return worst(finding for _, finding in self.all)

    def sentence(self) -> str:
        """The conclusion, in one sentence."""
        findings = [finding for _, finding in self.all]
        nodes = f"{len(self.nodes)} node(s)"
        if not self.verdict.wrong:
            return f"ok: nothing found against a run on {nodes} ({self.seconds:.0f} s)"
        failed, warned = count(findings, FAIL), count(findings, WARN)
        node, first = next(pair for pair in self.all if pair[1].verdict is self.verdict)
        where = f"{node}: " if node and len(self.nodes) > 1 else ""
        counted = f"{failed} failure(s), {warned} warning(s)" if failed else f"{warned} warning(s)"
        advice = "do not start a run" if failed else "a run can start"
        return (
            f"{self.verdict}: {advice} on {nodes}, {counted} ({self.seconds:.0f} s). "
            f"First: {where}{first.name}: {first.value}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "verdict": str(self.verdict),
            "sentence": self.sentence(),
            "seconds": round(self.seconds, 1),
            "nodes": [node.to_dict() for node in self.nodes],
            "between": [finding.to_dict() for finding in self.between],
        }


def show(report: Report, console: Console) -> None:
    for number, node in enumerate(report.nodes):
        whole = number == 0 or len(report.nodes) <= WHOLE
        shown = [finding for finding in node.findings if whole or finding.verdict.wrong]
        if shown:
            console.print(table(node.name, shown))
        else:
            console.print(f"{escape(node.name)}: nothing wrong")
    if report.between:
        console.print(table("between nodes", report.between))
    style = STYLES[report.verdict]
    console.print(
        f"[{style}]{escape(report.sentence())}[/{style}]", soft_wrap=True, highlight=False
    )


def table(title: str, findings: Sequence[Finding]) -> Table:
    """One row for each finding; a remedy stands below its value."""
    drawn = Table(title=escape(title), title_justify="left", title_style="bold", expand=False)
    drawn.add_column("", width=4)
    drawn.add_column("checked", width=23)
    drawn.add_column("result, and what to do", overflow="fold")
    for finding in findings:
        style = STYLES[finding.verdict]
        text = escape(finding.value)
        if finding.remedy:
            text += f"\n[italic]-> {escape(finding.remedy)}[/italic]"
        drawn.add_row(f"[{style}]{finding.verdict}[/{style}]", escape(finding.name), text)
    return drawn

"""Findings of an examination: one line each, with a verdict, and a remedy where something is wrong."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """From harmless to grave; `info` is a fact that is not judged."""

    INFO = "info"
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"

    @property
    def wrong(self) -> bool:
        return self in (Verdict.WARN, Verdict.FAIL)


INFO, OK, WARN, FAIL = Verdict


@dataclass(frozen=True)
class Finding:
    """`name` is what was checked, `value` its state. Whatever is wrong has a remedy."""

    name: str
    value: str
    verdict: Verdict = Verdict.OK
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.verdict.wrong and not self.remedy:
            raise ValueError(f"{self.name}: {self.value} is judged {self.verdict} without a remedy")

    def to_dict(self) -> dict[str, str]:
        return {key: str(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Finding":
        return cls(values["name"], values["value"], Verdict(values["verdict"]), values["remedy"])


def info(name: str, value: str) -> Finding:
    return Finding(name, value, INFO)


def judged(name: str, value: str, *steps: tuple[bool, Verdict, str], good: Verdict = OK) -> Finding:
    """The first step whose condition holds gives verdict and remedy; `good` where none does."""
    for holds, verdict, remedy in steps:
        if holds:
            return Finding(name, value, verdict, remedy)
    return Finding(name, value, good)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The gravest verdict among them; OK where there is none."""
    order = list(Verdict)
    return max((finding.verdict for finding in findings), key=order.index, default=OK)


def count(findings: Iterable[Finding], verdict: Verdict) -> int:
    return sum(finding.verdict is verdict for finding in findings)

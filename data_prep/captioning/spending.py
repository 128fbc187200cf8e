"""What captions have cost: a line for each answer in a file that all processes share and that outlives them.

Answers are kept beside it by a digest of their request, so that a run that was cut off does not pay twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data_prep.captioning.settings import CaptionConfig
from data_prep.stage import Later, Workspace
from sora_train.base.files import read_json, renamed_when_whole

NAME, ANSWERS = "caption_spending.jsonl", "answers"


@dataclass(frozen=True)
class Usage:
    """Tokens that were sent and answered, and their price."""

    sent: int = 0
    answered: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        return self.sent + self.answered

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.sent + other.sent, self.answered + other.answered, self.cost + other.cost)


class Spending:
    """The sum of a file of spendings. Only what was added since the last look is read."""

    def __init__(self, path: Path):
        self.path = path
        self._total, self._read = Usage(), 0
        self._lock = threading.Lock()

    def add(self, request: str, usage: Usage) -> None:
        """Append a line, which is on the disk when this returns. Raises OSError where it is full."""
        line = {"request": request, "sent": usage.sent, "answered": usage.answered}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # A line that a kill cut short must not swallow this one.
            file.write(b"\n" + json.dumps(line | {"cost": usage.cost}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def total(self) -> Usage:
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    file.seek(self._read)
                    data = file.read()
            except FileNotFoundError:
                return self._total
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.splitlines():
                self._total += _usage(line)
            return self._total

    def require_budget(self, settings: CaptionConfig) -> None:
        """Raises Later where the budget is spent."""
        if not settings.has_budget:
            return
        spent, most_tokens, most_cost = (
            self.total(),
            settings.max_tokens_total,
            settings.max_cost,
        )
        if most_tokens and spent.tokens >= most_tokens:
            told = f"{spent.tokens} tokens are spent of caption.max_tokens_total={most_tokens}"
        elif most_cost and spent.cost >= most_cost:
            told = f"{spent.cost:.6g} is spent of caption.max_cost={most_cost:g}"
        else:
            return
        raise Later("caption_budget", f"{told}; raise it and run again for the rest")


@cache
def spending_of(workspace: Workspace) -> Spending:
    """The spending of an output folder; one a process, so that it is read once."""
    return Spending(workspace.out / "prep" / NAME)


def answer_before(workspace: Workspace, request: str) -> dict[str, Any] | None:
    """The answer to a request that was answered before, in this run or another."""
    return read_json(_place(workspace, request))


def keep_answer(workspace: Workspace, request: str, answer: Mapping[str, Any]) -> None:
    with renamed_when_whole(_place(workspace, request)) as partial:
        partial.write_text(json.dumps(answer, ensure_ascii=False))


def _place(workspace: Workspace, request: str) -> Path:
    return workspace.out / "prep" / ANSWERS / request[:2] / f"{request}.json"


def _usage(line: bytes) -> Usage:
    try:
        row = json.loads(line)
        return Usage(int(row["sent"]), int(row["answered"]), float(row["cost"]))
    except (ValueError, KeyError, TypeError):
        return Usage()

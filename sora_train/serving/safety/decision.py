"""A decision about a prompt, an upload or a video, and where decisions are kept."""

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger("sora_train.serving.safety")


@dataclass(frozen=True)
class Decision:
    """Whether something is made or taken, and why not."""

    allowed: bool
    prompt: str = ""
    """The first text, rewritten where the policy says so."""
    category: str = ""
    """Of the policy; '' where no rule applied."""
    reason: str = ""
    """For whoever asked; names no rule."""
    rules: tuple[str, ...] = ()
    """Every rule that applied, blocking or not: `sexual: naked`."""
    prompts: tuple[str, ...] = ()
    """All texts, rewritten."""


@dataclass(frozen=True)
class Entry:
    """What is kept of a decision."""

    stage: str
    """prompt, upload or video."""
    action: str
    """allow, rewrite, log or block."""
    category: str
    reason: str
    rules: tuple[str, ...]
    subject: str
    """Whose, or of which job, as the caller says."""
    digest: str
    """SHA-256 of what was judged: tells that two were the same, not what they said."""
    text: str = ""
    """The prompt, where the policy says that it is kept."""


class AuditLog(Protocol):
    """Keeps decisions."""

    def record(self, entry: Entry) -> None: ...


class LoggedDecisions:
    """Decisions as lines of JSON in the log; those without a rule are not worth one."""

    def record(self, entry: Entry) -> None:
        if entry.rules:
            facts = {name: value for name, value in vars(entry).items() if value}
            log.info("decision %s", json.dumps(facts, ensure_ascii=True))


def digest_of(*texts: str) -> str:
    """Of texts in order; where one ends is part of it."""
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()

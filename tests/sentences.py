"""What a message must hold for the one who reads it: the key or file, the value, the remedy; never a whole sentence.

with refuses(UserError, "data.max_drop_fraction=0.05", "raise"):
    train()
says(capsys.readouterr().out, "runs/a", "7 used", "3 dropped")
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest


def says(message: Any, *facts: str) -> None:
    """Fails unless the message (a text, an exception) holds every fact as whole words, wherever its lines break."""
    assert facts, "name what the message must hold"
    text = " ".join(str(message).split())
    missing = [fact for fact in facts if not holds(text, fact)]
    assert not missing, f"{missing} not in: {text}"


def holds(text: str, fact: str) -> bool:
    """'2' is not in 'step 12' nor in '2.5', and 'optim.lr' is not in 'optim.lrr'."""
    before = r"(?<!\w)" if re.match(r"\w", fact) else ""
    after = r"(?!\w)" if re.search(r"\w$", fact) else ""
    if fact[:1].isdigit():
        before += r"(?<!\d\.)"
    if fact[-1:].isdigit():
        after += r"(?!\.\d)"
    return re.search(before + re.escape(fact) + after, text) is not None


def refuses(
    kind: type[BaseException] | tuple[type[BaseException], ...], *facts: str
) -> AbstractContextManager[Any]:
    """`pytest.raises`, and the error says the facts. To be entered: called with a function it would check nothing."""
    assert isinstance(kind, type | tuple), "write `with refuses(Error, ...):` and the call below it"
    return _refuses(kind, facts)


@contextmanager
def _refuses(
    kind: type[BaseException] | tuple[type[BaseException], ...], facts: tuple[str, ...]
) -> Iterator[Any]:
    with pytest.raises(kind) as caught:
        yield caught
    says(caught.value, *facts)

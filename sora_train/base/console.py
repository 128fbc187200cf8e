"""Consoles on which what people wrote stands as they wrote it: a caption, a folder or a key may hold [brackets]."""

from typing import IO, Any

from rich.console import Console


def plain_console(file: IO[str] | None = None, **options: Any) -> Console:
    """A rich console without markup, emoji codes and highlighting; styles are given as arguments."""
    return Console(file=file, markup=False, emoji=False, highlight=False, **options)

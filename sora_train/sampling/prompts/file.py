"""Files of prompts: lines of text, or YAML and JSON with texts and fields."""

import json
from pathlib import Path
from typing import Any

from sora_train.base.text import NotText, lines_of, read_text
from sora_train.config.messages import validated
from sora_train.config.yaml_files import parse_yaml
from sora_train.errors import ConfigError, UserError
from sora_train.sampling.prompts.written import Written

ENDINGS = {".yaml": "YAML", ".yml": "YAML", ".json": "JSON", ".jsonl": "JSON"}


def read_prompts(path: Path) -> list[Written]:
    """The prompts of a file: one a line, or a list of texts and of fields if its name ends in .yaml, .json or .jsonl.

    Raises UserError, with the number of the line or of the entry, for what is no prompt.
    """
    try:
        text = read_text(path)
    except (OSError, NotText) as error:
        raise UserError(f"--prompts {path} cannot be read as text: {error}") from None
    form = ENDINGS.get(path.suffix.lower())
    entries = _entries(path, text) if form else [line for line in lines_of(text) if line.strip()]
    if not entries:
        how = "write a list of texts or fields" if form else "write one a line"
        raise UserError(f"--prompts {path} holds no prompts; {how}")
    return [written(entry, f"--prompts {path} entry {i}") for i, entry in enumerate(entries, 1)]


def written(entry: Any, where: str) -> Written:
    """An entry as a prompt. Raises UserError that begins with `where`."""
    if not isinstance(entry, str | dict) or not entry:
        raise UserError(f"{where} is {entry!r}; write a text, or fields such as subject and action")
    try:
        prompt = validated(Written, {"prompt": entry} if isinstance(entry, str) else entry)
    except ConfigError as error:
        raise UserError(f"{where}: {str(error).replace('config key', 'key')}") from None
    if not prompt.prompt and not prompt.fields:
        raise UserError(f"{where} says nothing of what to show; give it a prompt, or a subject")
    return prompt


def _entries(path: Path, text: str) -> list[Any]:
    if path.suffix.lower() == ".jsonl":
        lines = [(i, line) for i, line in enumerate(lines_of(text), 1) if line.strip()]
        return [_json(line, f"--prompts {path} line {i}") for i, line in lines]
    values = (
        _json(text, f"--prompts {path}")
        if path.suffix.lower() == ".json"
        else parse_yaml(text, path)
    )
    if not isinstance(values, list):
        raise UserError(
            f"--prompts {path} must hold a list of prompts; begin each with `- `, or put them in [ ]"
        )
    return values


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None

"""The settings of `sora prep run`: its own, and a section for each stage, those of the user's own stages among them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model, field_validator

from data_prep.stage import Stage
from sora_train.config.messages import unknown_key, validated
from sora_train.config.overrides import parse_overrides, text_as_written
from sora_train.config.schema import keys
from sora_train.config.sections.base import Section
from sora_train.config.sections.data import StrList
from sora_train.config.sections.settings import share_of
from sora_train.errors import ConfigError


class LimitsConfig(Section):
    """What one worker process may take."""

    memory_gb: float = Field(8.0, ge=0)
    """Memory of a process in GiB; a row that needs more is dropped with the reason. 0: no limit."""


class PrepSettings(Section):
    """`sora prep run ...`; each stage has a section of its own beside these."""

    input: str
    """Folder, glob or list (.txt) of videos and images, a CSV/JSONL/Parquet table of them, .tar files, an address
    (s3://, gs://, http(s)://), or the output folder of NeMo Curator or cosmos-curate."""
    output: str
    """Folder for the shards, their manifest, the report and, in `prep/`, what every stage has computed."""
    engine: Literal["processes", "ray"] = "processes"
    """Who calls the stages: processes of this machine, or a Ray cluster."""
    address: str = ""
    """The Ray cluster: `auto` or HOST:PORT; empty: one is started on this machine."""
    workers: int = Field(0, ge=0)
    """Processes a stage; 0: as many as this machine or the cluster has cores."""
    part: str = ""
    """`i/N`: only every N-th row, beginning with the i-th, up to the next stage that needs all of them."""
    until: str = ""
    """The last stage that is run; empty: all are."""
    stages: StrList = ()
    """Files of stages of your own, each with a STAGE that names the one it stands `after`."""
    sample: int = Field(16, ge=0)
    """Rows that are taken through the filters first, so that one that keeps nothing is told early; 0: none."""
    limits: LimitsConfig = LimitsConfig()

    @field_validator("part")
    @classmethod
    def _a_part(cls, part: str) -> str:
        share_of(part)
        return part

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser().resolve()

    @property
    def share(self) -> tuple[int, int]:
        """(i, N) of `part`."""
        return share_of(self.part)


def stage_files(arguments: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """The files of stages that arguments or a YAML file name: what is needed before the rest can be parsed."""
    files = list(values.get("stages", ()))
    for override in parse_overrides([text for text in arguments if text.startswith("stages=")]):
        value = override.value()
        files = list(value) if isinstance(value, list) else [str(value)]
    return [str(file) for file in files]


def parse(
    arguments: Sequence[str], stages: Sequence[Stage], values: Mapping[str, Any] | None = None
) -> PrepSettings:
    """Settings from `key=value` arguments over the values of a file. Raises ConfigError as `compose` does."""
    sections: dict[str, Any] = {stage.name: (stage.config, stage.config()) for stage in stages}
    cls = create_model("PrepSettings", __base__=PrepSettings, **sections)
    known, nested = list(keys(cls)), copy.deepcopy(dict(values or {}))
    for override in parse_overrides([text_as_written(cls, text) for text in arguments]):
        key = override.key_or_group
        if key not in known or override.is_add() or override.is_delete():
            raise ConfigError(
                unknown_key(key, known).replace("`sora config show`", "`sora prep stages`")
            )
        if override.is_sweep_override():
            raise ConfigError(f"'{override.input_line}' names several values; give one")
        *sections_of_key, name = key.split(".")
        place = nested
        for section in sections_of_key:
            place = place.setdefault(section, {})
        place[name] = override.value()
    return validated(cls, nested)

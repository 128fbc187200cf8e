"""`caption:`, the settings of captions."""

from __future__ import annotations

from string import Formatter
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from data_prep.captioning.language import ANY, LANGUAGES
from sora_train.config.sections.base import Section
from sora_train.config.sections.data import StrList


class CaptionConfig(Section):
    """`caption:`"""

    by: Literal["given", "template", "endpoint", "model"] = "given"
    """Where captions come from: those that lie beside the sources, a text with columns, a vision model behind an
    OpenAI-compatible endpoint, or a local one."""
    template: str = ""
    """With caption.by=template: a text with columns, such as "{camera} shot, {given_caption}"."""
    endpoint: str = ""
    """With caption.by=endpoint: the address before `/chat/completions`, such as http://localhost:8000/v1."""
    model: str = ""
    """The model's name at the endpoint."""
    api_key_env: str = ""
    """The environment variable that holds the endpoint's key; empty: none is sent."""
    model_path: str = ""
    """With caption.by=model: the folder of an image-text-to-text model of transformers."""
    device: str = "cpu"
    """Where the local model runs, such as `cuda`."""
    prompt: str = ""
    """What the model is asked, before the description of its answer's fields; empty: a description of the video."""
    version: str = "1"
    """Goes with a digest of the prompt to the column caption_version."""
    main: Literal["dense", "short"] = "dense"
    """Which form becomes the main caption; both are kept by name."""
    language: str = "en"
    """The captions' language (en, de, fr, es, it, pt, nl, ru, zh, ja, ko, ar, hi, th, el, he); `any`: unchecked."""
    max_characters: int = Field(3000, ge=1)
    """A longer text counts as a failed answer."""
    frames: int = Field(4, ge=1)
    """Frames of the clip that the model sees, evenly spread."""
    frame_size: int = Field(512, ge=16)
    """Longest side of these frames in pixels; smaller clips are not enlarged."""
    concurrency: int = Field(8, ge=1)
    """Calls at once of each worker process, up to the 16 rows that it gets."""
    timeout: float = Field(120.0, gt=0)
    """Seconds for an answer."""
    retries: int = Field(4, ge=0)
    """Further tries of a clip in one run; then it is dropped and tried again in the next run."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before the first further try, doubled with each."""
    max_wait: float = Field(60.0, ge=0)
    """Longest wait before a try, in seconds: an endpoint that asks for more has failed for this run."""
    structured: bool = True
    """Ask the endpoint for its answer by a JSON schema; otherwise the prompt alone asks for it."""
    request: dict[str, Any] = {}
    """Further fields of the request, such as {temperature: 0}."""
    max_answer_tokens: int = Field(1024, ge=1)
    """Most tokens of an answer."""
    max_tokens_total: int = Field(0, ge=0)
    """Most tokens for the output folder in all, asked and answered; 0: no limit."""
    price_in: float = Field(0.0, ge=0)
    """Price of a million tokens that are sent."""
    price_out: float = Field(0.0, ge=0)
    """Price of a million tokens that are answered."""
    max_cost: float = Field(0.0, ge=0)
    """Most money for the output folder in all, in the unit of the prices; 0: no limit."""
    append: StrList = ()
    """Columns whose values are written behind each caption, such as [motion, fps, camera]."""
    append_as: Literal["words", "numbers"] = "words"
    """Whether motion is written as "Motion: high." or as "Motion: 2.31."."""
    allow_empty: bool = False
    """Keep clips that have no caption."""

    @field_validator("language")
    @classmethod
    def _a_language(cls, language: str) -> str:
        if language not in (ANY, *LANGUAGES):
            raise ValueError(f"is none of {', '.join((ANY, *LANGUAGES))}")
        return language

    @field_validator("template")
    @classmethod
    def _a_template(cls, template: str) -> str:
        if any(not name for name in names_of(template)):
            raise ValueError(
                'has braces without a column; write "{given_caption}", or {{ for a brace'
            )
        return template

    @field_validator("endpoint")
    @classmethod
    def _an_address(cls, endpoint: str) -> str:
        parts = urlsplit(endpoint)
        if endpoint and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("is no address; give one such as http://localhost:8000/v1")
        return endpoint.rstrip("/").removesuffix("/chat/completions")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that captions depend on by these settings."""
        named = names_of(self.template) if self.by == "template" else []
        return tuple(dict.fromkeys([*named, *self.append]))

    @property
    def has_budget(self) -> bool:
        return bool(self.max_tokens_total or self.max_cost)


def names_of(template: str) -> list[str]:
    """The names in braces. Raises ValueError where a brace has no partner."""
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]

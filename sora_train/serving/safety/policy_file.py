"""The policy's YAML file: its keys, and what is wrong with one, in a sentence."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sora_train.config.messages import validated
from sora_train.config.sections.base import Section
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import ConfigError, UserError

Strings = Annotated[tuple[str, ...], Field(strict=False)]
Action = Literal["block", "rewrite", "log"]
SHIPPED = Path(__file__).with_name("default.yaml")


class Pattern(Section):
    near: Strings = Field(min_length=2)
    """Names of `lists`: a term of each."""
    within: int = Field(8, ge=1, le=100)
    """Most words from the first of them to the last."""


class Category(Section):
    action: Action
    says: str = Field(min_length=1)
    """What a refusal calls it, such as `sexual content`."""
    terms: Strings | dict[str, str | None] = ()
    """Words, `beginnings*`, or `@list`; of a category that rewrites also `term: what it becomes`."""
    patterns: Annotated[tuple[Pattern, ...], Field(strict=False)] = ()
    """Terms of several lists near each other; they cannot be rewritten."""
    becomes: str = ""
    """What terms become that say nothing of their own."""

    def all_terms(self) -> dict[str, str]:
        """Each term and what it becomes."""
        terms = self.terms if isinstance(self.terms, dict) else dict.fromkeys(self.terms)
        return {term: becomes or self.becomes for term, becomes in terms.items()}


class UploadLimits(Section):
    image_bytes: int = Field(20 << 20, ge=1)
    image_pixels: int = Field(25_000_000, ge=1)
    """Width times height, as the file's head says before anything is decoded."""
    video_bytes: int = Field(256 << 20, ge=1)
    video_pixels: int = Field(4096 * 2304, ge=1)
    """Of a frame."""
    video_seconds: float = Field(120.0, gt=0)
    video_frames: int = Field(7200, ge=1)
    work_seconds: float = Field(120.0, gt=0)
    """Time that one file is looked at."""


class Uploads(Section):
    faces: Literal["block", "log", "allow"] = "block"
    """Pictures and clips of people: nobody is shown that did not agree to it."""
    face_model: str = ""
    """An ONNX file of YuNet, which misses fewer faces than the cascades of OpenCV's wheel."""
    nsfw: float = Field(0.4, gt=0, le=1)
    """Probability from which a picture is refused; 1: none is."""
    limits: UploadLimits = UploadLimits()


class Outputs(Section):
    nsfw: float = Field(0.7, gt=0, le=1)
    """Probability from which one frame blocks the video; 1: none does."""
    fps: float = Field(2.0, gt=0, le=60)
    """Frames that are looked at in a second of video."""


class ModerationSettings(Section):
    address: str = ""
    """Base of an endpoint with OpenAI's /moderations, such as http://host:8000/v1; empty: none is asked."""
    model: str = "omni-moderation-latest"
    key_env: str = ""
    """Environment variable that holds its key."""
    seconds: float = Field(5.0, gt=0, le=60)
    """Time for one answer."""
    tries: int = Field(2, ge=1, le=5)
    when_unreachable: Literal["block", "allow"] = "block"
    """Whether prompts are refused or made while it does not answer."""
    thresholds: dict[str, float] = {}
    """Category of the endpoint -> score from which it counts, where its own verdict is not strict enough."""


class PolicyFile(Section):
    categories: dict[str, Category]
    """In the order in which they are named in a refusal."""
    lists: dict[str, Strings] = {}
    """Terms that several categories or patterns use."""
    allow: Strings = ()
    """Phrases that hide terms inside of them: `naked eye`."""
    keep_prompts: bool = False
    """Whether the log of decisions holds the prompt's text."""
    uploads: Uploads = Uploads()
    outputs: Outputs = Outputs()
    moderation: ModerationSettings = ModerationSettings()


def read_policy(path: Path) -> PolicyFile:
    """Raises UserError with the file, the key, its value and the remedy."""
    try:
        values: dict[str, Any] = load_yaml(path)
        rules = validated(PolicyFile, values, dict.fromkeys(values, str(path)))
    except ConfigError as error:
        told = (
            str(error)
            .replace("config key", "policy key")
            .replace("config section", "policy section")
        )
        told = told.replace("`sora config show` lists every key", "docs/serve.md lists every key")
        told = told.replace("add categories=... to the command", "write it")
        lines = (line if str(path) in line else f"{line} ({path})" for line in told.splitlines())
        raise UserError("\n".join(lines)) from None
    problems = [f"{path}: {problem}" for problem in _problems(rules)]
    if problems:
        raise UserError("\n".join(problems))
    return rules


def _problems(rules: PolicyFile) -> list[str]:
    """What no single key shows: names that nothing has, categories that could not do what they say."""
    found = []
    for name, category in rules.categories.items():
        key = f"categories.{name}"
        for term, becomes in category.all_terms().items():
            if term.startswith("@") and term[1:] not in rules.lists:
                found.append(_no_list(f"{key}.terms", term[1:], rules))
            if category.action == "rewrite" and not becomes:
                found.append(
                    f"{key}.terms: {term!r} is rewritten and becomes nothing; write {term!r}: WORDS, or {key}.becomes"
                )
        for number, pattern in enumerate(category.patterns):
            place = f"{key}.patterns[{number}].near"
            found += [_no_list(place, one, rules) for one in pattern.near if one not in rules.lists]
            if len(set(pattern.near)) < len(pattern.near):
                found.append(f"{place}={list(pattern.near)} names a list twice; name each once")
        if category.action == "rewrite" and category.patterns:
            found.append(
                f"{key}.patterns: words near each other cannot be rewritten; set the action of it to block or log"
            )
        if not category.terms and not category.patterns:
            found.append(f"{key} has neither terms nor patterns; give it some, or take it out")
    return found


def _no_list(key: str, name: str, rules: PolicyFile) -> str:
    known = ", ".join(rules.lists) or "none"
    return f"{key} names the list {name!r}, which is not under `lists:` (there: {known}); add it or correct the name"

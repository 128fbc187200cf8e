"""How well a policy does on prompts of known categories: precision, recall, the accuracies of Sora's system card.

Of N violating prompts of a category I pass the input's checks, and of O the video is delivered: accuracy at input is
(N - I) / N, end to end (N - O) / N.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from sora_train.config.messages import validated
from sora_train.config.sections.base import Section
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import ConfigError, UserError
from sora_train.serving.safety.policy import Policy
from sora_train.serving.safety.policy_file import Strings


class Labelled(Section):
    """Prompts of a category, and prompts that look like it and are of none."""

    violating: Strings = Field(min_length=1)
    benign: Strings = ()


class _File(Section):
    prompts: dict[str, Labelled] = Field(min_length=1)


@dataclass(frozen=True)
class Row:
    """A category's counts. A rule is of a category where its own category's name begins so."""

    category: str
    missed: tuple[str, ...]
    """Violating prompts that were neither blocked nor rewritten."""
    violating: int
    named: int
    """Violating prompts that a rule of this category stopped."""
    benign: int
    """Prompts that look like the category."""
    mistaken: tuple[str, ...]
    """Benign prompts, of all categories, that a rule of this one stopped."""

    @property
    def precision(self) -> float:
        """Of the prompts that rules of the category stopped, the share that is violating; 0 where there are none."""
        return self.named / max(1, self.named + len(self.mistaken))

    @property
    def recall(self) -> float:
        return self.named / self.violating

    @property
    def accuracy_at_input(self) -> float:
        return 1 - len(self.missed) / self.violating


def read_labelled(path: Path) -> dict[str, Labelled]:
    """Raises UserError with the file, the key and the remedy."""
    try:
        return validated(_File, {"prompts": load_yaml(path)}).prompts
    except ConfigError as error:
        told = str(error).replace("config key 'prompts.", "key '")
        lines = (line if str(path) in line else f"{path}: {line}" for line in told.splitlines())
        raise UserError("\n".join(lines)) from None


def measure(policy: Policy, labelled: dict[str, Labelled]) -> list[Row]:
    """A row for each category."""
    stopped = {
        prompt: _stopping(policy, prompt)
        for one in labelled.values()
        for prompt in (*one.violating, *one.benign)
    }
    every_benign = [prompt for one in labelled.values() for prompt in one.benign]
    return [
        Row(
            category=name,
            missed=tuple(prompt for prompt in one.violating if not stopped[prompt]),
            violating=len(one.violating),
            named=sum(_is_of(name, stopped[prompt]) for prompt in one.violating),
            benign=len(one.benign),
            mistaken=tuple(prompt for prompt in every_benign if _is_of(name, stopped[prompt])),
        )
        for name, one in labelled.items()
    ]


def _stopping(policy: Policy, prompt: str) -> tuple[str, ...]:
    """The categories of the rules that applied to a prompt; none where it passed as it was."""
    decision = policy.judge_prompt(prompt)
    if decision.allowed and decision.prompt == prompt:
        return ()
    return tuple(rule.partition(": ")[0] for rule in decision.rules)


def _is_of(category: str, categories: tuple[str, ...]) -> bool:
    return any(one.startswith(category) for one in categories)

"""Short prompts made longer, as the captions of training are, by rules or by a language model at an endpoint."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from sora_train.base.chat import Completion, Denied, Failed, complete, key_in
from sora_train.errors import UserError
from sora_train.sampling.prompts.entities import lost, words_of
from sora_train.sampling.prompts.rules import SHORT, Fits, expanded, shapes_parts
from sora_train.sampling.prompts.written import clean

KEY = "SORA_UPSAMPLE_KEY"
"""The environment variable with the endpoint's key, where it asks for one."""
TRIES, TIMEOUT, MAX_WAIT = 3, 60.0, 10.0
ASKED = (
    "Rewrite the prompt for a short video as its caption: two to four plain sentences on subject, action, setting, "
    "camera, lighting and style, in this order. Keep every thing, colour, number, name and negation of the prompt in "
    "its own words, add no other things, people or text, and write at most 80 words. Answer with the caption alone."
)
SHAPES_ASKED = (
    "Complete the caption of a clip of the shapes world. A caption is: [small|large] COLOUR SHAPE ACTION [on a "
    "BACKGROUND background][, static camera][, bright light|dim light][, flat style|shaded style]. Keep all its words. "
    "Answer with the caption alone."
)


@dataclass
class Upsampler:
    """Expands prompts, and says what it did in `notes`."""

    by: str
    """`rules`, or the address of an endpoint before /chat/completions."""
    model: str
    """The model's name at the endpoint."""
    source: str
    """The run's `data.source`: what its captions are like."""
    seed: int
    fits: Fits
    """Whether the model reads a text whole."""
    backoff: float = 1.0
    """Seconds before a second try, doubled with the third."""
    notes: list[str] = field(default_factory=list)
    _down: bool = False

    def __post_init__(self) -> None:
        if self.by == "rules":
            return
        parts = urlsplit(self.by)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"--upsample is '{self.by}'; give rules, or an endpoint's address such as http://localhost:8000/v1"
            )
        if not self.model:
            raise UserError(f"--upsample {self.by} needs --upsample-model, the model's name there")
        self.by = self.by.rstrip("/").removesuffix("/chat/completions")

    def all(self, prompts: Sequence[str]) -> list[str]:
        """The texts for the model, one a prompt. Raises UserError where the endpoint refuses the key or the model."""
        return [self.one(prompt) for prompt in prompts]

    def one(self, prompt: str) -> str:
        """The prompt itself where it is long enough, or no text keeps all of it."""
        by_rules = expanded(prompt, self.source, self.seed, self.fits)
        text = by_rules
        if self.by != "rules" and prompt and len(words_of(prompt)) <= SHORT and not self._down:
            text = self._by_model(prompt) or by_rules
        if text != prompt:
            self.notes.append(f"prompt '{_short(prompt)}' is expanded to '{_short(text, 300)}'")
        elif self.source == "shapes" and shapes_parts(prompt) is None:
            self.notes.append(
                f"prompt '{_short(prompt)}' is left as it is: this run has read captions of the shapes world "
                "alone, and it is none"
            )
        return text

    def _by_model(self, prompt: str) -> str:
        """What the endpoint's model makes of it; '' where that is of no use, which is noted."""
        try:
            answer = self._asked(prompt)
        except Failed as error:
            self._down = True
            self.notes.append(f"--upsample {self.by}: {error}; prompts are expanded by rules")
            return ""
        text, problem = self._judged(prompt, answer)
        if problem:
            self.notes.append(
                f"what --upsample {self.by} made of '{_short(prompt)}' {problem}; rules take its place"
            )
        return "" if problem else text

    def _asked(self, prompt: str) -> Completion:
        """Raises Failed where all tries do."""
        asked = SHAPES_ASKED if self.source == "shapes" else ASKED
        messages = [{"role": "system", "content": asked}, {"role": "user", "content": prompt}]
        key = key_in(KEY if KEY in os.environ else "", KEY)
        for attempt in range(TRIES):
            body = {"model": self.model, "messages": messages, "max_tokens": 300}
            body |= {"temperature": 0.7, "seed": self.seed + attempt}
            try:
                return complete(self.by, body, key, TIMEOUT)
            except Denied as error:
                remedy = (
                    f"set the key in {KEY}" if error.is_key else "correct it or --upsample-model"
                )
                raise UserError(f"--upsample {self.by} answers {error}; {remedy}") from None
            except Failed as error:
                wait = max(error.wait, self.backoff * 2**attempt)
                if not error.again or wait > MAX_WAIT or attempt == TRIES - 1:
                    raise
                time.sleep(wait)
        raise AssertionError("a try either returns or raises")

    def _judged(self, prompt: str, answer: Completion) -> tuple[str, str]:
        """The text, and the end of a sentence on why it is not taken."""
        if answer.refusal:
            return "", f"is a refusal ({_short(answer.refusal)})"
        try:
            text = clean(re.sub(r"[\x80-\x9f]", " ", answer.text), "the answer").strip("\"' ")
        except UserError:
            return "", "is no text"
        if answer.is_cut or not text:
            return "", "is cut off" if text else "is empty"
        if gone := lost(prompt, text):
            return "", f"lost {', '.join(gone)}"
        if self.source == "shapes" and shapes_parts(text) is None:
            return "", "is no caption of the shapes world, and this run has read no others"
        if not self.fits(text):
            return "", "is longer than the model reads (text.max_length)"
        return text, ""


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."

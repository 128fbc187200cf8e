"""How long captions are for an encoder, and what it does not read; of a published one the tokenizer is enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sora_train.config.sections.model import TextConfig
from sora_train.errors import UserError
from sora_train.models.hub import weights_folder
from sora_train.models.text.published import TEXT_KINDS, load_tokenizer

COUNTED = 10_000
"""Captions of a source that are counted at most, evenly spread: a published tokenizer takes some thousand a second."""


@dataclass(frozen=True)
class CaptionLengths:
    """Counts the tokens of captions for a text encoder, the end mark included."""

    cfg: TextConfig

    @property
    def unit(self) -> str:
        return "tokens" if self.cfg.path else "bytes"

    def of(self, captions: Sequence[str]) -> np.ndarray:
        """Tokens of each caption, (N,) int64. Raises UserError where the folder has no tokenizer."""
        if not self.cfg.path:
            return np.array([len(_bytes(caption)) + 1 for caption in captions], np.int64)
        return np.array([len(self._ids(caption)) for caption in captions], np.int64)

    def lost(self, caption: str) -> str:
        """The text behind `text.max_length`, '' where nothing is cut."""
        kept = self.cfg.max_length - 1
        if not self.cfg.path:
            return _bytes(caption)[kept:].decode("utf-8", errors="ignore")
        ids = self._ids(caption)
        if len(ids) <= kept + 1:
            return ""
        text: str = self._tokenizer.decode(ids[kept:], skip_special_tokens=True)
        return text.strip()

    def cut_notes(self, prompts: Sequence[str], name: str = "prompt") -> list[str]:
        """A sentence for each different prompt that is cut: its length and what is lost."""
        cut = {prompt: self.lost(prompt) for prompt in dict.fromkeys(prompts)}
        return [
            f"{name} '{_short(prompt)}' has {int(self.of([prompt])[0])} {self.unit} and the model reads "
            f"{self.cfg.max_length} (text.max_length, the end mark included); lost is '{_short(lost)}'"
            for prompt, lost in cut.items()
            if lost
        ]

    def share_cut(self, captions: Sequence[str]) -> str:
        """How many captions are cut, in words, counted on at most `COUNTED` of them."""
        if not captions:
            return "no captions"
        chosen = captions
        if len(captions) > COUNTED:
            places = np.linspace(0, len(captions) - 1, COUNTED).round().astype(int)
            chosen = [captions[place] for place in places]
        try:
            lengths = self.of(chosen)
        except UserError as error:
            return f"not counted: {error}"
        count = int((lengths > self.cfg.max_length).sum())
        counted = f"{count:,} of {len(chosen):,}" + (" looked at" if chosen is not captions else "")
        return (
            f"{100 * count / len(chosen):.3g} % ({counted}) are cut at text.max_length={self.cfg.max_length}; the "
            f"longest has {int(lengths.max()):,} {self.unit}"
        )

    def _ids(self, caption: str) -> list[int]:
        clean = TEXT_KINDS[self.cfg.kind].clean
        ids: list[int] = self._tokenizer(clean(caption), verbose=False).input_ids
        return ids

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(weights_folder("text.path", self.cfg.path, "text_encoder"))


def _bytes(caption: str) -> bytes:
    return caption.encode("utf-8", errors="replace")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."

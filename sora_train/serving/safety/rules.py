"""The policy's rules on texts: which apply, and the texts with the terms rewritten that are to be."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sora_train.errors import UserError
from sora_train.serving.safety.matching import BadTerm, Hit, Terms, near
from sora_train.serving.safety.policy_file import PolicyFile
from sora_train.serving.safety.words import Word, read

_ALLOWED = "allow"
_LIST = "@"
_BETWEEN = "\n\n\n"
"""Between texts that are judged together, so that no word is spelled over two."""


@dataclass(frozen=True)
class Found:
    """A rule that applies."""

    category: str
    rule: str
    """The term, or the lists of the pattern."""
    hits: tuple[Hit, ...]


class Rules:
    """A policy's rules, ready to be asked. Raises UserError, which names the file, for a term that none could be."""

    def __init__(self, policy: PolicyFile, path: Path):
        self.policy, self._terms = policy, Terms()
        self._becomes: dict[tuple[str, str], str] = {}
        for number, phrase in enumerate(policy.allow):
            self._add(phrase, _ALLOWED, f"{path}: allow[{number}]")
        for name, terms in policy.lists.items():
            for number, term in enumerate(terms):
                self._add(term, _LIST + name, f"{path}: lists.{name}[{number}]")
        for name, category in policy.categories.items():
            for term, becomes in category.all_terms().items():
                listed = policy.lists[term[1:]] if term.startswith("@") else (term,)
                for one in listed:
                    self._add(one, name, f"{path}: categories.{name}.terms")
                    self._becomes[name, one] = becomes
        self._check_rewritten(path)

    def _add(self, term: str, owner: str, key: str) -> None:
        try:
            self._terms.add(term, owner)
        except BadTerm as error:
            raise UserError(f"{key}={term!r} {error}") from None

    def _check_rewritten(self, path: Path) -> None:
        for (name, term), becomes in self._becomes.items():
            if self.policy.categories[name].action != "rewrite":
                continue
            for found in self.apply([becomes])[0]:
                raise UserError(
                    f"{path}: categories.{name}.terms: {term!r} becomes {becomes!r}, to which "
                    f"{found.category}: {found.rule} applies; choose other words"
                )

    def apply(self, texts: Sequence[str]) -> tuple[list[Found], list[str]]:
        """All rules that apply to texts of one video, in the order of the categories; the texts rewritten."""
        begins = [0]
        for text in texts:
            begins.append(begins[-1] + len(text) + len(_BETWEEN))
        reading = read(_BETWEEN.join(texts))
        place = [bisect_right(begins, word.begin) - 1 for word in reading.words]
        # A term stands in one text; terms near each other may stand in several.
        whole = [
            hit for hit in self._terms.find(reading) if place[hit.first] == place[hit.after - 1]
        ]
        hits = _not_allowed(whole)
        found = []
        for name, category in self.policy.categories.items():
            by_term: dict[str, list[Hit]] = {}
            for hit in hits:
                if hit.owner == name:
                    by_term.setdefault(hit.term, []).append(hit)
            found += [Found(name, term, tuple(those)) for term, those in by_term.items()]
            for pattern in category.patterns:
                lists = tuple(_LIST + one for one in pattern.near)
                if together := near(hits, lists, pattern.within):
                    rule = " near ".join(hit.term for hit in together)
                    found.append(Found(name, rule, tuple(together)))
        rewritten = list(texts)
        for hit in reversed(self._to_rewrite(found)):
            number, becomes = place[hit.first], self._becomes[hit.owner, hit.term]
            words = [
                replace(word, begin=word.begin - begins[number], end=word.end - begins[number])
                for word in reading.words[max(0, hit.first - 1) : hit.after]
            ]
            before = words[0] if hit.first and place[hit.first - 1] == number else None
            begin = words[1 if hit.first else 0].begin
            rewritten[number] = _replaced(rewritten[number], before, begin, words[-1].end, becomes)
        return found, rewritten

    def _to_rewrite(self, found: Sequence[Found]) -> list[Hit]:
        """The hits that are rewritten, in order; of those that overlap the first and longest."""
        rewriting = [
            hit
            for one in found
            if self.policy.categories[one.category].action == "rewrite"
            for hit in one.hits
        ]
        chosen: list[Hit] = []
        for hit in sorted(rewriting, key=lambda hit: (hit.first, -hit.after)):
            if not chosen or hit.first >= chosen[-1].after:
                chosen.append(hit)
        return chosen


def _replaced(text: str, before: Word | None, begin: int, end: int, becomes: str) -> str:
    """The text with a piece of it replaced; an article before it fits what it becomes."""
    if before and before.text in ("a", "an", "the") and not text[before.end : begin].strip():
        article, space, rest = becomes.partition(" ")
        if space and article in ("a", "an"):
            becomes = rest
        if before.text != "the":
            fitting = "an" if becomes[0].lower() in "aeiou" else "a"
            fitting = fitting.capitalize() if text[before.begin].isupper() else fitting
            return f"{text[: before.begin]}{fitting} {becomes}{text[end:]}"
    if begin == 0 and text[:1].isupper():
        becomes = becomes[:1].upper() + becomes[1:]
    return text[:begin] + becomes + text[end:]


def _not_allowed(hits: list[Hit]) -> list[Hit]:
    """The hits but those inside of an allowed phrase. Both are in order, so one walk will do."""
    allowed = [hit for hit in hits if hit.owner == _ALLOWED]
    if not allowed:
        return hits
    covered: dict[int, int] = {}
    for phrase in allowed:
        for word in range(phrase.first, phrase.after):
            covered[word] = max(covered.get(word, 0), phrase.after)
    return [hit for hit in hits if hit.owner != _ALLOWED and covered.get(hit.first, 0) < hit.after]

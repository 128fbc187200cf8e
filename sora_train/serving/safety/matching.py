"""Finds terms in a text's words: one walk over a tree of all terms, whatever their number.

A term is one word or several. `porn*` stands for every word that begins so; others for themselves and their plural.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sora_train.serving.safety.words import SHORTEST, Reading, skeleton, words_of

JOINED = 6
"""Letters of a term of several words that is one written without the spaces too: `spiderman`."""


@dataclass(frozen=True)
class Hit:
    """A term that was found, and the words that it takes."""

    owner: str
    term: str
    first: int
    after: int


@dataclass
class _Node:
    words: dict[str, "_Node"] = field(default_factory=dict)
    prefixes: dict[str, "_Node"] = field(default_factory=dict)
    bones: dict[str, "_Node"] = field(default_factory=dict)
    bone_prefixes: dict[str, "_Node"] = field(default_factory=dict)
    ends: set[tuple[str, str]] = field(default_factory=set)


class BadTerm(ValueError):
    """A term that no word could be; the message says what is wrong with it."""


class Terms:
    """A set of terms, each with an owner: a category or a list of the policy."""

    def __init__(self) -> None:
        self._root = _Node()

    def add(self, term: str, owner: str) -> None:
        """Raises BadTerm."""
        is_prefix = term.endswith("*")
        if "*" in term.rstrip("*"):
            raise BadTerm("has a * inside; a * stands at the end of a term")
        words = words_of(term)
        if not words:
            raise BadTerm("has no letter or digit; leave it out")
        if is_prefix and len(words[-1]) < SHORTEST:
            raise BadTerm(f"is short for a *: give {SHORTEST} letters or more before it")
        self._grow(words, is_prefix, (owner, term))
        if len(words) > 1 and len(joined := "".join(words)) >= JOINED:
            self._grow([joined], is_prefix, (owner, term))

    def _grow(self, words: list[str], is_prefix: bool, end: tuple[str, str]) -> None:
        nodes = [self._root]
        for number, word in enumerate(words, 1):
            is_last, grown = number == len(words), []
            for node in nodes:
                if is_last and is_prefix:
                    grown.append(node.prefixes.setdefault(word, _Node()))
                    if len(bones := skeleton(word)) >= SHORTEST:
                        grown.append(node.bone_prefixes.setdefault(bones, _Node()))
                    continue
                for form in (word, word + "s", word + "es") if is_last else (word,):
                    grown.append(node.words.setdefault(form, _Node()))
                    if len(bones := skeleton(form)) >= SHORTEST:
                        grown.append(node.bones.setdefault(bones, _Node()))
            nodes = grown
        for node in nodes:
            node.ends.add(end)

    def find(self, reading: Reading) -> list[Hit]:
        """Every term in a text, each place of it once."""
        found: dict[Hit, None] = {}
        for first in range(len(reading.words)):
            walking = [(self._root, first)]
            while walking:
                node, place = walking.pop()
                for owner, term in node.ends:
                    found[Hit(owner, term, first, place)] = None
                if place < len(reading.words):
                    walking += self._steps(node, reading, place)
        return sorted(found, key=lambda hit: (hit.first, -hit.after, hit.owner, hit.term))

    def _steps(self, node: _Node, reading: Reading, place: int) -> Iterator[tuple[_Node, int]]:
        word = reading.words[place].text
        yield from ((child, place + 1) for child in _children(node.words, node.prefixes, word))
        for bones, after in reading.disguised.get(place, ()):
            yield from (
                (child, after) for child in _children(node.bones, node.bone_prefixes, bones)
            )


def _children(whole: dict[str, _Node], prefixes: dict[str, _Node], word: str) -> Iterator[_Node]:
    if word in whole:
        yield whole[word]
    if prefixes:
        for length in range(SHORTEST, min(len(word), 40) + 1):
            if word[:length] in prefixes:
                yield prefixes[word[:length]]


def near(hits: list[Hit], lists: tuple[str, ...], within: int) -> list[Hit]:
    """One hit of each list, no more than `within` words from the first to the last; none where there are none.

    The hits are in order.
    """
    seen: dict[str, Hit] = {}
    for hit in hits:
        if hit.owner in lists:
            seen[hit.owner] = hit
            begins = [one.first for one in seen.values()]
            if len(seen) == len(lists) and max(begins) - min(begins) <= within:
                return [seen[name] for name in lists]
    return []

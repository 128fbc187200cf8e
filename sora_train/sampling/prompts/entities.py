"""What a longer text must keep of a prompt: things, colours, numbers, names and negations.

No language model is needed, and nothing is guessed: every word that is not one of grammar has to come back, whatever
its ending; a colour or a number before the same thing; and what is denied stays denied.
"""

import re
from collections.abc import Sequence

_COLOURS = (
    "red green blue yellow orange purple violet pink magenta cyan brown black white grey gray gold golden silver beige "
    "turquoise teal navy crimson scarlet"
)
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve"
_NEGATIONS = "no not without never none nobody nothing neither nor isn't doesn't don't aren't"
_GRAMMAR = (
    "a an the and or but of in on at by to from with into onto as is are was were be been being it its this that these "
    "those there their his her he she they them i you we my your our then than so very which who whose while when "
    "where has have had do does did will would can could for"
)
COLOURS = frozenset(_COLOURS.split())
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS.split())}
NEGATIONS = frozenset(_NEGATIONS.split())
GRAMMAR = NEGATIONS | frozenset(_GRAMMAR.split())
NEAR = 3
"""Words between a thing and what is said of it."""

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d|(?<!\w)\'([^\']+)\'(?!\w)')


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, numbers as digits."""
    words = [word.lower().replace("\u2019", "'") for word in _WORD.findall(text)]
    return [NUMBERS.get(word, word) for word in words]


def lost(prompt: str, longer: str) -> list[str]:
    """What of the prompt is not in the longer text, in the prompt's words; empty where it keeps all."""
    asked, told = words_of(prompt), words_of(longer)
    stems = [_stem(word) for word in told]
    quoted = [next(filter(None, one)) for one in _QUOTED.findall(prompt)]
    missing = [f"'{text}'" for text in quoted if text not in longer]
    for place, word in enumerate(asked):
        if word in GRAMMAR or word == "1":
            continue
        too_few = _marks(word) and told.count(word) < asked.count(word)
        places = [i for i, stem in enumerate(stems) if stem == _stem(word)]
        if too_few or (not places and (word.isascii() or word not in longer.lower())):
            missing.append(word)
        elif places:
            missing += _changed(asked, place, told, places)
    return list(dict.fromkeys(missing))


def _changed(asked: Sequence[str], place: int, told: Sequence[str], places: list[int]) -> list[str]:
    """What the prompt says of a word, and the longer text of it nowhere."""
    word, before = asked[place], asked[place - 1] if place else ""
    denied = _denied(asked, place)
    if denied and not any(_denied(told, i) for i in places):
        return [f"no {word}"]
    if not denied and all(_denied(told, i) for i in places):
        return [word]
    if not _marks(before) or _marks(word):
        return []
    marks = {before, *([asked[place - 2]] if place > 1 and _marks(asked[place - 2]) else [])}
    around = [_marks_before(told, i) for i in places]
    return [] if any(marks <= set(one) for one in around) else [f"{' '.join(sorted(marks))} {word}"]


def _denied(words: Sequence[str], place: int) -> bool:
    return not NEGATIONS.isdisjoint(words[max(0, place - NEAR) : place])


def _marks(word: str) -> bool:
    return word in COLOURS or word.isdigit()


def _marks_before(words: Sequence[str], place: int) -> list[str]:
    """The colours and numbers before a thing, up to those of another one."""
    found: list[str] = []
    for word in reversed(words[max(0, place - NEAR) : place]):
        if word in GRAMMAR and word != "and":
            break
        if _marks(word):
            found.append(word)
    return found


def _stem(word: str) -> str:
    """A word without its ending, so that `runs`, `running` and `run` are one."""
    stem = re.sub(r"'s$", "", word)
    for ending, put in (("ies", "y"), ("ing", ""), ("ed", ""), ("es", ""), ("s", "")):
        if stem.endswith(ending) and len(stem) - len(ending) >= 3 and not stem.endswith("ss"):
            stem = stem[: -len(ending)] + put
            break
    if len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "aeiouls":
        stem = stem[:-1]
    return stem[:-1] if stem.endswith("e") and len(stem) > 3 else stem

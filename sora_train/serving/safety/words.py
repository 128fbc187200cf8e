"""The words of a prompt as a reader sees them: without case, accents, invisible letters; disguised ones undone.

Every word keeps where it stands in the text as it was written. The work grows with the length of the text alone.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

LONGEST = 40
"""Characters between spaces that may be one disguised word."""
SHORTEST = 3
"""Letters of a disguised word; of fewer nothing can be told."""
_LOOKALIKES = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u0501\u051b\u0442\u043a\u043c\u043d\u0432"
    "\u03b1\u03b5\u03bf\u03c1\u03c4\u03c5\u03bd\u03b9\u03ba\u03c7\u0131\u0142\u00f8\u0111\u0127\u0261\u0251",
    "aeopcyxijsdqtkmhbaeoptuvikxilodhga",
)
"""Cyrillic, Greek and Latin letters that look like letters of English."""
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters by their category that show nothing."""
_LEET = str.maketrans("01345789@$!|+\u20acl", "oieastbgasiitei")
_WORD = re.compile(r"[^\W_]+")
_CHUNK = re.compile(r"\S+")
_EDGES = re.compile(r"^[^\w@$]+|(['\u2019]s)?[^\w@$]*$")
"""Of a chunk, which are no part of a disguise; an 's is none either."""
_THRICE = re.compile(r"([^\W\d_])\1\1")
_AGAIN = re.compile(r"(.)\1+")


@dataclass(frozen=True)
class Word:
    """A word of a text."""

    text: str
    begin: int
    end: int


@dataclass(frozen=True)
class Reading:
    """Words, and what some stretches of them may be read as."""

    words: list[Word]
    disguised: dict[int, list[tuple[str, int]]]
    """First word -> skeletons that begin there, each with the word after it."""


def words_of(text: str) -> list[str]:
    """The words of a term, folded as those of a prompt are."""
    return [one.text for one in read(text).words]


def skeleton(text: str) -> str:
    """What a word is like under a disguise: digits and signs as letters, l as i, letters that repeat once."""
    letters = "".join(letter for letter in text.translate(_LEET) if letter.isalpha())
    return _AGAIN.sub(r"\1", letters)


def read(text: str) -> Reading:
    """The words of a text and its disguised words."""
    folded, origin = _folded(text)
    # A word ends where the next letter begins that is seen: the marks on its own last one are of it.
    after = [*origin, len(text)]
    words = [
        Word(folded[begin:end], origin[begin], max(origin[end - 1] + 1, after[end]))
        for match in _WORD.finditer(folded)
        for begin, end in _parts(folded, match.start(), match.end())
    ]
    begins = {word.begin: number for number, word in enumerate(words)}
    disguised: dict[int, list[tuple[str, int]]] = {}
    for match in _CHUNK.finditer(folded):
        chunk = match[0]
        if len(chunk) > LONGEST or not _is_disguised(chunk):
            continue
        inside = [origin[place] for place in range(match.start(), match.end())]
        numbers = [begins[place] for place in dict.fromkeys(inside) if place in begins]
        bones = skeleton(_EDGES.sub("", chunk))
        if numbers and len(bones) >= SHORTEST:
            disguised.setdefault(numbers[0], []).append((bones, numbers[-1] + 1))
    for first, bones, end in _spaced(words):
        disguised.setdefault(first, []).append((bones, end))
    return Reading(words, disguised)


def _folded(text: str) -> tuple[str, list[int]]:
    """The text letter by letter as `_letter` has them, and which letter of the text each comes of."""
    letters, origin = [], []
    for place, letter in enumerate(text):
        for plain in _letter(letter):
            letters.append(plain)
            origin.append(place)
    return "".join(letters), origin


@lru_cache(1 << 16)
def _letter(letter: str) -> str:
    if letter in _BLANKS:
        return ""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", letter).casefold())
    kept = "".join(one for one in plain if unicodedata.category(one) not in ("Mn", "Me", "Cf"))
    return kept.translate(_LOOKALIKES)


def _parts(text: str, begin: int, end: int) -> list[tuple[int, int]]:
    """A run of letters as words: one, but for ideographs, which are words each, since no spaces are between them."""
    if not any(_is_ideograph(letter) for letter in text[begin:end]):
        return [(begin, end)]
    return [(place, place + 1) for place in range(begin, end)]


def _is_ideograph(letter: str) -> bool:
    return "\u3040" <= letter <= "\u9fff" or "\u0e00" <= letter <= "\u0eff"


def _is_disguised(chunk: str) -> bool:
    inner = _EDGES.sub("", chunk)
    if inner.isalpha():
        return _THRICE.search(inner) is not None
    return any(letter.isalpha() for letter in inner)


def _spaced(words: list[Word]) -> list[tuple[int, str, int]]:
    """Words written letter by letter: (first, skeleton, word after)."""
    found, first = [], 0
    while first < len(words):
        after = first
        while after < len(words) and _goes_on(words, first, after):
            after += 1
        # The article before a spaced word, or after one, looks like a letter of it.
        for begin in (first, first + 1):
            for end in (after, after - 1):
                whole = (begin == first or words[first].text in "ai") and (
                    end == after or words[end].text in "ai"
                )
                if end - begin >= SHORTEST and whole and end - begin <= LONGEST:
                    joined = "".join(word.text for word in words[begin:end])
                    found.append((begin, skeleton(joined), end))
        first = max(after, first + 1)
    return found


def _goes_on(words: list[Word], first: int, number: int) -> bool:
    word = words[number]
    is_letter = len(word.text) == 1 and word.text.isascii()
    return is_letter and (number == first or word.begin - words[number - 1].end <= 2)

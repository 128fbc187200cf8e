"""Whether a caption is in a language: by the script of its letters, then by the small words that no other one has.

No model is needed: a caption of two sentences has five such words or more. One without any is taken for what was asked.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

ANY = "any"
LATIN = {
    "en": "the and with is are of in on at by from over while its their this that behind through into "
    "background there an to as his her front toward towards up down",
    "de": "der die das und mit ist sind ein eine einen einem einer von auf im vor hinter während durch über den dem "
    "des nicht zu aus bei",
    "fr": "le la les et avec est sont un une des du dans sur par derrière devant pendant au aux qui en ses son sa",
    "es": "el la los las y con es son un una unos del en sobre por detrás mientras hacia al que su sus de se",
    "it": "il lo la gli le e con è sono un una uno del della nel nella su dietro mentre verso che di si dei",
    "pt": "o a os as e com é são um uma do da dos das no na em sobre por atrás enquanto ao que de se",
    "nl": "de het een en met is zijn van op in voor achter terwijl door naar aan niet uit bij",
}
"""Frequent words of the languages in Latin letters; only those of one language decide."""
SCRIPTS = {
    "ru": {"CYRILLIC"},
    "zh": {"CJK"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"},
    "ko": {"HANGUL", "CJK"},
    "ar": {"ARABIC"},
    "hi": {"DEVANAGARI"},
    "th": {"THAI"},
    "el": {"GREEK"},
    "he": {"HEBREW"},
}
NEEDED = {"ja": {"HIRAGANA", "KATAKANA"}, "ko": {"HANGUL"}}
"""Scripts of which there must be a letter, as others share the rest."""
LANGUAGES = (*LATIN, *SCRIPTS)
# Letters of another script that a caption may hold, such as those on a sign.
MOST_FOREIGN = 0.2
FEWEST_WORDS = 2

_COUNTS = Counter(word for words in LATIN.values() for word in set(words.split()))
_OWN = {name: {w for w in words.split() if _COUNTS[w] == 1} for name, words in LATIN.items()}


def other_language(text: str, language: str) -> str:
    """What the text is in, in words, where that is not `language`; empty where it is, or cannot be told."""
    letters = [script_of(letter) for letter in text if letter.isalpha()]
    if language == ANY or not letters:
        return ""
    scripts = SCRIPTS.get(language, {"LATIN"})
    if sum(script not in scripts for script in letters) > MOST_FOREIGN * len(letters):
        return f"{Counter(letters).most_common(1)[0][0].lower()} letters"
    if not NEEDED.get(language, scripts) & set(letters):
        return "letters of another language"
    if language not in LATIN:
        return ""
    words = [word.strip(".,;:!?\"'()").lower() for word in text.split()]
    hits = {name: sum(word in own for word in words) for name, own in _OWN.items()}
    best = max(hits, key=lambda name: (hits[name], name == language))
    return f"the words of {best!r}" if hits[best] > hits[language] + FEWEST_WORDS - 1 else ""


@lru_cache(maxsize=1 << 14)
def script_of(letter: str) -> str:
    """`LATIN`, `CYRILLIC`, `CJK`, ...: the first word of the letter's name."""
    return unicodedata.name(letter, "UNKNOWN").split()[0]

"""What counts as a word of a policy in a prompt: as a reader sees it, whole, and found in little time."""

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.serving.safety.matching import BadTerm, Terms, near
from sora_train.serving.safety.policy_file import SHIPPED, read_policy
from sora_train.serving.safety.rules import Rules
from sora_train.serving.safety.words import read
from tests.sentences import refuses


def found(text: str, *terms: str) -> list[str]:
    """The pieces of the text that terms take."""
    tree, reading = Terms(), read(text)
    for term in terms:
        tree.add(term, "a")
    words = reading.words
    return [text[words[hit.first].begin : words[hit.after - 1].end] for hit in tree.find(reading)]


@pytest.mark.parametrize(
    "text",
    [
        "a naked man",
        "NAKED",
        "Nákéd",
        "ｎａｋｅｄ",
        "𝓷𝓪𝓴𝓮𝓭",
        "ⓝⓐⓚⓔⓓ",
        "na\u200bk\u00aded",
        "n\u0336a\u0336k\u0336e\u0336d\u0336",
        "n\u0430k\u0435d",
        "n4k3d",
        "n@ked!",
        "(naked)",
        "naaaaked",
        "NAAAKKKKED",
        "n a k e d",
        "a n a k e d man",
        "n.a.k.e.d",
        "n-a-k-e-d",
        "na-ked",
        "na*ked",
        "n_a_k_e_d",
        "naked's",
        "a naked",
        "naked\u3002",
        "na\u3164ked",
    ],
)
def test_a_term_is_found_however_it_is_written(text):
    assert found(text, "naked")


@pytest.mark.parametrize(
    "text, term",
    [
        ("Essex, Sussex and Middlesex", "sex"),
        ("E s s e x", "sex"),
        ("Scunthorpe", "cunt"),
        ("a class of assassins passes", "ass"),
        ("cocktails and peacocks", "cock"),
        ("a grape, draped", "rape"),
        ("therapist", "rapist"),
        ("Dickens writes", "dick"),
        ("analysis of data", "anal"),
        ("a 4k drone shot in 1080p", "aka"),
        ("naked-mole", "akedm"),
        ("I a m not there", "man"),
        ("and/or", "dor"),
        ("snaked through", "naked"),
        ("na ked", "naked"),
    ],
)
def test_parts_of_other_words_are_not(text, term):
    assert not found(text, term)


def test_terms_of_several_words():
    assert found("Then SPIDER-MAN swings", "spider man") == ["SPIDER-MAN"]
    assert found("spiderman and spider   man", "spider-man") == ["spiderman", "spider   man"]
    assert not found("a spider and a man", "spider man")
    assert found("a m1ckey mouse", "mickey mouse") == ["m1ckey mouse"]


def test_a_star_stands_for_any_ending_and_others_for_the_plural():
    assert found("pornographic porn p0rno", "porn*") == ["pornographic", "porn", "p0rno"]
    assert found("bombs bomb bombing bomber", "bomb") == ["bombs", "bomb"]


def test_ideographs_are_words_of_their_own():
    assert found("一个裸体的人", "裸体") == ["裸体"]


def test_the_place_is_that_in_the_text_as_it_was_written():
    assert found("ﬁne Ｅｌｏｎ\u200b Ｍｕｓｋ!", "elon musk") == ["Ｅｌｏｎ\u200b Ｍｕｓｋ"]
    assert found("Straße der naked Füße", "naked") == ["naked"]
    assert found("Beyonce\u0301\u200b sings", "beyonce") == ["Beyonce\u0301\u200b"]
    assert found("\u200bﬁﬁ a", "fifi") == ["ﬁﬁ"]


@pytest.mark.parametrize(
    "term, fact", [("", "letter"), ("!!", "letter"), ("a*b", "inside"), ("ab*", "short")]
)
def test_terms_that_no_word_could_be(term, fact):
    with refuses(BadTerm, fact):
        Terms().add(term, "a")


def test_terms_near_each_other():
    tree = Terms()
    tree.add("child", "minor")
    tree.add("naked", "bare")
    for between, is_near in ((0, True), (3, True), (4, False)):
        for pair in (("child", "naked"), ("naked", "child")):
            text = " ".join([pair[0], *["word"] * between, pair[1]])
            assert bool(near(tree.find(read(text)), ("minor", "bare"), 4)) == is_near
    far_and_near = "child " + "word " * 50 + "child naked"
    assert near(tree.find(read(far_and_near)), ("minor", "bare"), 4)
    assert not near(tree.find(read("naked naked naked")), ("minor", "bare"), 4)


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_can_be_read_and_a_word_in_it_is_found(before, after):
    text = f"{before} quixotic {after}"
    reading = read(text)
    assert all(0 <= word.begin < word.end <= len(text) for word in reading.words)
    # A mark at its end would be of the letter before; all other letters leave the word as it is.
    if not (after and unicodedata.combining(after[0])):
        assert "quixotic" in found(text, "quixotic")


@pytest.fixture(scope="module")
def shipped_rules() -> Rules:
    return Rules(read_policy(SHIPPED), SHIPPED)


HARD = [
    "naked ",
    "a ",
    "x",
    "n.a.k.e.d.",
    "4",
    "child ",
    "a b c ",
    "donald ",
    "\u0301",
    "a@",
    "aaa ",
    "(",
    "ﷺ",
    "\U0001d4f7",
    "é",
]


@pytest.mark.parametrize("piece", HARD)
def test_the_time_grows_with_the_text_alone(piece, shipped_rules):
    """No piece repeated to 10,000 characters takes long, and twice the text takes no more than about twice the time."""

    def seconds(length: int) -> float:
        text, best = (piece * length)[:length], 1e9
        for _ in range(3):
            began = time.process_time()
            shipped_rules.apply([text])
            best = min(best, time.process_time() - began)
        return best

    long = seconds(10_000)
    assert long < 0.5
    assert seconds(20_000) < 4 * long + 0.02

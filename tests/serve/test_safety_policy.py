"""The policy: which prompts are blocked and rewritten, what is kept of it, and what is wrong with a policy file."""

import json
import logging
from pathlib import Path

import pytest

from sora_train.errors import UserError
from sora_train.serving.safety.decision import Entry
from sora_train.serving.safety.policy import Policy
from tests.sentences import refuses


class Kept:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def record(self, entry: Entry) -> None:
        self.entries.append(entry)


@pytest.fixture(scope="module")
def shipped() -> Policy:
    return Policy.default()


SMALL = """
categories:
  bare: {action: block, says: bare skin, terms: [naked, "@loud"], patterns: [{near: [who, what], within: 3}]}
  names: {action: rewrite, says: people, becomes: a stranger, terms: {"@people": null, acme: an unknown maker}}
  seen: {action: log, says: things, terms: [thing]}
lists: {who: [child], what: [gun], people: [jo doe, jo], loud: [shout]}
allow: [naked eye, thing of beauty]
"""


def small(tmp_path: Path, text: str = SMALL, **options) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return Policy.read(path, **options)


# --- prompts ---


def test_what_is_blocked_says_why_and_not_by_which_word(tmp_path):
    decision = small(tmp_path).judge_prompt("Two NAKED men")
    assert not decision.allowed and decision.category == "bare"
    assert decision.rules == ("bare: naked",) and decision.prompt == "Two NAKED men"
    assert "bare skin" in decision.reason and "naked" not in decision.reason.lower()


def test_lists_and_patterns_are_rules_too(tmp_path):
    policy = small(tmp_path)
    assert policy.judge_prompt("they shout").rules == ("bare: shout",)
    assert policy.judge_prompt("a gun beside a child").rules == ("bare: child near gun",)
    assert policy.judge_prompt("a child and on the other side a gun").allowed


def test_what_is_allowed_hides_its_terms_and_no_others(tmp_path):
    policy = small(tmp_path)
    assert policy.judge_prompt("seen with the naked eye").allowed
    assert not policy.judge_prompt("seen naked with the naked eye").allowed


def test_terms_are_rewritten_where_they_stand(tmp_path):
    policy = small(tmp_path)
    for text, becomes in {
        "Jo Doe eats": "A stranger eats",
        "then Jo's hat": "then a stranger's hat",
        "an Acme rocket": "an unknown maker rocket",
        "A JO DOE and the Acme": "A stranger and the unknown maker",
        "JO DOE, jo doe; Ｊｏ Ｄｏｅ!": "A stranger, a stranger; a stranger!",
        "n\u200bo change": "n\u200bo change",
    }.items():
        decision = policy.judge_prompt(text)
        assert decision.allowed and decision.prompt == becomes
        assert policy.judge_prompt(becomes).prompt == becomes
    assert policy.judge_prompt("Jo Doe").category == "names"


def test_all_texts_of_a_video_are_judged_together(tmp_path):
    policy = small(tmp_path)
    decision = policy.judge_prompt("Jo walks", "", "the Acme falls")
    assert decision.prompts == ("A stranger walks", "", "the unknown maker falls")
    assert decision.prompt == "A stranger walks"
    assert not policy.judge_prompt("a hall", "she is naked").allowed
    assert policy.judge_prompt("Jo\n\n\n\nthen\n\n\nJo", "", "Acme").prompts == (
        "A stranger\n\n\n\nthen\n\n\na stranger", "", "An unknown maker"
    )  # fmt: skip
    assert policy.judge_prompt("the naked", "eye").category == "bare"
    assert policy.judge_prompt("the", "Jo Doe").prompts == ("the", "A stranger")
    assert not policy.judge_prompt("there is a child", "a gun").allowed
    assert policy.judge_prompt().allowed


def test_blocking_goes_before_rewriting_and_all_rules_are_told(tmp_path):
    decision = small(tmp_path).judge_prompt("Jo Doe is naked with a thing")
    assert not decision.allowed
    assert decision.rules == ("bare: naked", "names: jo doe", "names: jo", "seen: thing")


def test_decisions_are_kept_with_their_reasons_and_without_the_prompt(tmp_path):
    kept = Kept()
    policy = small(tmp_path, audit=kept)
    for text in ("a hall", "Jo", "one thing", "naked"):
        policy.judge_prompt(text, subject="key_1")
    assert [entry.action for entry in kept.entries] == ["allow", "rewrite", "log", "block"]
    assert {entry.stage for entry in kept.entries} == {"prompt"}
    last = kept.entries[-1]
    assert last.category == "bare" and last.reason and last.rules == ("bare: naked",)
    assert last.subject == "key_1" and last.text == "" and len(last.digest) == 64
    assert len({entry.digest for entry in kept.entries}) == 4
    policy.judge_prompt("naked")
    assert kept.entries[-1].digest == last.digest


def test_the_prompt_is_kept_where_the_policy_says_so(tmp_path):
    kept = Kept()
    small(tmp_path, SMALL + "keep_prompts: true\n", audit=kept).judge_prompt("naked", "more")
    assert kept.entries[0].text == "naked\nmore"


def test_without_a_log_of_its_own_decisions_go_to_the_programs_log(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sora_train.serving.safety"):
        policy = small(tmp_path)
        policy.judge_prompt("a hall")
        policy.judge_prompt("naked\nforged line", subject="key_1")
    (line,) = caplog.messages
    facts = json.loads(line.removeprefix("decision "))
    assert facts["action"] == "block" and facts["subject"] == "key_1" and "naked\n" not in line


# --- the file ---


@pytest.mark.parametrize(
    "change, facts",
    [
        (("action: block", "action: blok"), ["categories.bare.action", "blok", "block"]),
        (("action: block, ", ""), ["categories.bare.action", "no value"]),
        (("says: bare skin, ", ""), ["categories.bare.says", "no value"]),
        (("terms: [naked", "term: [naked"), ["categories.bare.term", "terms"]),
        (("terms: [naked", "terms: [1488"), ["categories.bare.terms", "1488"]),
        (("terms: [naked", 'terms: ["!!"'), ["categories.bare.terms", "'!!'", "leave it out"]),
        (("terms: [naked", 'terms: ["a*b"'), ["categories.bare.terms", "'a*b'", "end"]),
        (("@loud", "@laud"), ["categories.bare.terms", "'laud'", "loud"]),
        (("near: [who, what]", "near: [who, whom]"), ["patterns[0].near", "'whom'"]),
        (("near: [who, what]", "near: [who]"), ["patterns", "near"]),
        (("near: [who, what]", "near: [who, who]"), ["patterns[0].near", "twice"]),
        (("within: 3", "within: 0"), ["within", "0"]),
        (("becomes: a stranger, ", ""), ["categories.names.terms", "@people", "becomes"]),
        (("a stranger", "a naked stranger"), ["categories.names.terms", "naked", "choose"]),
        (("a stranger", "uncle jo"), ["categories.names.terms", "names: jo", "choose"]),
        (("allow: [naked eye", 'allow: ["?"'), ["allow[0]", "leave it out"]),
        (("who: [child]", "who: child"), ["lists.who", "child"]),
        (("[thing]", "[]"), ["categories.seen", "neither"]),
        (("lists:", "list:"), ["list", "lists"]),
        (("allow: [", "allow: [["), ["line"]),
        (
            ("action: log, says: things", "action: log, action: log, says: things"),
            ["line 5", "twice"],
        ),
        (("\ncategories:", "\ncategories: {}\nold:"), ["old"]),
        (("\ncategories:", "\nmoderation: {seconds: 0}\ncategories:"), ["moderation.seconds", "0"]),
        (("\ncategories:", "\nuploads: {faces: no}\ncategories:"), ["uploads.faces", "block"]),
        (("\ncategories:", "\noutputs: {nsfw: 70}\ncategories:"), ["outputs.nsfw", "70"]),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_in_a_sentence(tmp_path, change, facts):
    assert SMALL.count(change[0]) == 1
    with refuses(UserError, "policy.yaml", *facts):
        small(tmp_path, SMALL.replace(*change))


def test_files_that_are_none(tmp_path):
    with refuses(UserError, "there is no file", "none.yaml"):
        Policy.read(tmp_path / "none.yaml")
    with refuses(UserError, "policy.yaml", "categories"):
        small(tmp_path, "")
    with refuses(UserError, "policy.yaml", "list"):
        small(tmp_path, "- a\n")
    with refuses(UserError, "SORA_NO_SUCH_KEY"):
        small(
            tmp_path, moderation_url="http://127.0.0.1:9/v1", moderation_key_env="SORA_NO_SUCH_KEY"
        )


# --- the policy that comes with the package ---


def test_innocent_words_pass_the_shipped_policy(shipped):
    for text in (
        "Essex and Scunthorpe",
        "a cocktail party",
        "the naked eye",
        "a trumpet",
        "black panther in a tree",
    ):
        decision = shipped.judge_prompt(text)
        assert decision.allowed and decision.prompt == text and not decision.rules


@pytest.mark.parametrize(
    "text, category",
    [
        ("n.a.k.e.d", "sexual"),
        ("a nude child", "minors"),
        ("dismembered corpse", "violence"),
        ("lolicon", "minors"),
    ],
)
def test_the_shipped_policy_blocks(shipped, text, category):
    decision = shipped.judge_prompt(text)
    assert not decision.allowed and decision.category == category


def test_public_figures_are_rewritten_and_never_undressed(shipped):
    decision = shipped.judge_prompt("Taylor Swift sings, a picture by Banksy")
    assert (
        decision.allowed
        and decision.prompt == "A fictional adult sings, a picture by an unknown stencil artist"
    )
    blocked = shipped.judge_prompt("Taylor Swift in lingerie")
    assert not blocked.allowed and blocked.category == "real_people_harm"

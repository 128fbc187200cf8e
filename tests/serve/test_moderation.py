"""The moderation endpoint: what it finds blocks, and what it does wrong ends as the policy says, in its time."""

import itertools
import json
import time
from pathlib import Path

import pytest

from sora_train.serving.safety.policy import Policy
from tests.sentences import says
from tests.serve.rude_server import answer, rude_server, silent, slowly

RULES = """
categories:
  bare: {action: block, says: bare skin, terms: [naked]}
  names: {action: rewrite, says: people, terms: {jo: a stranger}}
moderation: {seconds: 1, tries: 2, when_unreachable: UNREACHABLE, thresholds: {violence: 0.2}}
"""


def policy(tmp_path: Path, url: str, unreachable: str = "block", key_env: str = "") -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(RULES.replace("UNREACHABLE", unreachable))
    return Policy.read(path, moderation_url=f"{url}/v1", moderation_key_env=key_env)


def result(*names: str, **scores: float) -> dict:
    """As https://platform.openai.com/docs/api-reference/moderations/object shows it."""
    every = ("sexual", "violence", "hate", "self-harm")
    return {
        "flagged": bool(names),
        "categories": {name: name in names for name in every},
        "category_scores": {name: float(name in names) for name in every} | scores,
    }


def moderated(*results: dict) -> bytes:
    body = {"id": "modr-1", "model": "omni-moderation-latest", "results": list(results)}
    return answer(json.dumps(body).encode(), Content_Type="application/json")


def test_what_it_flags_is_blocked_and_named(tmp_path):
    with rude_server(lambda head: [moderated(result("violence"), result("sexual"))]) as server:
        decision = policy(tmp_path, server.url).judge_prompt("a", "b")
    assert not decision.allowed and decision.category == "moderation"
    assert decision.rules == ("moderation: violence", "moderation: sexual")
    says(decision.reason, "violence", "sexual")


def test_what_it_does_not_flag_passes(tmp_path):
    with rude_server(lambda head: [moderated(result())]) as server:
        decision = policy(tmp_path, server.url).judge_prompt("Jo walks")
    assert decision.allowed and decision.prompt == "A stranger walks"


@pytest.mark.parametrize("score, allowed", [(0.19, True), (0.2, False)])
def test_thresholds_are_stricter_than_its_own_verdict(tmp_path, score, allowed):
    with rude_server(lambda head: [moderated(result(violence=score))]) as server:
        decision = policy(tmp_path, server.url).judge_prompt("a")
    assert decision.allowed == allowed


def test_it_is_asked_with_the_key_about_what_the_rules_let_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("OUR_MODERATION_KEY", "sk-1")
    with rude_server(lambda head: [moderated(result())]) as server:
        judge = policy(tmp_path, server.url, key_env="OUR_MODERATION_KEY").judge_prompt
        assert not judge("naked").allowed
        assert server.asked == []
        judge("Jo walks", "", " ")
        head = server.asked[0].decode()
    assert head.startswith("POST /v1/moderations HTTP/1.1\r\n") and "Bearer sk-1" in head
    assert "Jo walks" not in head and "a stranger walks" in head.lower()


RUDE = {
    "nothing": lambda head: silent(3),
    "a closed connection": lambda head: [],
    "500": lambda head: [answer(b"oops", "500 Internal Server Error")],
    "429": lambda head: [answer(b"slow down", "429 Too Many Requests")],
    "401": lambda head: [answer(b"no", "401 Unauthorized")],
    "404": lambda head: [answer(b"no", "404 Not Found")],
    "400": lambda head: [answer(b"no", "400 Bad Request")],
    "no HTTP": lambda head: [b"SSH-2.0-OpenSSH_9.2\r\n"],
    "no JSON": lambda head: [answer(b"<html>")],
    "another JSON": lambda head: [answer(b"[1, 2]")],
    "null": lambda head: [answer(b"null")],
    "no results": lambda head: [answer(b'{"results": []}')],
    "results of another number of texts": lambda head: [moderated(result(), result())],
    "a flag that is none": lambda head: [answer(b'{"results": [{"flagged": "no"}]}')],
    "scores that are none": lambda head: [
        answer(b'{"results": [{"flagged": false, "category_scores": {"violence": "high"}}]}')
    ],
    "nested JSON": lambda head: [answer(b"[" * 100_000)],
    "half of it": lambda head: [answer(b'{"results"', content_length="400")],
    "a slow head": lambda head: slowly(moderated(result())),
    "a slow body": lambda head: [b"HTTP/1.1 200 OK\r\n\r\n", *slowly(bytes(99))],
    "headers without end": lambda head: itertools.chain(
        [b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"a: b\r\n")
    ),
    "a body without end": lambda head: itertools.chain(
        [b"HTTP/1.1 200 OK\r\n\r\n"], itertools.repeat(bytes(1 << 16))
    ),
}


@pytest.mark.parametrize("unreachable", ["block", "allow"])
@pytest.mark.parametrize("rude", RUDE)
def test_whatever_it_does_wrong_ends_as_the_policy_says(tmp_path, caplog, rude, unreachable):
    drip = 0.1 if rude in ("a slow head", "a slow body", "headers without end") else 0.0
    began = time.monotonic()
    with rude_server(RUDE[rude], drip=drip) as server:
        decision = policy(tmp_path, server.url, unreachable).judge_prompt("Jo walks")
    assert time.monotonic() - began < 2 * (1 + 1) + 1
    assert decision.allowed == (unreachable == "allow")
    assert any(rule.startswith("moderation: unreachable") for rule in decision.rules)
    says(caplog.text, "moderation", server.url.removeprefix("http://"), unreachable)
    if not decision.allowed:
        says(decision.reason, "does not answer")
        assert "127.0.0.1" not in decision.reason


def test_what_another_try_may_mend_is_tried_again_and_what_it_cannot_is_not(tmp_path):
    answers = itertools.chain([answer(b"", "503 Busy")], itertools.repeat(moderated(result())))
    with rude_server(lambda head: [next(answers)]) as server:
        assert policy(tmp_path, server.url).judge_prompt("a").allowed
        assert len(server.asked) == 2
    with rude_server(lambda head: [answer(b"", "401 Unauthorized")]) as server:
        assert not policy(tmp_path, server.url).judge_prompt("a").allowed
        assert len(server.asked) == 1

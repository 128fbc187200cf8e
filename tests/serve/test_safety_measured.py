"""The shipped policy on labelled prompts, the table of the docs, and `sora serve policy check`."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sora_train.cli import run
from sora_train.errors import UserError
from sora_train.serving.safety.measure import Labelled, Row, measure, read_labelled
from sora_train.serving.safety.policy import Policy
from sora_train.tools.serve.policy import policy_app
from tests.sentences import refuses, says

PROMPTS = Path(__file__).with_name("prompts")
DOCS = Path(__file__).parents[2] / "docs" / "serve.md"


@pytest.fixture(scope="module")
def shipped() -> Policy:
    return Policy.default()


def shares(rows: list[Row]) -> list[tuple[str, ...]]:
    return [
        (row.category, str(row.violating), str(row.benign))
        + tuple(
            f"{100 * share:.0f}" for share in (row.precision, row.recall, row.accuracy_at_input)
        )
        for row in rows
    ]


@pytest.mark.parametrize("part, heading", [("dev", "Dev"), ("held_out", "Held out")])
def test_the_docs_hold_what_is_measured(shipped, part, heading):
    table = DOCS.read_text(encoding="utf-8").split(f"**{heading}")[1].split("\n\n")[1]
    told = [tuple(re.findall(r"[\w.]+", line)) for line in table.splitlines()[2:]]
    assert told[:-1] == shares(measure(shipped, read_labelled(PROMPTS / f"{part}.yaml")))


def test_the_parts_have_no_prompt_in_common_and_enough_of_each_category():
    dev, held_out = (read_labelled(PROMPTS / f"{part}.yaml") for part in ("dev", "held_out"))
    assert list(dev) == list(held_out) and len(dev) == 10
    texts = [
        text
        for part in (dev, held_out)
        for one in part.values()
        for text in (*one.violating, *one.benign)
    ]
    assert len(texts) == len(set(texts)) > 400
    assert all(
        len(one.violating) >= 8 and len(one.benign) >= 8
        for part in (dev, held_out)
        for one in part.values()
    )


def test_precision_recall_and_accuracy_are_counted_as_they_are_defined(tmp_path):
    """By hand: four violating, of which `a` rules stop two and a `b` rule one; two benign, of which one is stopped."""
    (tmp_path / "policy.yaml").write_text(
        "categories:\n"
        "  a_more: {action: block, says: a, terms: [alpha]}\n"
        "  b: {action: rewrite, says: b, terms: {beta: word}}\n"
        "  c: {action: log, says: c, terms: [gamma]}\n"
    )
    policy = Policy.read(tmp_path / "policy.yaml")
    violating = ("an alpha", "alpha beta", "one beta", "gamma alone")
    rows = measure(policy, {"a": Labelled(violating=violating, benign=("alpha", "gamma", "none"))})
    (row,) = rows
    assert row.missed == ("gamma alone",) and row.mistaken == ("alpha",)
    assert row.precision == pytest.approx(2 / 3)
    assert row.recall == 2 / 4 and row.accuracy_at_input == 3 / 4


def test_the_command_says_what_becomes_of_prompts(tmp_path):
    said = CliRunner().invoke(
        policy_app,
        [
            "check",
            "--prompt",
            "Taylor Swift sings",
            "--prompt",
            "naked",
            "--prompts",
            str(PROMPTS / "dev.yaml"),
        ],
    )
    assert said.exit_code == 0
    says(
        said.output,
        "A fictional adult sings",
        "blocked (sexual)",
        "sexual: naked",
        "precision",
        "minors",
    )
    assert run(["serve", "policy", "check", "--prompt", "a hall"]) == 0
    told = CliRunner().invoke(
        policy_app, ["check", "--prompts", str(PROMPTS / "dev.yaml"), "--json", "-"]
    )
    assert len(json.loads(told.output)) == 10


def test_files_that_are_wrong_are_named(tmp_path):
    (tmp_path / "p.yaml").write_text("a: {violating: [], benign: []}\n")
    with refuses(UserError, "p.yaml", "a.violating"):
        read_labelled(tmp_path / "p.yaml")
    with refuses(UserError, "none.yaml"):
        CliRunner().invoke(
            policy_app, ["check", str(tmp_path / "none.yaml")], catch_exceptions=False
        )

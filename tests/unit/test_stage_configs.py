"""The configuration of a stage: nested values and their overrides as texts mean the same, and err in the same words."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sora_train.config import Config
from sora_train.config.job import compose_job
from sora_train.config.schema import flatten, keys, plain
from sora_train.config.yaml_files import find_configs, load_yaml
from sora_train.errors import ConfigError

CHAINED = ("name", "run", "init", "resume")
"""What the chain sets, each stage another."""
TEXTS = st.text("ab c,:/=[]{}()'\"\\_-.", max_size=8)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 10**6),
    "dry_run": st.booleans(),
    "train.steps": st.integers(1, 10**9),
    "optim.lr": st.floats(1e-12, 1.0),
    "optim.betas": st.lists(st.floats(0, 1), min_size=2, max_size=2),
    # Together with those of flow_tasks the shares stay below 1.
    "objective.conditioning.i2v": st.floats(0, 0.35),
    "objective.conditioning.loop": st.floats(0, 0.35),
    "data.captions": TEXTS,
    "data.micro_batch": st.one_of(st.integers(1, 9), st.just("auto")),
    "data.caption_weights": st.dictionaries(
        st.sampled_from(["caption", "a b", "1x2", "s.t"]), st.floats(0.1, 9), max_size=3
    ),
    "sample.prompts": st.lists(TEXTS, max_size=3),
    "tracker.kind": st.sampled_from(["none", ["wandb", "tensorboard"]]),
    "launch.env": st.dictionaries(st.sampled_from(["A", "B_2"]), TEXTS, max_size=2),
    "buckets.classes": st.just([{"name": "x", "pixels": 4096, "frames": [1, 5]}]),
}
GROUPS = {"buckets": ["tiny", "micro"], "objective": ["flow", "flow_tasks"], "optim": ["sgd"]}


def as_text(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, str):
        return QuotedString(value, Quote.double).with_quotes()
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, dict):
        pairs = [
            f"{key.replace(' ', chr(92) + ' ')}:{as_text(item)}" for key, item in value.items()
        ]
        return f"{{{','.join(pairs)}}}"
    return repr(value)


def as_overrides(stage: dict[str, Any]) -> list[str]:
    """`groups` and `config` of a stage as texts."""
    choices = [f"{group}={option}" for group, option in stage.get("groups", {}).items()]
    values = {name: value_at(stage.get("config", {}), name) for name in keys(Config)}
    return [
        *choices,
        *(f"{name}={as_text(value)}" for name, value in values.items() if value is not ABSENT),
    ]


ABSENT = object()


def value_at(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree.get(part, ABSENT) if isinstance(tree, dict) else ABSENT
    return tree


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return tree


def stages_of(folder: Path, *stages: dict[str, Any]) -> list[dict[str, Any]]:
    """What the stages compose to, without what the chain sets."""
    named = [{"name": f"s{number}", **stage} for number, stage in enumerate(stages)]
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"defaults": ["two_stages"], "stages": named}))
    configs = [plain(stage) for stage in compose_job([str(file)]).stages]
    return [{key: value for key, value in c.items() if key not in CHAINED} for c in configs]


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    groups=st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(options) for name, options in GROUPS.items()}
    ),
    values=st.fixed_dictionaries({}, optional=VALUES),
)
def test_nested_values_and_their_overrides_compose_to_the_same(
    tmp_path: Path, groups: dict[str, str], values: dict[str, Any]
) -> None:
    stage = {"groups": groups, "config": nested(values)}
    one, other = stages_of(tmp_path, stage, {"overrides": as_overrides(stage)})
    assert one == other
    leaves = flatten(one)
    for name, value in values.items():
        if not isinstance(value, dict):
            assert leaves[name] == value or name == "buckets.classes"


@pytest.mark.parametrize("name", ["two_stages", "wan_1_3b_curriculum", "wan_14b_curriculum"])
def test_shipped_stages_are_what_their_overrides_say(tmp_path: Path, name: str) -> None:
    written = load_yaml(find_configs() / "experiment" / f"{name}.yaml")["stages"]
    assert not any("overrides" in stage for stage in written)
    as_texts = [{"name": stage["name"], "overrides": as_overrides(stage)} for stage in written]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"defaults": [name], "stages": as_texts}))
    source = "data.source=shapes"
    shipped = compose_job([f"experiment={name}", source]).stages
    again = compose_job([str(file), source]).stages
    inherited = [{**plain(stage), "init": 0} for stage in shipped]
    assert inherited == [{**plain(stage), "init": 0} for stage in again]


@pytest.mark.parametrize(
    ("stage", "text", "words"),
    [
        ({"config": {"optim": {"lrr": 1}}}, "optim.lrr=1", ["optim.lrr", "optim.lr"]),
        ({"config": {"train": {"steps": "a"}}}, "train.steps=a", ["train.steps", "'a'"]),
        ({"config": {"run": {"dir": "x"}}}, "run.dir=x", ["run.dir", "leave it out"]),
        ({"config": {"init": {"run": "x"}}}, "init.run=x", ["init.run", "leave it out"]),
        ({"config": {"stages": []}}, "stages=[]", ["stages", "leave it out"]),
        ({"config": {"train": 3}}, "train=3", ["'train'", "steps", "3"]),
        (
            {"config": {"loss_health": {"draw": True}}},
            "loss_health.draw=true",
            ["loss_health.draw", "spike_detection.draw"],
        ),
        ({"groups": {"buckets": "48p"}}, "buckets=48p", ["buckets", "48p", "480p"]),
        ({"groups": {"bucket": "480p"}}, "bucket=480p", ["bucket", "buckets"]),
    ],
)
def test_a_mistake_is_told_in_the_same_words_with_its_stage(
    tmp_path: Path, stage: dict[str, Any], text: str, words: list[str]
) -> None:
    messages = []
    for form in (stage, {"overrides": [text]}):
        with pytest.raises(ConfigError) as caught:
            stages_of(tmp_path, {}, form)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert all(word in messages[0] for word in ["stage 's1'", *words])


def test_a_key_is_no_group_and_a_choice_is_no_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage 's0'.*'task'.*`config`"):
        stages_of(tmp_path, {"groups": {"task": "vae"}})
    with pytest.raises(ConfigError, match=r"stages\[0\].*480"):
        stages_of(tmp_path, {"groups": {"buckets": 480}})


def test_a_stage_wins_over_the_command_line_and_its_chain_over_the_stage(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    stages = [{"name": "a", "config": {"train": {"steps": 3}}}, {"name": "b", "weights": "live"}]
    file.write_text(yaml.safe_dump({"defaults": ["two_stages"], "stages": stages}))
    run = compose_job([str(file), "train.steps=9", 'name="it\'s"', 'run.dir="r \'1"'])
    first, second = run.stages
    assert (first.train.steps, second.train.steps) == (3, 9)
    assert (first.name, first.run.dir, first.stages) == ("it's: a", "r '1/stages/01-a", ())
    assert (second.init.run, second.init.weights) == (first.run.dir, "live")

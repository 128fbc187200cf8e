"""Composition: what wins over what, where values come from, and what a person is told about mistakes."""

from pathlib import Path
from typing import Annotated

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import Field
from sentences import refuses, says

from sora_train.config import Config, Section
from sora_train.config.compose import COMMAND_LINE, DEFAULT, compose
from sora_train.config.explain import diff, explain, show
from sora_train.config.messages import validated
from sora_train.config.overrides import parse_settings, split_yaml_file
from sora_train.config.renamed import with_new_names
from sora_train.config.schema import default_tree, flatten, keys, plain
from sora_train.config.yaml_files import find_configs, load_yaml
from sora_train.errors import ConfigError


def message(*overrides: str, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, **options)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- values ---


def test_command_line_beats_experiment_beats_group_beats_default():
    composed = compose(["experiment=quickstart", "train.steps=7"])
    assert composed.config.train.steps == 7
    assert composed.config.optim.lr == 2e-3
    assert composed.sources["train.steps"] == COMMAND_LINE
    assert composed.sources["optim.lr"] == "configs/experiment/quickstart.yaml"
    assert composed.sources["model.num_layers"] == "configs/model/tiny_t2v.yaml"
    assert composed.sources["train.log_every"] == DEFAULT


def test_a_group_on_the_command_line_beats_the_experiments_choice():
    composed = compose(["experiment=quickstart", "model=micro"])
    assert composed.config.model.num_layers == 2
    assert composed.sources["model.num_layers"] == "configs/model/micro.yaml"


def test_every_leaf_has_a_source():
    composed = compose(["experiment=parity_tiny"])
    assert set(composed.sources) == set(flatten(plain(composed.config)))


def test_any_key_can_be_set_without_plus():
    settable = {name: key for name, key in keys(Config).items() if "[]" not in name}
    for name in ("buckets.classes", "vae.arch", "vae.path", "data.source", "text.max_length"):
        settable.pop(name)
    overrides = []
    for name, key in settable.items():
        value = plain(key.default)
        overrides.append(f"{name}={_grammar(value)}")
    composed = compose(overrides)
    for name, key in settable.items():
        assert _at(composed.config, name) == key.default, name
        assert composed.sources[name] == COMMAND_LINE


def _grammar(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("'", '"')


def _at(config: Section, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-8, 1.0),
    text=st.text("ab c,:/=[]{}()_-.", max_size=12),
)
def test_quoted_values_arrive_unchanged(steps: int, lr: float, text: str):
    config = compose([f"train.steps={steps}", f"optim.lr={lr!r}", f'name="{text}"']).config
    assert (config.train.steps, config.optim.lr, config.name) == (steps, lr, text)


def test_list_elements_and_mapping_entries_can_be_set():
    composed = compose(
        [
            "buckets.classes.0.pixels=1024",
            "vae=micro",
            "vae.arch.z_dim=8",
            "vae.arch.is_residual=true",
        ]
    )
    assert composed.config.buckets.classes[0].pixels == 1024
    assert (
        composed.config.vae.arch["z_dim"] == 8 and composed.config.vae.arch["is_residual"] is True
    )
    assert composed.sources["buckets.classes"] == COMMAND_LINE
    assert composed.sources["vae.arch.z_dim"] == COMMAND_LINE
    assert composed.sources["vae.arch.base_dim"] == "configs/vae/micro.yaml"


def test_interpolations_are_resolved():
    assert compose(["name=x", "run.dir=runs/${name}"]).config.run.dir == "runs/x"


def test_the_default_tree_is_the_default_config():
    assert Config.model_validate(default_tree(Config)) == Config()


def test_a_config_survives_its_file(tmp_path: Path):
    config = compose(["experiment=parity_tiny"]).config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert validated(Config, load_yaml(tmp_path / "config.yaml")) == config


# --- a user's own files ---


def test_a_file_anywhere_inherits_an_experiment(tmp_path: Path):
    file = write(
        tmp_path / "my run.yaml",
        "defaults: [real_tiny, override /model: micro]\nname: mine\ndata: {source: clips}\ntrain: {steps: 5}\n",
    )
    composed = compose(["train.steps=6"], yaml_file=file)
    config = composed.config
    assert (config.name, config.data.source, config.train.steps) == ("mine", "clips", 6)
    assert config.model.num_layers == 2
    assert config.data.max_drop_fraction == 0.2
    assert composed.sources["name"] == str(file)
    assert composed.sources["data.max_drop_fraction"] == "configs/experiment/real_tiny.yaml"


def test_a_file_without_defaults_starts_from_the_plain_config(tmp_path: Path):
    composed = compose([], yaml_file=write(tmp_path / "a.yaml", "seed: 3\n"))
    assert composed.config.seed == 3 and composed.config.name == "default"


def test_config_dir_adds_options_and_goes_before_the_shipped(tmp_path: Path):
    write(tmp_path / "model/huge.yaml", "num_layers: 99\n")
    write(tmp_path / "model/micro.yaml", "num_layers: 98\n")
    write(
        tmp_path / "experiment/own.yaml",
        "# @package _global_\ndefaults: [override /model: huge]\nname: own\n",
    )
    composed = compose(["experiment=own"], config_dir=tmp_path)
    assert composed.config.model.num_layers == 99
    assert composed.sources["model.num_layers"] == str(tmp_path / "model/huge.yaml")
    assert compose(["model=micro"], config_dir=tmp_path).config.model.num_layers == 98


class OwnSection(Section):
    weight: float = Field(2.0, ge=0)
    """How much of it."""


class OwnConfig(Config):
    own: OwnSection = OwnSection()
    must: Annotated[int, Field(ge=1)]
    """A key without a default."""


def test_a_subclass_adds_sections_and_required_keys():
    config = compose(["own.weight=3", "must=1"], config_cls=OwnConfig).config
    assert (config.own.weight, config.must) == (3, 1)
    says(message(config_cls=OwnConfig), "must", "no value", "must=...")
    says(message("own.weight=-1", "must=1", config_cls=OwnConfig), "0", "-1")


# --- mistakes ---


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("train.step=3", ("train.step", "train.steps")),
        ("lr=3", ("lr", "optim.lr")),
        (
            "optim.leaning_rate=3",
            ("optim.leaning_rate", "sora config show"),
        ),
        ("expriment=quickstart", ("expriment", "experiment")),
        ("+data.surce=x", ("data.surce", "data.source")),
        (
            "modle.num_layers=2",
            ("modle.num_layers", "model.num_layers"),
        ),
        (
            "model=tinyt2v",
            (
                "'model'",
                "tinyt2v",
                "tiny_t2v",
                "30b, b, l, micro, s, tiny, tiny_t2v, wan_14b, wan_1_3b, wan_5b, wan_flf2v_14b, "
                "wan_i2v_14b, wan_i2v_a14b, wan_t2v_a14b, xl",
            ),
        ),
        (
            "tracker=null",
            ("tracker", "null", "both, none, tensorboard, wandb"),
        ),
        ("train.steps=a", ("train.steps", "whole number", "at least 0", "'a'")),
        (
            "train.steps=0",
            ("train.steps=0", "train.epochs=0", "set", "train.steps=1000"),
        ),
        (
            "train.steps=1.5",
            ("train.steps", "whole number", "at least 0", "1.5"),
        ),
        (
            "objective.caption_dropout=2",
            ("objective.caption_dropout", "0 to 1", "2"),
        ),
        (
            "data.cache=latent",
            ("data.cache", "'none', 'latents', 'auto'", "'latent'"),
        ),
        (
            "data.micro_batch=x",
            ("data.micro_batch", "at least 1", "'auto', 'table'", "'x'"),
        ),
        (
            "data.micro_batch=0",
            ("data.micro_batch", "at least 1", "'auto', 'table'", "0"),
        ),
        ("run.dir=123", ("run.dir", "text", "123", "quote", 'run.dir="123"')),
        (
            "sample.prompts=hello",
            ("sample.prompts", "list", "'hello'"),
        ),
        (
            "train=3",
            ("'train'", "steps, epochs, micro_batches, log_every", "3"),
        ),
        ("run.dir=a(b", ("run.dir=a(b", "quote", 'run.dir="a(b"')),
        ("steps", ("'steps'", "key=value", "train.steps=100")),
        (
            "hydra.run.dir=x",
            ("hydra.run.dir=x", "leave it out"),
        ),
        ("validation.times=[2]", ("validation.times", "between 0 and 1", "[2.0]")),
        (
            "train.steps=1,2",
            ("train.steps=1,2", "-m", "key=[a,b]"),
        ),
        (
            "buckets.classes=[{name: a, pixles: 300, pixels: 300, frames: [1]}]",
            ("buckets.classes[0].pixles", "buckets.classes[].pixels"),
        ),
        (
            "buckets.classes=[{name: a, pixels: 3, frames: [1]}]",
            ("buckets.classes[0].pixels", "at least 64", "3"),
        ),
    ],
)
def test_one_sentence_names_key_value_and_remedy(override: str, facts: tuple[str, ...]):
    says(message(override), *facts)


def test_all_mistakes_are_told_at_once():
    assert message("train.step=1", "model=x").count("\n") == 1
    assert message("train.steps=0", "optim.lr=-1").count("\n") == 1


def test_a_broken_interpolation_is_told():
    assert "nothing_here" in message("run.dir=${nothing_here}")


def test_a_fault_in_a_file_names_the_file(tmp_path: Path):
    unknown = write(tmp_path / "a.yaml", "train: {step: 3}\n")
    says(message(yaml_file=unknown), "'train.step'", "'train.steps'", str(unknown))
    value = write(tmp_path / "b.yaml", "train: {steps: many}\n")
    assert message(yaml_file=value).endswith(f"got 'many' ({value})")
    base = write(tmp_path / "c.yaml", "defaults: [real_tyni]\n")
    says(message(yaml_file=base), "experiment/real_tyni", "real_tiny")
    broken = write(tmp_path / "d.yaml", "a: 1\nb: [\n")
    assert message(yaml_file=broken).startswith(f"{broken} line ")
    says(message(yaml_file=tmp_path / "e.yaml"), "no file", str(tmp_path / "e.yaml"))
    says(message(yaml_file=write(tmp_path / "f.yaml", "- 1\n")), "key: value")
    assert "both given" in message("experiment=quickstart", yaml_file=unknown)
    wrong = write(tmp_path / "g.yaml", "defaults: [override /modle: s]\n")
    assert "modle" in message(yaml_file=wrong)
    assert "is not a folder" in message(config_dir=tmp_path / "none")


def test_loading_a_file_refuses_a_key_given_twice(tmp_path: Path):
    with pytest.raises(ConfigError, match="line 2"):
        load_yaml(write(tmp_path / "a.yaml", "a: 1\na: 2\n"))


@pytest.mark.parametrize("path", sorted(find_configs().rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_read_as_hydra_reads_them(path: Path):
    assert load_yaml(path) == OmegaConf.to_container(OmegaConf.load(path))


SCALARS = """
1e-4 1E5 -1e3 +2e+3 1.e3 1.5e4 1.5e+4 .5 .5e3 .5e+3 5. 1_000 1_0e1 0x1F 0o17 017 .inf -.INF .nan inf nan true Yes off
null ~ 2024-01-01 12:30 1:30.5 1e 1e5x e5 "1e-4" 'off' 1.2.3 ${name} a=b 256px_1e3
"""


@pytest.mark.parametrize("scalar", SCALARS.split())
def test_a_scalar_is_read_as_hydra_reads_it(tmp_path: Path, scalar: str):
    path = write(tmp_path / "a.yaml", f"a: {scalar}\n")
    ours, hydras = load_yaml(path), OmegaConf.to_container(OmegaConf.load(path))
    assert repr(ours) == repr(hydras)


def test_settings_of_a_command_are_strict():
    assert parse_settings(OwnSection, ["weight=3"]).weight == 3
    with refuses(ConfigError, "weight"):
        parse_settings(OwnSection, ["wieght=3"])
    with pytest.raises(ConfigError, match="must be a number"):
        parse_settings(OwnSection, ["weight=x"])


def test_a_yaml_file_is_told_from_overrides():
    assert split_yaml_file(["a.yaml", "x=b.yaml"]) == (Path("a.yaml"), ["x=b.yaml"])
    with pytest.raises(ConfigError, match="one YAML file"):
        split_yaml_file(["a.yaml", "b.yml"])


# --- keys that had another name ---


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loss_health.draw=false", "spike_detection.draw"),
        ("objective.i2v_fraction=0.5", "objective.conditioning.i2v"),
    ],
)
def test_an_old_key_is_refused_with_the_new_one(tmp_path: Path, old: str, new: str):
    key, value = old.split("=")
    for text in (message(old), message("+" + old)):
        assert f"'{key}'" in text and f"'{new}'" in text
    section, name = key.split(".")
    file = write(tmp_path / "a.yaml", f"{section}: {{{name}: {value}}}\n")
    text = message(yaml_file=file)
    assert section in text and new.split(".")[0] in text and str(file) in text


def test_what_an_earlier_version_wrote_is_read_under_new_names():
    tree = plain(compose(["experiment=parity_tiny", "spike_detection.window=7"]).config)
    written = {**tree, "loss_health": tree["spike_detection"]}
    del written["spike_detection"]
    conditioning = {**tree["objective"]["conditioning"], "i2v": 0.0}
    alias_set = {**tree["objective"], "i2v_fraction": 0.25, "conditioning": conditioning}
    alias_unset = {**tree["objective"], "i2v_fraction": 0.0}
    before_the_section = {**tree["objective"], "i2v_fraction": 0.25}
    del before_the_section["conditioning"]
    for objective in (alias_set, alias_unset):
        assert with_new_names({**written, "objective": objective}) == tree
    oldest = with_new_names({**written, "objective": before_the_section})
    assert oldest["objective"]["conditioning"] == {"i2v": 0.25}
    assert with_new_names(tree) == tree


# --- show, diff, explain ---


def test_show_is_yaml_of_the_config_with_origins():
    composed = compose(["experiment=quickstart", "train.steps=7"])
    text = show(composed)
    assert yaml.safe_load(text) == plain(composed.config)
    line = next(line for line in text.splitlines() if line.strip().startswith("steps: 7"))
    assert line.endswith("# command line")


def test_diff_names_exactly_the_keys_that_differ(tmp_path: Path):
    for name, extra in (("a", []), ("b", ["optim.lr=0.5", "seed=9"])):
        config = compose(["experiment=parity_tiny", *extra]).config
        write(tmp_path / name / "config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
    rows = diff(str(tmp_path / "a"), str(tmp_path / "b")).splitlines()
    assert {row.split()[0] for row in rows[1:]} == {"optim.lr", "seed"}
    assert "are the same" in diff(str(tmp_path / "a"), "experiment=parity_tiny")


def test_explain_tells_meaning_type_default_value_and_origin():
    composed = compose(["experiment=quickstart"])
    text = explain("data.cache", composed)
    for part in (
        "encode every clip once",
        "one of 'none', 'latents'",
        "default  none",
        "latents  (configs/exp",
    ):
        assert part in text
    assert "tiny_t2v" in explain("model", composed)
    with refuses(ConfigError, "data.cache"):
        explain("data.cahce", composed)

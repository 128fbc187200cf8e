"""Every shipped config composes and validates, says what it is, and the reference in docs/ is up to date."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from sentences import refuses

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.config.job import compose_job
from sora_train.config.reference import reference
from sora_train.config.schema import keys
from sora_train.config.yaml_files import find_configs
from sora_train.data.tape.buckets import build_buckets
from sora_train.data.tape.tape import Tape, row_costs
from sora_train.errors import ConfigError
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.time.encoders import geometry_of
from sora_train.tools.plan.time.work import stage_work
from sora_train.training.pipeline.plan import cost_model

CONFIGS = find_configs()
REPO = CONFIGS.parent
GROUP_FILES = [path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "sweep"]  # W&B's
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in GROUP_FILES if path.parent.name != "experiment"
)
# A VAE with stored weights and one with sizes exclude each other; all else combines freely.
NEEDED = {"data=clips": ["data.source=my_clips"]}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes(name: str):
    extra = ["data.source=my_clips"] if name == "real_tiny" or name.startswith("wan_") else []
    config = compose([f"experiment={name}", *extra]).config
    assert config.name == name
    assert config.run.dir == f"runs/{name}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "wan_14b_curriculum" else [])
        for name in EXPERIMENTS
        if name.startswith("wan_")
    ],
)
def test_steps_train_images_and_videos_together_and_wait_less_than_two_percent(name: str):
    job = compose_job([f"experiment={name}", "data.source=my_clips"])
    for cfg in job.stages or (job.config,):
        works = stage_work(cfg, Assumptions()).works
        frames = np.array([work.bucket.frames for work in works])
        if set(frames) == {1}:
            continue
        # As many clips of each bucket as of any other of its class.
        clips = np.random.default_rng(0).choice(len(works), 200_000, p=[w.share for w in works])
        cost, tokens = cost_model(cfg), {work.bucket: work.tokens for work in works}
        tape = Tape(
            clips, np.arange(len(clips)) // 1000, [work.bucket for work in works],
            {work.bucket: work.clips for work in works}, seed=0, group=cfg.data.group,
            micro_batches=cfg.train.micro_batches, cost=lambda b: cost(tokens[b]),  # noqa: B023
        )  # fmt: skip
        per_step = cfg.train.micro_batches
        steps = tape.per_epoch // per_step
        of_steps = frames[tape.epoch(0).bucket[: steps * per_step]].reshape(steps, per_step)
        both = (of_steps == 1).any(axis=1) & (of_steps > 1).any(axis=1)
        assert both.mean() >= 0.9, cfg.name
        ranks = cfg.parallel.dp_replicate * cfg.parallel.dp_shard
        costs = row_costs(tape, per_step, ranks, steps=steps)
        assert 1 - costs.sum() / (costs.max(axis=1).sum() * ranks) <= 0.02, cfg.name


@pytest.mark.parametrize("option", OPTIONS)
def test_option_of_a_group_composes(option: str):
    compose([option, *NEEDED.get(option, [])])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_tells_its_command_hardware_and_expectation(name: str):
    lines = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()
    comments = "\n".join(line for line in lines if line.startswith("#"))
    assert f"sora train experiment={name}" in comments
    assert "Hardware:" in comments and "Expect:" in comments


@pytest.mark.parametrize(
    "path", sorted(GROUP_FILES), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_option_says_in_its_first_comment_what_it_is(path: Path):
    first = next(
        line for line in path.read_text().splitlines() if not line.startswith("# @package")
    )
    assert first.startswith("# ") and len(first) > 20


@pytest.mark.parametrize("group", sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()))
def test_group_is_a_section_or_an_experiment(group: str):
    assert group in Config.model_fields or group == "experiment"


def test_train_yaml_holds_choices_and_no_values():
    assert set(yaml.safe_load((CONFIGS / "train.yaml").read_text())) == {"defaults"}


def test_real_tiny_asks_for_its_clips():
    with refuses(ConfigError, "data.source", "empty", "folder"):
        compose(["experiment=real_tiny"])


def test_models_fit_the_vae_and_text_encoder_of_their_experiment():
    for name in EXPERIMENTS:
        source = [] if name == "tiny_lora" else ["data.source=shapes"]
        config = compose([f"experiment={name}", *source]).config
        if config.task == "vae":
            continue
        assert config.model.text_dim == config.text.d_model, name
        assert config.model.velocity_channels == geometry_of(config)[0].channels, name


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "buckets").glob("*.yaml")))
def test_buckets_fit_a_vae_of_4x8x8_and_patches_of_2(name: str):
    config = compose([f"buckets={name}"]).config
    table = build_buckets(config.buckets, temporal_factor=4, spatial_multiple=16)
    assert {spec.class_name for spec in table} == {cls.name for cls in config.buckets.classes}
    for spec in table:
        assert spec.bucket.frames % 4 == 1
        assert spec.bucket.height % 16 == spec.bucket.width % 16 == 0


def test_a_run_is_as_long_as_its_steps_or_its_epochs_and_not_both():
    assert compose(["train.steps=0", "train.epochs=2.5"]).config.train.epochs == 2.5
    with refuses(ConfigError, "train.steps=1000", "train.epochs=2"):
        compose(["train.epochs=2"])
    with refuses(ConfigError, "train.steps=0", "train.epochs=0"):
        compose(["train.steps=0"])


def test_every_key_is_documented():
    bare = [name for name, key in keys(Config).items() if len(key.doc) < 10]
    assert not bare


def test_reference_is_up_to_date():
    written = (REPO / "docs" / "config.md").read_text()
    assert written == reference(), "run `make docs`"

"""`memory.fit=auto` and `sora plan hardware=1x24GB`: what is chosen for a card, and what is said of the rest."""

import pytest

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.config.job import JobConfig
from sora_train.errors import ConfigError, UserError
from sora_train.tools.plan import fit
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.command import parse_command
from sora_train.tools.plan.plan import plan_run
from sora_train.tools.plan.time.cluster import BY_MEMORY, TABLE, parse_cluster
from sora_train.train import with_what_fits

# Short clips, so that the base is most of what there is.
SHORT = [
    "experiment=wan_14b_lora", "data.source=x", "data.micro_batch=1", "~data.micro_batch_table",
    "train.micro_batches=1",
    "buckets.classes=[{name: 256px, pixels: 65536, frames: [33], aspect_ratios: ['1:1']}]",
]  # fmt: skip


def planned(memory: float, *more: str) -> dict:
    job, cluster, assume = parse_command(
        [*SHORT, *more, "hardware=1x24GB", f"cluster.memory_gib={memory:g}", "plan.counted=0"], None
    )
    return plan_run(job.config, job.stages, cluster, assume, lambda *_: None)["stages"][0]


@pytest.mark.parametrize("size", BY_MEMORY)
def test_a_card_is_named_by_its_memory(size: str) -> None:
    cluster = parse_cluster(f"1x{size}", {})
    assert cluster.name in TABLE
    assert 0.9 * float(size[:-2]) <= cluster.gpu.memory_gib <= float(size[:-2])


@pytest.mark.parametrize(
    ("card", "gib", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 23.5, "4090"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80"),
        ("Some Other Card", 15.8, "4080"),
        ("Some Small Card", 7.9, "4070"),
    ],
)
def test_the_card_that_is_here_is_found_in_the_table(card: str, gib: float, name: str) -> None:
    assert fit.named(card, gib * 2**30) == name


def test_less_memory_takes_a_narrower_or_a_swapped_base_and_says_why() -> None:
    """14 B weights are 26 GiB in bfloat16, 13 in int8, 7 in nf4."""
    roomy, tight = planned(79.0), planned(20.0)
    assert "base compute" in roomy["layout"] and "swapped" not in roomy["options"]
    assert "base compute" not in tight["layout"] or "swapped" in tight["options"]
    assert tight["step"]["seconds"] >= roomy["step"]["seconds"]
    assert all(row["memory"]["peak"] <= 20.0 * 2**30 for row in tight["candidates"])
    tried = {row["layout"] for row in tight["candidates"]} | {
        row["name"] for row in tight["refused"]
    }
    assert tried == {"single, base compute", "single, base int8", "single, base nf4"}
    assert any(text.startswith("memory.base=") for text in tight["overrides"])


def test_a_base_that_is_asked_for_is_the_only_one() -> None:
    stage = planned(79.0, "memory.base=fp8")
    assert [row["layout"] for row in stage["candidates"]] == ["single, base fp8"]


def test_where_nothing_fits_the_nearest_is_named() -> None:
    with pytest.raises(UserError, match="base nf4: memory over by"):
        planned(6.0)


def lora(*more: str) -> Config:
    return compose([*SHORT, *more]).config


def test_a_run_takes_what_fits_and_prints_it() -> None:
    cluster = parse_cluster("1x24GB", {"memory_gib": 20.0})
    cfg = lora()
    found, told = fit.fitted(
        cfg.model_copy(update={"name": "mine"}), cluster, Assumptions(counted=0)
    )
    assert found.memory.fit == "as_set" and found.name == "mine"
    assert found.memory.base != "compute" or found.memory.swap_blocks
    assert "memory.fit=auto on 1x4090 with 20.0 GiB" in told[0] and "s a step" in told[0]
    by_hand = told[-1].partition("by hand: ")[2].split()
    again = compose([*SHORT, *by_hand, "memory.fit=as_set"]).config
    assert (again.memory, again.parallel) == (found.memory, found.parallel)
    # All else is as it was.
    same = found.model_copy(
        update={"memory": cfg.memory, "parallel": cfg.parallel, "name": cfg.name}
    )
    assert same == cfg


def test_a_job_without_it_is_left_alone() -> None:
    job = JobConfig(lora("memory.fit=as_set"))
    assert with_what_fits(job) is job


def test_it_is_for_adapters() -> None:
    with pytest.raises(ConfigError) as error:
        compose(["experiment=quickstart", "memory.fit=auto"])
    assert "memory.fit=auto" in str(error.value) and "adapter.rank" in str(error.value)

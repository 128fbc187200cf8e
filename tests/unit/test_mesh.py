"""Degrees of parallelism: what is left is filled in, and what does not fill the job is told with the product."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses

from sora_train.config import Config, ModelConfig, ParallelConfig
from sora_train.errors import ConfigError
from sora_train.parallel.degrees import Degrees, check_degrees, resolve_degrees
from sora_train.runtime.world import World

SMALL = st.integers(1, 6)


@given(SMALL, SMALL, SMALL, SMALL, st.sampled_from(["dp_replicate", "dp_shard", None]))
def test_what_is_left_is_filled_in(
    replicate: int, shard: int, ulysses: int, ring: int, left: str | None
):
    asked = {"dp_replicate": replicate, "dp_shard": shard, "ulysses": ulysses, "ring": ring}
    world = math.prod(asked.values())
    found = resolve_degrees(ParallelConfig(**(asked | ({left: -1} if left else {}))), world)
    assert {name: getattr(found, name) for name in asked} == asked and found.cp == ulysses * ring


def test_places_count_ulysses_fastest_and_only_on_axes_that_have_several():
    degrees = Degrees(dp_replicate=2, dp_shard=3, ulysses=2, ring=1)
    assert degrees.place_of(0) == "dp_replicate 0, dp_shard 0, ulysses 0"
    assert degrees.place_of(3) == "dp_replicate 0, dp_shard 1, ulysses 1"
    assert degrees.place_of(10) == "dp_replicate 1, dp_shard 2, ulysses 0"
    assert Degrees(1, 1, 1, 1).place_of(0) == ""


@pytest.mark.parametrize(
    ("asked", "world", "told"),
    [
        ({"dp_shard": 3}, 4, ["parallel.dp_shard 3", "= 3, but 4 rank(s)", "dp_shard=-1", "start 3 ranks"]),
        ({"ulysses": 3}, 4, ["parallel.ulysses 3", "= 3, but 4", "whose product is 4"]),
        ({"dp_shard": 0}, 1, ["parallel.dp_shard 0", "degree at 0"]),
        ({"dp_replicate": -1, "dp_shard": -1}, 4, ["set one"]),
    ],
)  # fmt: skip
def test_degrees_that_do_not_fill_the_job_are_told_with_the_product(
    asked: dict[str, int], world: int, told: list[str]
):
    with refuses(ConfigError, *told):
        resolve_degrees(ParallelConfig(**asked), world)


def test_heads_that_do_not_divide_are_told_with_the_degrees_that_do():
    cfg = Config(model=ModelConfig(num_heads=6), parallel=ParallelConfig(ulysses=4))
    with refuses(ConfigError, "ulysses=4", "model.num_heads=6", "1, 2, 3, 6"):
        check_degrees(cfg, resolve_degrees(cfg.parallel, 4))


def test_an_autoencoder_has_no_tokens_to_divide():
    cfg = Config(task="vae", parallel=ParallelConfig(ring=2))
    with pytest.raises(ConfigError, match=r"ring=2 .* task=vae"):
        check_degrees(cfg, resolve_degrees(cfg.parallel, 2))


@given(SMALL, SMALL)
def test_ranks_that_share_tokens_read_the_same_samples(dp: int, cp: int):
    import torch

    size = dp * cp
    ranks = [World(rank, size, rank, size, torch.device("cpu"), cp=cp) for rank in range(size)]
    assert [rank.dp_rank for rank in ranks] == [n for n in range(dp) for _ in range(cp)]
    assert [rank.cp_rank for rank in ranks] == list(range(cp)) * dp
    assert {rank.dp_size for rank in ranks} == {dp}

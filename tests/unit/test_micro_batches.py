"""Clips of a micro-batch: by cost, by hand, by a table, and never more than the memory holds."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.config.messages import validated
from sora_train.config.sections.data import DataConfig
from sora_train.data.sample import Bucket
from sora_train.data.tape.micro_batches import GB, MemoryCap, gigabytes, micro_batch_sizes
from sora_train.errors import ConfigError, UserError
from sora_train.tools.data.trace import Trace
from sora_train.training.pipeline.plan import cost_model

BUCKETS = [Bucket(1, 48, 48), Bucket(9, 48, 48), Bucket(9, 32, 64), Bucket(17, 48, 48)]


def tokens_of(bucket: Bucket) -> int:
    return ((bucket.frames - 1) // 4 + 1) * bucket.height * bucket.width // 256


def cost(tokens: int) -> float:
    return tokens + tokens**2 / 500


def cap(gb: float, fixed: float = 1.0, token: float = 0.1) -> MemoryCap:
    """So many GB, of which `fixed` are taken before any clip, and `token` GB a token."""
    return MemoryCap(gb * GB, fixed * GB, lambda bucket: tokens_of(bucket) * token * GB)


def test_auto_sizes_fill_the_cap_and_never_pass_it():
    counts = [10_000] * 4
    sizes = micro_batch_sizes(BUCKETS, counts, tokens_of, cost, "auto", 1024)
    largest = max(BUCKETS, key=tokens_of)
    cap = 1024 // tokens_of(largest) * cost(tokens_of(largest))
    assert sizes[largest] == 1024 // tokens_of(largest)
    for bucket, size in sizes.items():
        one = cost(tokens_of(bucket))
        assert size * one <= cap * (1 + 1e-6) < (size + 1) * one * (1 + 1e-6)


def test_sizes_shrink_to_the_clips_there_are():
    assert micro_batch_sizes(BUCKETS, [3, 0, 50, 1], tokens_of, cost, 8, 0) == {
        BUCKETS[0]: 3,
        BUCKETS[2]: 8,
        BUCKETS[3]: 1,
    }
    assert micro_batch_sizes(BUCKETS, [0, 0, 0, 9], tokens_of, cost, "auto", 1) == {BUCKETS[3]: 1}


@given(
    st.lists(st.integers(0, 500), min_size=4, max_size=4),
    st.integers(1, 5000),
    st.floats(6, 500),
    st.floats(0.01, 0.1),
)
@settings(max_examples=200, deadline=None)
def test_auto_takes_as_many_clips_as_cost_and_memory_allow(
    counts: list[int], micro_batch_tokens: int, gb: float, token: float
):
    memory = cap(gb, token=token)
    sizes = micro_batch_sizes(
        BUCKETS, counts, tokens_of, cost, "auto", micro_batch_tokens, memory=memory
    )
    free = micro_batch_sizes(BUCKETS, counts, tokens_of, cost, "auto", micro_batch_tokens)
    assert sizes.keys() == free.keys() == {b for b, n in zip(BUCKETS, counts, strict=True) if n}
    if not sizes:
        return
    largest = max(sizes, key=tokens_of)
    clips = min(max(1, micro_batch_tokens // tokens_of(largest)), memory.most(largest))
    limit = clips * cost(tokens_of(largest))
    for bucket, size in sizes.items():
        assert 1 <= size <= free[bucket], "memory never adds a clip"
        assert memory.needs(bucket, size) <= memory.cap * (1 + 1e-8)
        assert size * cost(tokens_of(bucket)) <= limit * (1 + 1e-6)
        more = size + 1
        assert (
            more > counts[BUCKETS.index(bucket)]
            or memory.needs(bucket, more) > memory.cap
            or more * cost(tokens_of(bucket)) > limit
        ), "one more would not fit"


def test_a_cap_below_one_clip_names_the_largest_bucket_and_what_it_needs():
    with refuses(UserError, "memory cap", "17x48x48") as error:
        micro_batch_sizes(BUCKETS, [5, 5, 5, 5], tokens_of, cost, "auto", 64, memory=cap(5.4))
    needed = float(re.search(r"it needs ([\d.]+) GB", str(error.value)).group(1))
    assert "data.memory_gb=5.4" in str(error.value)
    assert micro_batch_sizes(
        BUCKETS, [5, 5, 5, 5], tokens_of, cost, "auto", 64, memory=cap(needed)
    ), "what it says is enough"
    # A bucket without clips needs nothing.
    assert micro_batch_sizes(BUCKETS, [5, 5, 5, 0], tokens_of, cost, "auto", 64, memory=cap(5.4))


@pytest.mark.parametrize("micro_batch", [8, "table"])
def test_a_choice_above_the_cap_is_refused_with_what_would_fit(micro_batch: int | str):
    def sizes(memory: MemoryCap) -> dict[Bucket, int]:
        return micro_batch_sizes(
            BUCKETS,
            [99, 0, 99, 0],
            tokens_of,
            cost,
            micro_batch,
            1,  # type: ignore[arg-type]
            table={"1x48x48": 8, "9x32x64": 8},
            memory=memory,
        )

    with refuses(UserError, "8 clips", "9x32x64") as error:
        sizes(cap(10))
    most = int(re.search(r"at most (\d+) of them", str(error.value)).group(1))
    assert most == cap(10).most(BUCKETS[2]) < 8
    needed = float(re.search(r"need ([\d.]+) GB", str(error.value)).group(1))
    assert set(sizes(cap(needed)).values()) == {8}


def test_a_table_gives_each_bucket_its_clips():
    table = {"1x48x48": 30, "9x48x48": 4, "9x32x64": 5, "17x48x48": 2}
    assert micro_batch_sizes(
        BUCKETS, [99, 3, 0, 99], tokens_of, cost, "table", 1, table=table
    ) == {BUCKETS[0]: 30, BUCKETS[1]: 3, BUCKETS[3]: 2}  # fmt: skip


def test_a_table_of_other_buckets_is_refused_by_name():
    with refuses(UserError, "1x64x64", "17x48x48"):
        micro_batch_sizes(BUCKETS, [1, 0, 0, 0], tokens_of, cost, "table", 1, table={"1x64x64": 1})
    with pytest.raises(UserError, match="says nothing of 17x48x48, 9x32x64"):
        micro_batch_sizes(BUCKETS, [1, 0, 1, 1], tokens_of, cost, "table", 1, table={"1x48x48": 1})


def test_gigabytes_are_rounded_up():
    assert [gigabytes(n * GB) for n in (0, 0.0012341, 5.4, 80, 1234.5)] == [
        "0", "0.00124", "5.4", "80", "1240",
    ]  # fmt: skip


# --- as a run is configured ---

TABLE = "data.micro_batch_table={1x48x48: 6, 9x48x48: 3, 9x32x64: 2}"


def test_a_table_is_given_on_the_command_line_and_in_yaml(tmp_path: Path):
    expected = {"1x48x48": 6, "9x48x48": 3, "9x32x64": 2}
    given = compose(["experiment=parity_tiny", "data.micro_batch=table", TABLE]).config
    assert given.data.micro_batch_table == expected
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults: [parity_tiny]\ndata:\n  micro_batch: table\n  micro_batch_table:\n"
        "    1x48x48: 6\n    9x48x48: 3\n    9x32x64: 2\n"
    )
    assert compose([], yaml_file=file).config.data.micro_batch_table == expected
    dropped = compose(["data.micro_batch=2", "~data.micro_batch_table"], yaml_file=file).config
    assert dropped.data.micro_batch_table == {} and dropped.data.micro_batch == 2


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        ({"micro_batch": "table"}, ("data.micro_batch=table", "data.micro_batch_table")),
        ({"micro_batch_table": {"1x48x48": 2}}, ("data.micro_batch=auto",)),
        (
            {"micro_batch": "table", "micro_batch_table": {"1x48x48": 0}},
            ("data.micro_batch_table.1x48x48", "at least 1", "got 0"),
        ),
    ],
)
def test_a_table_that_cannot_be_is_refused(data: dict, facts: tuple[str, ...]):
    with refuses(ConfigError, *facts):
        validated(Config, {"data": data})


def test_the_old_name_of_least_efficiency_leads_to_the_new_one():
    with refuses(ConfigError, "elastic.min_efficiency"):
        compose(["data.min_efficiency=0.1"])


def test_a_run_keeps_its_micro_batches_below_the_cap_at_any_world_size(tmp_path: Path):
    """Traced as a run plans: a smaller cap makes smaller micro-batches, a tiny one is refused."""

    def traced(*overrides: str) -> Trace:
        run = ["experiment=parity_tiny", f"run.dir={tmp_path}", "data.shapes_clips=24"]
        return Trace.open(compose([*run, "data.micro_batch=auto", *overrides]).config)

    def largest(trace: Trace) -> int:
        return max(len(trace.tape[index].rows) for index in range(trace.tape.parts[0].per_epoch))

    free = largest(traced())
    with refuses(UserError, "memory cap") as error:
        traced("data.memory_gb=0.0001")
    needed = re.search(r"it needs ([\d.]+) GB", str(error.value)).group(1)
    assert largest(traced(f"data.memory_gb={needed}")) < free
    assert largest(traced("data.memory_gb=10")) == free
    with pytest.raises(UserError, match="task=vae"):
        traced("task=vae", "data.memory_gb=10")


def test_measured_costs_replace_those_of_the_flops():
    base = ["experiment=parity_tiny"]
    measured = cost_model(compose([*base, "data.cost_a=2", "data.cost_b=0.5"]).config)
    assert [measured(tokens) for tokens in (1, 10)] == [2.5, 70.0]
    linear = cost_model(compose([*base, "data.cost_a=3"]).config)
    assert linear(7) == 21
    flops = cost_model(compose(base).config)
    assert flops(3000) - flops(2000) > flops(2000) - flops(1000) > 0, "attention"
    assert DataConfig().cost_a == DataConfig().cost_b == 0

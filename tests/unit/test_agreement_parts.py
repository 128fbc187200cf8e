"""What ranks agree on, without ranks: journals, circles, the first difference and its sentence, digests."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import says
from torch import nn

from sora_train.config import Config, ParallelConfig
from sora_train.parallel.checks.agreement import (
    TOPICS,
    Entry,
    Journal,
    circles,
    digest_of,
    first_difference,
    named,
    parted,
    sentence,
)
from sora_train.parallel.checks.block_calls import BlockCalls, leaves
from sora_train.parallel.degrees import Degrees
from sora_train.runtime.world import World
from sora_train.training.components import Components
from sora_train.training.resilience.debug_mode import start_debug

SMALL = st.integers(1, 4)
WORDS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["", "x", "y"])), max_size=5)


def journal_of(entries: list[tuple[str, str]]) -> Journal:
    journal = Journal()
    for where, what in entries:
        journal.add(where, what, about="whatever")
    return journal


@given(WORDS, WORDS)
def test_journals_have_the_same_digest_where_their_entries_are_the_same(one: list, other: list):
    assert (journal_of(one).digest == journal_of(other).digest) == (one == other)


def test_clips_are_told_and_not_compared_and_a_cleared_journal_is_a_new_one():
    one, other = Journal(), Journal()
    one.add("here", "this", "rows 1, 2")
    other.add("here", "this", "rows 3, 4")
    assert one.digest == other.digest != Journal().digest
    one.clear()
    assert one.digest == Journal().digest and one.entries == []


@settings(deadline=None, max_examples=40)
@given(SMALL, SMALL, SMALL, SMALL)
def test_each_rank_is_in_one_circle_with_those_at_its_place_on_the_other_axes(
    replicate: int, shard: int, ring: int, ulysses: int
):
    degrees = Degrees(replicate, shard, ulysses, ring)
    size = replicate * degrees.shards

    told = [degrees.place_of(rank) for rank in range(size)]
    place = [dict(part.split(" ") for part in one.split(", ") if part) for one in told]
    same = {"all": (), "peers": ("dp_replicate", "dp_shard"), "replicas": ("dp_shard", "ring", "ulysses")}  # fmt: skip
    for kind, axes in same.items():
        found = circles(kind, size, degrees.cp, degrees.shards)
        assert sorted(rank for circle in found for rank in circle) == list(range(size))
        of_rank = {rank: circle for circle in found for rank in circle}
        for rank in range(size):
            wanted = [
                other
                for other in range(size)
                if all(place[other].get(axis) == place[rank].get(axis) for axis in axes)
            ]
            assert of_rank[rank] == wanted
    assert len(set(told)) == size


def test_parties_are_told_larger_first():
    assert parted([7, 7, 7, 7], [0, 1, 3]) == [[0, 1, 3]]
    assert parted([7, 8, 7, 8, 8, 9], [0, 1, 2, 3, 4, 5]) == [[1, 3, 4], [0, 2], [5]]


def calls(*names: str) -> list[Entry]:
    return [("micro-batch 0 of step 3", name, f"rows {len(names)}") for name in names]


def test_the_first_difference_is_the_first_and_an_end_is_one():
    assert first_difference([([0], calls("a", "b")), ([1], calls("a", "c"))]) == 1
    assert first_difference([([0], calls("a", "b", "c")), ([1], calls("a", "b"))]) == 2
    assert first_difference([([0], calls("a")), ([1], calls("b")), ([2], calls("a"))]) == 0


def test_the_sentence_names_what_who_and_which_clips():
    degrees = Degrees(1, 2, 2, 1)
    parties = [([0, 2, 3], calls("a", "b")), ([1], calls("a", "c", "d"))]
    found = sentence(TOPICS["calls"], parties, degrees.place_of)
    says(found, "after a", "ranks 0, 2, 3: b in micro-batch 0 of step 3 [rows 2]")
    says(found, "rank 1 (dp_shard 0, ulysses 1): c in micro-batch 0 of step 3 [rows 3]")
    ended = sentence(TOPICS["calls"], [([0], calls("a", "b")), ([1], calls("a"))], lambda rank: "")
    says(ended, "rank 0: b", "micro-batch 0", "step 3", "rows 2", "rank 1: nothing")


def test_of_parties_that_differ_later_those_alike_here_are_told_together():
    parties = [([0], calls("a", "b", "c")), ([1], calls("x")), ([2], calls("a", "b"))]
    assert "ranks 0, 2: a in" in sentence(TOPICS["calls"], parties, lambda rank: "")


def test_many_ranks_are_cut():
    assert named(range(10), str) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 others"


BYTES = torch.arange(24, dtype=torch.uint8)


@pytest.mark.parametrize(
    "other",
    [BYTES.view(4, 6), BYTES.view(torch.int8), BYTES.flip(0), BYTES[:23], BYTES.numpy(), BYTES.tolist()],
)  # fmt: skip
def test_digests_tell_values_shapes_and_types_apart(other: object):
    assert digest_of(BYTES) == digest_of(BYTES.clone()) != digest_of(other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int64])
def test_any_tensor_has_a_digest_whatever_its_strides(dtype: torch.dtype):
    tensor = (torch.arange(6).view(2, 3) % 2).to(dtype)
    assert digest_of(tensor.T) == digest_of(tensor.T.contiguous()) != digest_of(tensor)
    assert digest_of(tensor.sum()) != digest_of(tensor[0])


def test_what_a_model_is_given_is_named_through_containers_and_functions_are_left_out():
    found = leaves("", {"x": 1, "text": (BYTES, None), "draw": print, "how": {"name": "prompt"}})
    assert list(found) == [("x", 1), ("text.0", BYTES), ("text.1", None), ("how.name", "prompt")]


@pytest.mark.parametrize(("every", "size"), [(0, 2), (5, 1)])
def test_without_debug_mode_or_other_ranks_nothing_is_placed(every: int, size: int):
    cfg = Config(parallel=ParallelConfig(debug_every=every))
    world = World(0, size, 0, 1, torch.device("cpu"))
    # There is no model to place a hook in: it is not even looked at.
    run = SimpleNamespace(cfg=cfg, world=world)
    assert start_debug(run, Components()) is None  # type: ignore[arg-type]


class Noted:
    """Stands for the agreement of one rank: what was noted, and after which notes ranks compared."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, topic: str, where: str, what: str, about: str = "") -> None:
        self.said.append(f"{topic}: {what}")

    def require(self) -> None:
        self.said.append("compared")

    def compares(self, topic: str) -> bool:
        return False


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_calls_are_noted_in_order_forward_and_backward_while_they_are_watched():
    model, noted = Two(), Noted()
    watch = BlockCalls(model, noted)  # type: ignore[arg-type]
    model(torch.ones(1, 2)).sum().backward()
    assert noted.said == []
    watch.watching = True
    model(torch.ones(1, 2)).sum().backward()
    names = [f"calls: {name}" for name in ("the model", "blocks.0", "blocks.1")]
    assert noted.said[:3] == names
    # The last block's output is the model's, so these two come at once.
    assert set(noted.said[3:5]) == {f"{names[0]} backward", f"{names[2]} backward"}
    assert noted.said[5:] == ["calls: blocks.0 backward"]
    watch.live = True
    noted.said.clear()
    with torch.no_grad():
        model(torch.ones(1, 2))
    assert noted.said == [part for name in names for part in (name, "compared")]

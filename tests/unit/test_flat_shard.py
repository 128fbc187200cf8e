"""Flat runs of a tensor are saved and loaded in place by the distributed checkpoint, whatever cuts them next."""

import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses

from sora_train.parallel.shards import FlatShard, boxes, piece

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_fill_the_run_and_nothing_else(shape: tuple[int, ...], data: st.DataObject) -> None:
    values = math.prod(shape)
    start = data.draw(st.integers(0, values))
    stop = data.draw(st.integers(start, values))
    found = torch.full(shape, -1)
    part = torch.arange(start, stop)
    shard = FlatShard(part, shape, start)
    items = shard.__create_write_items__("x", shard)
    assert len(items) <= max(1, 2 * len(shape) - 1)
    for item in items:
        chunk = item.tensor_data.chunk
        place = tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))
        assert bool((found[place] == -1).all())
        mine = shard.__get_tensor_shard__(item.index)
        assert (
            not mine.numel()
            or mine.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        )
        found[place] = mine
    expected = torch.full((values,), -1)
    expected[start:stop] = part
    assert torch.equal(found.flatten(), expected)


def test_no_box_of_an_empty_run() -> None:
    assert list(boxes((3, 4), 5, 5)) == []


def test_a_whole_checkpoint_is_loaded_into_any_runs(tmp_path: Path) -> None:
    """Saved whole, loaded as runs that begin and end inside rows; saved as runs again, loaded whole."""
    whole = torch.randn(5, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": whole}, checkpoint_id=tmp_path / "whole", no_dist=True)
        for start, stop in ((0, 60), (7, 53), (13, 14), (60, 60)):
            part = torch.zeros(stop - start)
            dcp.load(
                {"a": FlatShard(part, whole.shape, start)},
                checkpoint_id=tmp_path / "whole",
                no_dist=True,
            )
            assert torch.equal(part, whole.flatten()[start:stop])
        run = FlatShard(whole.flatten().clone(), whole.shape, 0)
        dcp.save({"a": run}, checkpoint_id=tmp_path / "runs", no_dist=True)
        found = torch.zeros(5, 3, 4)
        dcp.load({"a": found}, checkpoint_id=tmp_path / "runs", no_dist=True)
    assert torch.equal(found, whole)


def test_it_describes_and_does_not_compute() -> None:
    shard = FlatShard(torch.ones(3), (2, 3), 1)
    assert (shard.shape, shard.numel(), shard.element_size()) == (torch.Size((2, 3)), 6, 4)
    assert shard.detach().to_local() is not None
    with refuses(NotImplementedError, "to_local"):
        shard + 1
    with pytest.raises(ValueError, match="no box"):
        shard.__get_tensor_shard__(
            FlatShard(torch.ones(6), (2, 3), 0).__create_write_items__("a", shard)[0].index
        )
    assert torch.equal(piece(torch.zeros(2), torch.ones(2), None), torch.ones(2))

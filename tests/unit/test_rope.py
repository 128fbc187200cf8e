"""Rotary positions: a rotation, relative along each axis, equal to diffusers' table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.models.transformer.rope import _rotate, apply_rope, rope_table, split_head_dim

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [8, 24, 64, 128])
def test_equals_diffusers(head_dim):
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)(torch.zeros(1, 1, 3, 8, 10))
    ours = rope_table((3, 4, 5), head_dim, CPU, torch.float32).flatten(1, 2)
    assert torch.equal(ours[0], cos[0, ..., 0::2])
    assert torch.equal(ours[1], sin[0, ..., 1::2])


@given(st.sampled_from([8, 10, 24, 64]), st.tuples(*[st.integers(1, 5)] * 3))
@settings(deadline=None, max_examples=25)
def test_is_a_rotation(head_dim, grid):
    assert sum(split_head_dim(head_dim)) == head_dim
    x = torch.randn(2, grid[0], grid[1] * grid[2], 3, head_dim, dtype=torch.float64)
    turned = apply_rope(x, rope_table(grid, head_dim, CPU, torch.float64))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_scores_depend_on_the_difference_of_places():
    table = rope_table((4, 5, 6), 24, CPU, torch.float64)
    q, k = torch.randn(2, 24, dtype=torch.float64)
    everywhere = torch.ones(1, 4, 30, 1, 1, dtype=torch.float64)
    q = apply_rope(q * everywhere, table).view(4, 5, 6, 24)
    k = apply_rope(k * everywhere, table).view(4, 5, 6, 24)
    first = q[0, 1, 2] @ k[2, 2, 5]
    moved = q[1, 3, 0] @ k[3, 4, 3]
    torch.testing.assert_close(moved, first)
    assert not torch.allclose(q[0, 1, 2] @ k[2, 3, 5], first)


def test_real_form_for_gpus_equals_the_complex_one():
    x = torch.randn(2, 3, 4, 2, 24, dtype=torch.float64)
    table = rope_table((3, 2, 2), 24, CPU, torch.float64)
    torch.testing.assert_close(
        _rotate(x.unflatten(-1, (-1, 2)), *table).flatten(-2), apply_rope(x, table)
    )

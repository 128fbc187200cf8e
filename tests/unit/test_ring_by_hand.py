"""The pieces of ring attention in one process against softmax and its gradient written out in numpy, in float64."""

import numpy as np
import pytest
import torch

from sora_train.parallel.context.ring import _scores, block_backward, block_forward, merge

CLIPS, HEADS, QUERIES, WIDTH = 2, 3, 5, 6
CUTS = (0, 4, 5, 11)
"""Where the keys are cut: blocks of 4, 1 and 6."""


def arrays() -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    shapes = {"q": QUERIES, "k": CUTS[-1], "v": CUTS[-1], "dout": QUERIES}
    return {name: draws.normal(size=(CLIPS, HEADS, n, WIDTH)) for name, n in shapes.items()}


def by_hand(a: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Attention over all keys at once, its log-sum-exp, and the gradients for the cotangent `dout`."""
    scores = a["q"] @ a["k"].swapaxes(-1, -2) / np.sqrt(WIDTH)
    lse = np.log(np.exp(scores).sum(-1))
    weights = np.exp(scores - lse[..., None])
    dweights = a["dout"] @ a["v"].swapaxes(-1, -2)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    return {
        "out": weights @ a["v"],
        "lse": lse,
        "dq": dscores @ a["k"] / np.sqrt(WIDTH),
        "dk": dscores.swapaxes(-1, -2) @ a["q"] / np.sqrt(WIDTH),
        "dv": weights.swapaxes(-1, -2) @ a["dout"],
    }


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_blocks_of_keys_in_any_order_are_all_keys_at_once(order: tuple[int, ...]) -> None:
    given = arrays()
    expected = by_hand(given)
    q, k, v, dout = (torch.from_numpy(given[name]) for name in ("q", "k", "v", "dout"))
    blocks = [slice(CUTS[number], CUTS[number + 1]) for number in order]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:-1], -torch.inf, dtype=q.dtype)
    for block in blocks:
        out, lse = merge(out, lse, *block_forward(q, k[:, :, block], v[:, :, block]))
    np.testing.assert_allclose(out.numpy(), expected["out"], rtol=1e-12)
    np.testing.assert_allclose(lse.numpy(), expected["lse"], rtol=1e-12)
    dq = torch.zeros_like(q)
    for block in blocks:
        mine, dk, dv = block_backward(dout, q, k[:, :, block], v[:, :, block], out, lse)
        dq += mine
        np.testing.assert_allclose(dk.numpy(), expected["dk"][:, :, block], rtol=1e-10)
        np.testing.assert_allclose(dv.numpy(), expected["dv"][:, :, block], rtol=1e-10)
    np.testing.assert_allclose(dq.numpy(), expected["dq"], rtol=1e-10)


@pytest.mark.parametrize("width", [64, 128])
def test_a_bfloat16_query_is_rounded_once(width: int) -> None:
    """Scaled in bfloat16 before the product, scores of width 128 are 1.7e-3 off (rms) where products are float32,
    2.4e-3 instead of 1.7e-3 where they are bfloat16, and rounded themselves."""
    draws = np.random.default_rng(0)
    q, k = (torch.from_numpy(draws.normal(size=(2, 256, width))).bfloat16() for _ in "qk")
    exact = q.double() @ k.double().mT / width**0.5

    def off(scores: torch.Tensor) -> float:
        return float((scores.double() - exact).square().mean().sqrt())

    assert off(_scores(q, k.float().mT, torch.float32)) < 1e-6
    assert off(_scores(q, k.mT, torch.bfloat16)) < 1.9e-3

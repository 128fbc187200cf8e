"""UniPC, the multistep solver of Wan's own samplers: one call of the model a step, second order.

Zhao et al. 2023 (arXiv:2302.04867), in the form that predicts data, of order 2 with B(h) = e^h - 1:
UniP steps on from the two last predictions of the data, and UniC corrects a step once the model has
been asked at its end. Steps are measured in lambda = log((1 - t) / t), half the logarithm of the
signal-to-noise ratio, in which the part of the ODE that is linear in z is solved exactly.

The numbers are those of diffusers' `UniPCMultistepScheduler` with `use_flow_sigmas`.
"""

import math
from collections.abc import Sequence

from torch import Tensor


def _lambda(t: float) -> float:
    """log((1 - t) / t), infinite at both ends."""
    if t in (0, 1):
        return math.inf if t == 0 else -math.inf
    return math.log1p(-t) - math.log(t)


class UniPC:
    """Integrates down one grid of times; keeps what earlier steps predicted."""

    def __init__(self, times: Sequence[float]):
        """`times`: noise levels from at most 1 down to 0, none twice."""
        self._times = times
        self._lambdas = [_lambda(t) for t in self._times]
        self._data: list[Tensor] = []
        self._z: Tensor | None = None
        self._order = 0

    def step(self, i: int, z: Tensor, x: Tensor) -> Tensor:
        """z at times[i + 1].

        Args:
            i: steps done so far.
            z: what the step before returned, at times[i].
            x: the data that the model predicts from z.
        """
        if i > 0:
            z = self._correct(i, x)
        # The last step ends at data, where only the first order is defined.
        self._order = min(2, i + 1, len(self._times) - 1 - i)
        self._data = [*self._data[-1:], x]
        self._z = z
        z_next = self._first_order(i, z, x)
        if self._order == 2:
            scale = (1 - self._times[i + 1]) * self._growth(i)
            z_next = z_next - scale * 0.5 * self._difference(i)
        return z_next

    def _first_order(self, i: int, z: Tensor, x: Tensor) -> Tensor:
        """From times[i] to times[i + 1] with x held: DDIM, which for a flow is Euler."""
        t, t_next = self._times[i], self._times[i + 1]
        return t_next / t * z - (1 - t_next) * self._growth(i) * x

    def _growth(self, i: int) -> float:
        """exp(-h) - 1 for a step of h in lambda."""
        return math.expm1(self._lambdas[i] - self._lambdas[i + 1])

    def _ratio(self, i: int) -> float:
        """Length of the step that ended at times[i] over that of the one that begins there, negative."""
        before, here, after = self._lambdas[i - 1 : i + 2]
        return (before - here) / (after - here)

    def _difference(self, i: int) -> Tensor:
        """Slope of the predicted data before times[i], in units of the step that begins there."""
        return (self._data[0] - self._data[1]) / self._ratio(i)

    def _correct(self, i: int, x: Tensor) -> Tensor:
        """The step that ended at times[i] again, now that the data predicted there are known (UniC)."""
        assert self._z is not None
        h, growth = self._lambdas[i - 1] - self._lambdas[i], self._growth(i - 1)
        base = self._first_order(i - 1, self._z, self._data[-1])
        scale = (1 - self._times[i]) * growth
        change = x - self._data[-1]
        if self._order == 1:
            return base - scale * 0.5 * change
        phi_1 = growth / h - 1
        phi_2 = phi_1 / h - 0.5
        b_1, b_2 = phi_1 / growth, 2 * phi_2 / growth
        weight = (b_1 - b_2) / (1 - self._ratio(i - 1))
        return base - scale * (weight * self._difference(i - 1) + (b_1 - weight) * change)

"""Noise drawn while the step before is computed: at 720p and 81 frames it takes a core 20 ms a clip.

Draws are keyed by sample, so it does not matter who makes them, or when; what was not foreseen is drawn when it is
asked for.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from sora_train.diffusion.draws import SampleKey

Batch = tuple[tuple[SampleKey, ...], tuple[int, ...]]
"""Samples of one micro-batch, and the shape (C, T, H, W) of each one's latents."""


class NoiseAhead:
    """One thread that draws the noise of the micro-batches expected next."""

    def __init__(self, draw: Callable[[Sequence[SampleKey], Sequence[int]], Tensor]):
        self._draw = draw
        self._thread: ThreadPoolExecutor | None = None
        self._begun: dict[Batch, Future[Tensor]] = {}

    def expect(self, batches: Sequence[Batch]) -> None:
        """Begin to draw for these, in their order; what was expected before and is not among them is forgotten."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "noise")
        begun, self._begun = self._begun, {}
        for batch in batches:
            kept = begun.pop(batch) if batch in begun else None
            self._begun[batch] = kept or self._thread.submit(self._draw, *batch)
        for future in begun.values():
            future.cancel()

    def take(self, samples: tuple[SampleKey, ...], shape: tuple[int, ...]) -> Tensor:
        """The noise (B, *shape) of these samples."""
        begun = self._begun.pop((samples, shape), None)
        return self._draw(samples, shape) if begun is None else begun.result()

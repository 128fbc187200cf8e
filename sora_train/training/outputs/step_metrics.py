"""What a step tells beside its loss: the loss by noise level, bucket and task, its work, and the kinds it holds.

Every rank adds up its own clips, the sums travel with the step's one exchange, and the same sums give
the same row on every rank. Names are fixed by the config, so all ranks send equally many.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sora_train.config import Config
from sora_train.data.sample import ClipBatch
from sora_train.diffusion.condition_masks import KINDS
from sora_train.objectives import LossTerm, SampleInfo
from sora_train.training.pipeline.data import TrainingData

EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Edges of the bands of noise levels; the last band holds its upper edge."""
FAILURES = 2
"""Where the clips that failed stand in the sums."""
BANDS = tuple(f"{low:g}-{high:g}" for low, high in pairwise(EDGES))

Terms = dict[str, LossTerm]


def band_of(t: float) -> int:
    """The band of a noise level in [0, 1]; each holds its lower edge."""
    return next((i for i, edge in enumerate(EDGES[1:-1]) if t < edge), len(BANDS) - 1)


@dataclass(frozen=True)
class ClipLoss:
    """One clip of a step: where it counts, and its part of the loss with its weight."""

    groups: tuple[str, ...]
    loss: float
    weight: float


@dataclass(frozen=True)
class KindOfClips:
    """What a step holds of a kind: its share of the loss's weight in (0, 1], and the mean loss of that part."""

    share: float
    loss: float


class StepMetrics:
    """The sums of one run's steps, and what they mean."""

    def __init__(self, cfg: Config, data: TrainingData, ranks: int, peak_flops: float | None):
        """`ranks` share the work; `peak_flops` is what one of their devices could do, None where that is unknown."""
        self.tokens_of = data.tokens_of
        self.has_noise_levels = cfg.task == "text_to_video"
        self.peak = None if peak_flops is None else peak_flops * ranks
        self.names: list[str] = []
        if self.has_noise_levels:
            buckets = dict.fromkeys(spec.bucket.name for spec in data.table)
            self.names = [f"by_t/{band}" for band in BANDS]
            self.names += [f"by_bucket/{name}" for name in buckets]
            self.names += [f"by_task/{kind}" for kind in KINDS]
        self._place = {name: number for number, name in enumerate(self.names)}
        buckets = dict.fromkeys(spec.bucket.name for spec in data.table)
        levels = [f" t={band}" for band in BANDS] if self.has_noise_levels else []
        self.kinds = [f"{bucket}{level}" for bucket in buckets for level in ["", *levels]]
        """A bucket at a band of noise levels, or a bucket where an objective does not tell of them."""
        self._kind = {name: number for number, name in enumerate(self.kinds)}
        self.flops_of = data.flops_of

    def sums(
        self, batches: Sequence[ClipBatch], parts: Sequence[Terms], totals: Mapping[str, float]
    ) -> list[float]:
        """This rank's sums of a step, in an order that `row` and `kinds_of` know: clips, tokens, failures first.

        `totals` is each term's total weight over all ranks.
        """
        clips = tokens = failures = held = flops = 0.0
        for batch in batches:
            each = self.tokens_of(batch.micro_batch.bucket)
            clips += batch.weight
            tokens += batch.weight * each
            failures += len(batch.failures)
            # A slot without clips still trains one that counts for nothing.
            held += max(1, len(batch.clips)) * each
            flops += batch.weight * self.flops_of(batch.micro_batch.bucket)
        losses, weights = [0.0] * len(self.names), [0.0] * len(self.names)
        of_kind = [0.0] * len(self.kinds)
        for batch, terms in zip(batches, parts, strict=True):
            for clip in clips_of(batch, terms):
                for group in clip.groups:
                    at = self._place.get(group)
                    if at is not None:
                        losses[at] += clip.loss
                        weights[at] += clip.weight
            for name, part in parts_of_loss(batch, terms, totals):
                of_kind[self._kind[name]] += part
        return [clips, tokens, failures, held, flops, *losses, *weights, *of_kind]

    def kind_weights(self, batches: Sequence[ClipBatch], parts: Sequence[Terms]) -> list[float]:
        """This rank's weight of each of `kinds`, known without a number that is computed on the device."""
        weights = [0.0] * len(self.kinds)
        for batch, terms in zip(batches, parts, strict=True):
            for name, weight in kinds_in(batch, terms):
                weights[self._kind[name]] += weight
        return weights

    def shares(self, weights: Sequence[float]) -> dict[str, float]:
        """The share of each kind that a step holds, from the weights over all ranks."""
        total = sum(weights)
        return {n: w / total for n, w in zip(self.kinds, weights, strict=True) if w > 0}

    def kinds_of(
        self, sums: Sequence[float], shares: Mapping[str, float]
    ) -> dict[str, KindOfClips]:
        """The kinds of clips that a step holds, from the sums over all ranks."""
        losses = dict(zip(self.kinds, sums[-len(self.kinds) :], strict=True))
        return {name: KindOfClips(share, losses[name] / share) for name, share in shares.items()}

    def row(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics of a step from the sums over all ranks; rates are still per step, see `rates`."""
        clips, tokens, _, held, flops = sums[:5]
        count = len(self.names)
        losses, weights = sums[5 : 5 + count], sums[5 + count : 5 + 2 * count]
        row = {
            "train/tokens_per_second": tokens,
            "train/clips": clips,
            "train/clips_per_second": clips,
            "train/padding": 1.0 - tokens / held if held else 0.0,
        }
        if self.has_noise_levels:
            row["train/tflops"] = flops / 1e12
        for name, loss, weight in zip(self.names, losses, weights, strict=True):
            if weight > 0:
                row[f"train/{name}"] = loss / weight
        return row

    def rates(self, row: dict[str, float], seconds: float) -> dict[str, float]:
        """What `row` gives for a step is given a second, and MFU where the peak is known."""
        names = ("train/tokens_per_second", "train/clips_per_second", "train/tflops")
        rates = {name: row[name] / seconds for name in names if name in row}
        if self.peak and "train/tflops" in rates:
            rates["train/mfu"] = rates["train/tflops"] * 1e12 / self.peak
        return rates


def told_apart(batch: ClipBatch, terms: Terms) -> Sequence[SampleInfo]:
    """The clips of a micro-batch; none where an objective does not tell of each one's loss."""
    if len(terms) != 1 or not batch.clips:
        return ()
    (term,) = terms.values()
    return term.info if term.per_sample is not None else ()


def clips_of(batch: ClipBatch, terms: Terms) -> Iterator[ClipLoss]:
    """The clips of a micro-batch that are told apart, with the groups they count in."""
    infos = told_apart(batch, terms)
    if not infos:
        return
    (term,) = terms.values()
    assert term.per_sample is not None
    bucket = f"by_bucket/{batch.micro_batch.bucket.name}"
    for info, loss in zip(infos, term.per_sample.double().tolist(), strict=True):
        groups = [bucket, f"by_task/{info.kind}"]
        if info.t is not None:
            groups.append(f"by_t/{BANDS[band_of(info.t)]}")
        yield ClipLoss(tuple(groups), loss, info.weight)


def kinds_in(batch: ClipBatch, terms: Terms) -> list[tuple[str, float]]:
    """Kind and weight of each clip of a micro-batch, or of the micro-batch where clips are not told apart."""
    bucket = batch.micro_batch.bucket.name
    infos = told_apart(batch, terms)
    if infos:
        levels = ["" if info.t is None else f" t={BANDS[band_of(info.t)]}" for info in infos]
        weights = [info.weight for info in infos]
        return [(f"{bucket}{level}", w) for level, w in zip(levels, weights, strict=True)]
    return [(bucket, float(batch.weight))] if batch.clips else []


def parts_of_loss(
    batch: ClipBatch, terms: Terms, totals: Mapping[str, float]
) -> list[tuple[str, float]]:
    """Of each of `kinds_in` its part of the step's loss."""
    kinds = [kind for kind, _ in kinds_in(batch, terms)]
    if told_apart(batch, terms):
        (total,) = (max(totals[name], 1.0) for name in terms)
        losses = [clip.loss / total for clip in clips_of(batch, terms)]
    else:
        losses = [sum(float(term.sum) / max(totals[n], 1.0) for n, term in terms.items())]
    return list(zip(kinds, losses, strict=False))

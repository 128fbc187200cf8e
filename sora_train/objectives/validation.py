"""Validation: the loss on held-out clips at fixed noise and fixed noise levels.

The training loss says little, as each step meets other noise levels; this one can be compared from
step to step and run to run (Esser et al. 2024, arXiv:2403.03206, section 5: it follows quality).
Every clip counts the same, whatever `loss.reduce` says of training, so that two runs which differ
in it can be compared; so do all noise levels, whatever `objective.weighting` says.

Each rank takes a share of the clips and the sums meet once. Draws are keyed by clip in streams of
their own, so validating changes nothing that is trained.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from sora_train.config import Config
from sora_train.data.sample import Bucket, Clip
from sora_train.diffusion.condition_masks import kind_for
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World

BATCH = 16

Cell = tuple[str, Bucket, float]
"""Kind of conditioning, bucket and noise level."""


@torch.no_grad()
def validation_loss(
    losses_at: Callable[[list[Clip], str], list[float]],
    vae: VideoVAE,
    clips: list[Clip],
    times: Sequence[float],
    kinds: Sequence[str],
    control: ControlPlane,
    check_preemption: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`val/loss` and its parts over clips of any shapes, each clip counting the same.

    The first of `kinds` is what `val/loss`, `val/loss/t0.10` and `val/loss/9x64x64` are about (the
    buckets where there are several); `val/loss/<kind>` stands for each one where there are several.
    A clip too short for a kind is left out of it.

    A collective: every rank calls it with the same clips and gets the same numbers.

    Args:
        losses_at: sum of the losses of clips of one shape under a kind, at each of `times`.
        check_preemption: called before each batch, equally often on all ranks.
    """
    counts: dict[tuple[str, Bucket], int] = {}
    sums: dict[Cell, float] = {}
    for kind in kinds:
        fit = [clip for clip in clips if fits(clip, kind, vae)]
        for clip in fit:
            place = kind, bucket_of(clip, vae)
            counts[place] = counts.get(place, 0) + 1
            sums |= {(*place, t): 0.0 for t in times}
        for batch, counted in shares(fit, control.world):
            check_preemption()
            place = kind, bucket_of(batch[0], vae)
            for t, loss in zip(times, losses_at(batch, kind), strict=True):
                sums[*place, t] += loss if counted else 0.0
    totals = dict(zip(sums, control.sum(list(sums.values())), strict=True))
    return named(totals, counts, times, kinds)


def named(
    sums: dict[Cell, float],
    counts: dict[tuple[str, Bucket], int],
    times: Sequence[float],
    kinds: Sequence[str],
) -> dict[str, float]:
    """Means by their metrics' names; see docs/metrics.md."""

    def mean(kind: str, *, bucket: Bucket | None = None, t: float | None = None) -> float:
        places = [p for p in counts if p[0] == kind and bucket in (None, p[1])]
        levels = times if t is None else [t]
        total = sum(sums[*place, level] for place in places for level in levels)
        return total / (sum(counts[place] for place in places) * len(levels))

    measured = [kind for kind in kinds if any(place[0] == kind for place in counts)]
    if not measured:
        return {}
    first = measured[0]
    buckets = sorted(bucket for kind, bucket in counts if kind == first)
    row = {"val/loss": mean(first)}
    row |= {f"val/loss/t{t:.2f}": mean(first, t=t) for t in times}
    if len(buckets) > 1:
        row |= {f"val/loss/{bucket.name}": mean(first, bucket=bucket) for bucket in buckets}
    if len(measured) > 1:
        row |= {f"val/loss/{kind}": mean(kind) for kind in measured}
    return row


def validated_kinds(cfg: Config) -> tuple[str, ...]:
    """The kinds of `validation.kinds`, or all that are trained; text to video first, if it is one."""
    mix = cfg.objective.mix
    kinds = cfg.validation.kinds or tuple(kind for kind, share in mix if share > 0)
    return tuple(sorted(kinds, key=lambda kind: kind != "t2v"))


def fits(clip: Clip, kind: str, vae: VideoVAE) -> bool:
    """Whether a clip is long enough for a kind."""
    bucket = bucket_of(clip, vae)
    num_frames = vae.latent_shape(bucket.frames, bucket.height, bucket.width)[1]
    return kind_for(kind, num_frames) == kind


def bucket_of(clip: Clip, vae: VideoVAE) -> Bucket:
    """The shape of a clip in pixels, of stored latents too."""
    if clip.pixels is not None:
        return Bucket(*clip.pixels.shape[:3])
    assert clip.latents is not None
    _, frames, rows, columns = clip.latents.shape
    geometry = vae.geometry
    in_time, in_space = geometry.temporal_factor, geometry.spatial_factor
    return Bucket(1 + (frames - 1) * in_time, rows * in_space, columns * in_space)


def shares(clips: list[Clip], world: World) -> Iterator[tuple[list[Clip], bool]]:
    """This rank's batches, each of one shape, and whether they count: of ranks that share them the first one's.

    A sharded model gathers its weights in every forward, so all ranks make as many of them: one
    that has no clips left goes along with some that count elsewhere.
    """
    for group in same_shape(clips):
        size = min(BATCH, -(-len(group) // world.dp_size))
        batches = [group[start : start + size] for start in range(0, len(group), size)]
        for row in range(0, len(batches), world.dp_size):
            mine = row + world.dp_rank
            counted = mine < len(batches) and world.cp_rank == 0
            yield batches[mine if mine < len(batches) else 0], counted


def same_shape(clips: list[Clip]) -> list[list[Clip]]:
    """The clips by their shape, in a fixed order."""
    by_shape: dict[tuple[int, ...], list[Clip]] = {}
    for clip in clips:
        array = clip.latents if clip.latents is not None else clip.pixels
        assert array is not None
        by_shape.setdefault(array.shape, []).append(clip)
    return list(by_shape.values())


def same_shape_batches(clips: list[Clip]) -> list[list[Clip]]:
    """Batches of at most BATCH clips of one shape, in a fixed order."""
    return [
        group[start : start + BATCH]
        for group in same_shape(clips)
        for start in range(0, len(group), BATCH)
    ]

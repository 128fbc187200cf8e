"""A step's numbers: bands part the noise levels, ranks add up, and the groups together are the loss."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.config.compose import compose
from sora_train.data.tape.buckets import Bucket
from sora_train.models.flops import training_flops
from sora_train.monitoring.device_peaks import peak_flops
from sora_train.objectives import LossTerm, SampleInfo
from sora_train.training.outputs.step_metrics import (
    BANDS,
    EDGES,
    FAILURES,
    KindOfClips,
    StepMetrics,
    band_of,
)

CFG = compose(["experiment=parity_tiny"]).config
BUCKETS = [Bucket(1, 32, 32), Bucket(5, 32, 32)]
TOKENS = {BUCKETS[0].name: 4, BUCKETS[1].name: 8}
CLIP = st.tuples(
    st.floats(0, 1), st.sampled_from(["t2v", "i2v"]), st.floats(0.1, 9), st.sampled_from([1, 2])
)
BATCH = st.tuples(st.sampled_from(BUCKETS), st.lists(CLIP, max_size=4))


def numbers(peak: float | None = None, ranks: int = 1) -> StepMetrics:
    table = [SimpleNamespace(bucket=bucket) for bucket in BUCKETS]
    data = SimpleNamespace(
        tokens_of=lambda bucket: TOKENS[bucket.name],
        flops_of=lambda bucket: training_flops(
            CFG.model, CFG.text, TOKENS[bucket.name], 2, CFG.text.max_length
        ),
        table=table,
    )
    return StepMetrics(CFG, data, ranks, peak)


TOTAL = 16.0
"""Weight of the step over all ranks."""


def step_of(batches):
    """Micro-batches as the trainer holds them: what is read off them is their bucket, clips, weight and failures."""
    held, parts = [], []
    for bucket, clips in batches:
        entry = SimpleNamespace(bucket=bucket)
        held.append(
            SimpleNamespace(micro_batch=entry, clips=clips, weight=float(len(clips)), failures=[])
        )
        times, kinds, losses, weights = zip(*clips, strict=True) if clips else ((), (), (), ())
        losses = torch.tensor(losses, dtype=torch.float64)
        infos = [
            SampleInfo(kind=kind, t=t, weight=weight)
            for t, kind, weight in zip(times, kinds, weights, strict=True)
        ]
        parts.append({"velocity": LossTerm(losses.sum(), float(sum(weights)), losses, infos)})
    return held, parts, {"velocity": TOTAL}


@given(st.floats(0, 1))
def test_bands_part_the_noise_levels(t):
    band = band_of(t)
    assert EDGES[band] <= t and (t < EDGES[band + 1] or band == len(BANDS) - 1)


@settings(max_examples=50)
@given(st.lists(BATCH, min_size=1, max_size=5), st.integers(0, 5))
def test_ranks_add_up_and_the_groups_are_the_loss(batches, cut):
    book = numbers()
    whole = book.sums(*step_of(batches))
    split = [book.sums(*step_of(part)) for part in (batches[:cut], batches[cut:])]
    assert [sum(pair) for pair in zip(*split, strict=True)] == pytest.approx(whole)
    row = book.row(whole)
    clips = [(bucket, *clip) for bucket, found in batches for clip in found]
    assert row["train/clips"] == len(clips)
    assert row["train/tokens_per_second"] == sum(TOKENS[clip[0].name] for clip in clips)
    for group, key in (
        ("by_t", lambda clip: BANDS[band_of(clip[1])]),
        ("by_bucket", lambda clip: clip[0].name),
        ("by_task", lambda clip: clip[2]),
    ):
        found = {name: value for name, value in row.items() if f"/{group}/" in name}
        weights: dict[str, float] = {}
        for clip in clips:
            name = f"train/{group}/{key(clip)}"
            weights[name] = weights.get(name, 0.0) + clip[4]
        assert set(found) == set(weights)
        together = sum(found[name] * weights[name] for name in found)
        assert together == pytest.approx(sum(clip[3] for clip in clips))
    held, parts, _ = step_of(batches)
    weights = book.kind_weights(held, parts)
    halves = [book.kind_weights(held[half], parts[half]) for half in (slice(cut), slice(cut, None))]
    assert [sum(pair) for pair in zip(*halves, strict=True)] == pytest.approx(weights)
    kinds = book.kinds_of(whole, book.shares(weights))
    assert set(kinds) == {f"{clip[0].name} t={BANDS[band_of(clip[1])]}" for clip in clips}
    if clips:
        assert sum(kind.share for kind in kinds.values()) == pytest.approx(1.0)
    loss = sum(kind.share * kind.loss for kind in kinds.values())
    assert loss == pytest.approx(sum(clip[3] for clip in clips) / TOTAL)


def test_clips_that_are_not_told_apart_are_of_the_kind_of_their_bucket():
    book = numbers()
    held, parts, totals = step_of([(BUCKETS[1], [(0.5, "t2v", 3.0, 1)])])
    parts = [{"a": LossTerm(torch.tensor(3.0), 1.0), "b": LossTerm(torch.tensor(5.0), 1.0)}]
    shares = book.shares(book.kind_weights(held, parts))
    kinds = book.kinds_of(book.sums(held, parts, {"a": 16.0, "b": 2.0}), shares)
    assert kinds == {BUCKETS[1].name: KindOfClips(1.0, 3 / 16 + 5 / 2)}


def test_an_idle_slot_is_padding():
    book = numbers()
    row = book.row(book.sums(*step_of([(BUCKETS[1], []), (BUCKETS[1], [(0.5, "t2v", 1.0, 1)])])))
    assert row["train/padding"] == pytest.approx(0.5)
    assert book.sums(*step_of([(BUCKETS[1], [])]))[FAILURES] == 0


def test_mfu_counts_attention_and_no_recomputation():
    """By hand: three forwards of every matrix product of a clip of two latent frames, over the peak of two devices."""
    m, text, tokens = CFG.model, CFG.text.max_length, 8
    patch = (
        (m.in_channels + m.velocity_channels) * m.patch_size[0] * m.patch_size[1] * m.patch_size[2]
    )
    block = 8 * tokens * m.dim**2 + 4 * tokens**2 * m.dim
    block += 4 * (tokens + text) * m.dim**2 + 4 * tokens * text * m.dim
    block += 4 * tokens * m.dim * m.ffn_dim
    ends = 2 * tokens * patch * m.dim + 2 * text * (CFG.text.d_model * m.dim + m.dim**2)
    ends += 2 * 2 * (m.freq_dim * m.dim + 7 * m.dim**2)
    book = numbers(peak=1e9, ranks=2)
    row = book.row(book.sums(*step_of([(BUCKETS[1], [(0.5, "t2v", 1.0, 1)])])))
    rates = book.rates(row, seconds=2.0)
    encoder = 0.0
    if CFG.text.trainable:
        inner = CFG.text.num_heads * CFG.text.d_kv
        layer = (
            8 * CFG.text.d_model * inner + 4 * text * inner + 6 * CFG.text.d_model * CFG.text.d_ff
        )
        encoder = CFG.text.num_layers * text * layer
    expected = 3 * (m.num_layers * block + ends + encoder)
    assert rates["train/tflops"] * 1e12 == pytest.approx(expected / 2)
    assert rates["train/mfu"] == pytest.approx(expected / 2 / 2e9)
    assert "train/mfu" not in numbers().rates(row, 2.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Some CPU", None),
    ],
)
def test_peaks_go_by_the_device(name: str, peak: float | None):
    assert peak_flops(name) == peak

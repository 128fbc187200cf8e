"""One count of operations: that of the real model, and the same on the card, in metrics, plan and benchmarks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model import clip_flops, grid_of
from benchmarks.train import _measured
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.models.flops import training_flops, transformer_flops
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.vae.geometry import Geometry
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.memory.encoders import sizes_of_vae
from sora_train.tools.plan.time.work import stage_work
from sora_train.training.outputs.step_metrics import StepMetrics
from sora_train.training.pipeline.data import mean_step
from sora_train.training.pipeline.plan import (
    bucket_table,
    cost_model,
    flops_counter,
    token_counter,
)

SIZES = st.fixed_dictionaries(
    {
        "model.num_layers": st.integers(1, 3),
        "model.num_heads": st.sampled_from([1, 2]),
        "model.head_dim": st.sampled_from([16, 32]),
        "model.ffn_dim": st.sampled_from([16, 48]),
        "text.max_length": st.sampled_from([16, 32]),
        "text.padding": st.sampled_from(["wan", "masked"]),
        "text.trainable": st.booleans(),
    }
)


def config(sizes: dict[str, object]) -> Config:
    overrides = [f"{key}={str(value).lower()}" for key, value in sizes.items()]
    return compose(["experiment=parity_tiny", "model.attention=gemm", *overrides]).config


@settings(max_examples=5, deadline=None, phases=[Phase.generate])
@given(SIZES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_the_count_is_that_of_the_real_model(
    sizes: dict[str, object], frames: int, rows: int, columns: int
):
    """Forward, counted by torch while it runs."""
    cfg = config({**sizes, "model.mask_channel": False, "model.fps_embed": False})
    model = TextToVideo(cfg.model, cfg.text)
    _, p, q = cfg.model.patch_size
    latents = torch.randn(1, cfg.model.in_channels, frames, rows * p, columns * q)
    caption = "x" * (cfg.text.max_length - 1)
    if model.text_encoder is not None:
        # Torch does not count the operations of its fused attention on a CPU.
        model.text_encoder.model.set_attn_implementation("eager")
    # A frozen encoder runs here, outside the count; one that is trained runs in the model.
    text = model.tokenize([caption])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, torch.full((1, frames), 0.5), text)
    stated = training_flops(
        cfg.model, cfg.text, frames * rows * columns, frames, cfg.text.max_length
    )
    assert stated == 3 * counter.get_total_flops()


def test_attention_to_images_is_counted():
    cfg = config(
        {
            "model.in_channels": 9, "model.out_channels": 4, "model.image_dim": 24, "model.image_tokens": 6,
            "model.image_pair": True, "text.trainable": False, "model.mask_channel": False,
        }
    )  # fmt: skip
    with torch.device("meta"):
        model = VideoDiT(cfg.model)
        latents, images = torch.empty(1, 9, 2, 4, 6), torch.empty(1, 12, 24)
        with FlopCounterMode(display=False) as counter:
            model(
                latents, torch.empty(1, 2), torch.empty(1, 16, cfg.text.d_model), images_BIE=images
            )
    stated = transformer_flops(cfg.model, 2 * 6, 16, 2)
    assert stated == counter.get_total_flops()


@settings(max_examples=5, deadline=None, phases=[Phase.generate])
@given(SIZES, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_card_metrics_plan_and_benchmarks_state_the_same(
    sizes: dict[str, object], clips: list[int]
):
    cfg = config(sizes)
    geometry, patch = Geometry.of(sizes_of_vae(cfg)), cfg.model.patch_size
    table, tokens_of = bucket_table(cfg, geometry, patch), token_counter(geometry, patch)
    data = SimpleNamespace(
        tokens_of=tokens_of,
        flops_of=flops_counter(cfg, geometry, tokens_of),
        table=table,
        micro_batches=1,
    )
    peak = 1e9
    metrics = StepMetrics(cfg, data, 1, peak)
    works = {work.bucket: work for work in stage_work(cfg, Assumptions()).works}
    for spec in table:
        bucket = spec.bucket
        planned = works[bucket]
        assert planned.flops == 3 * (planned.products + planned.attention + planned.text)
        # One micro-batch a step, of each of these sizes in turn.
        epoch = SimpleNamespace(starts=np.cumsum([0, *clips]), bucket=[0] * len(clips))
        part = SimpleNamespace(
            epoch=lambda number, epoch=epoch: epoch,
            buckets=[bucket],
            per_epoch=1,
            clips_per_epoch=sum(clips),
        )
        data.part = lambda step, part=part: part
        count, tokens, flops = mean_step(data, 0)
        assert flops == sum(clips) * planned.flops and tokens == sum(clips) * planned.tokens
        batches = [
            SimpleNamespace(
                micro_batch=SimpleNamespace(bucket=bucket), weight=float(n), clips=[], failures=[]
            )
            for n in clips
        ]
        sums = metrics.sums(batches, [{}] * len(batches), {})
        assert sums[4] == flops and sums[0] == count
        row = metrics.row(sums)
        row |= metrics.rates(row, 0.5)
        row |= {"train/step_seconds": 0.5, "train/data_wait": 0.0}
        assert _measured([row])["MFU"].stats.median / 100 * peak * 0.5 == pytest.approx(
            flops, rel=1e-12
        )
        assert works[bucket].flops == training_flops(
            cfg.model, cfg.text, planned.tokens, planned.frames, cfg.text.max_length
        )


def test_the_model_benchmark_counts_the_frames_of_its_clip():
    cfg = config({})
    request = SimpleNamespace(model=cfg.model, tokens=96, caption=9)
    frames, rows, columns = grid_of(96)
    assert frames * rows * columns == 96
    assert clip_flops(request) == training_flops(cfg.model, None, 96, frames, 9)


def test_costs_of_the_tape_stay_what_they_were():
    """By hand: half a caption, one latent frame. A change here would change which clips old runs see together."""
    cfg = compose(["experiment=parity_tiny"]).config
    m, text = cfg.model, cfg.text.max_length // 2
    for tokens in (4, 96, 1000):
        block = 8 * tokens * m.dim**2 + 4 * tokens**2 * m.dim
        block += 4 * (tokens + text) * m.dim**2 + 4 * tokens * text * m.dim
        block += 4 * tokens * m.dim * m.ffn_dim
        patch = (m.in_channels + m.velocity_channels) * int(np.prod(m.patch_size))
        ends = 2 * tokens * patch * m.dim + 2 * text * (m.text_dim * m.dim + m.dim**2)
        ends += 2 * (m.freq_dim * m.dim + 7 * m.dim**2)
        expected = m.num_layers * block + ends
        if cfg.text.trainable:
            inner = cfg.text.num_heads * cfg.text.d_kv
            layer = 8 * cfg.text.d_model * inner + 4 * text * inner
            layer += 6 * cfg.text.d_model * cfg.text.d_ff
            expected += cfg.text.num_layers * text * layer
        assert cost_model(cfg)(tokens) == expected

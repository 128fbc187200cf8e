"""A step is judged on the device as the host would judge it, and a bad one leaves no trace in weights and moments."""

import math
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sora_train.config.compose import compose
from sora_train.data.sample import Bucket
from sora_train.objectives import LossTerm, SampleInfo
from sora_train.parallel.degrees import Degrees
from sora_train.parallel.fsdp import FsdpEngine
from sora_train.parallel.layout import Layout
from sora_train.runtime import world as distributed
from sora_train.runtime.world import World
from sora_train.training.optim.optim import build_optimizer
from sora_train.training.resilience.outcome import Outcome
from sora_train.training.resilience.spike_detector import Limits, judge

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
LOSS = st.floats(0.01, 100) | st.sampled_from([math.nan, math.inf])
CLIPS = st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), LOSS), min_size=1, max_size=4)
TOLD = st.tuples(st.just(True), CLIPS)
WHOLE = st.tuples(st.just(False), CLIPS)
NAMES = ("1x32x32 t=0-0.2", "1x32x32 t=0.4-0.6", "1x32x32 t=0.8-1", "1x32x32")


def step_of(batches: list) -> tuple[list, list]:
    held, parts = [], []
    bucket = Bucket(1, 32, 32)
    for told, clips in batches:
        losses = torch.tensor([loss for _, loss in clips])
        infos = [SampleInfo(kind="t2v", t=t) for t, _ in clips] if told else []
        micro = SimpleNamespace(bucket=bucket)
        held.append(SimpleNamespace(micro_batch=micro, clips=clips, weight=float(len(clips))))
        per_sample = losses if told else None
        parts.append({"velocity": LossTerm(losses.sum(), float(len(clips)), per_sample, infos)})
    return held, parts


@settings(max_examples=200)
@given(
    st.lists(TOLD | WHOLE, min_size=1, max_size=3),
    LOSS,
    st.floats(0.1, 50) | st.just(math.inf),
    st.floats(0.1, 50) | st.just(math.inf),
    st.sets(st.sampled_from(NAMES)),
)
def test_the_flag_on_the_device_is_the_verdict_of_the_host(
    batches: list, norm: float, loss_limit: float, norm_limit: float, unjudged: set[str]
) -> None:
    assert Bucket(1, 32, 32).name == NAMES[3]
    held, parts = step_of(batches)
    totals = {"velocity": 8.0}
    limits = Limits(loss_limit, norm_limit, frozenset(unjudged))
    outcome = Outcome(held, parts, totals, torch.tensor(norm, dtype=torch.float64), limits, ALONE)
    found = outcome.read()
    loss = found.sums["velocity"] / 8.0
    verdict = judge(loss, found.judged, found.grad_norm, limits)
    assert bool(outcome.bad) == verdict.bad
    # What is left out, in exact arithmetic.
    expected = counted = 0.0
    for told, clips in batches:
        for t, value in clips:
            exact = float(torch.tensor(value))
            kind = NAMES[{0.1: 0, 0.5: 1, 0.9: 2}[t]] if told else NAMES[3]
            expected += exact
            counted += exact * (kind not in unjudged)
    if math.isfinite(expected):
        assert found.sums["velocity"] == pytest.approx(expected, rel=1e-6)
        # The sum of a micro-batch is float32's, its parts are added up in float64.
        assert found.judged == pytest.approx(counted / 8.0, rel=1e-6, abs=1e-6 * expected)
        assert verdict.bad == (
            not math.isfinite(norm) or found.judged > loss_limit or norm > norm_limit
        )
    else:
        assert verdict.reason == "non_finite"
    for (_, clips), terms in zip(batches, found.parts, strict=True):
        each = terms["velocity"].per_sample
        if each is not None:
            torch.testing.assert_close(
                each.float(), torch.tensor([value for _, value in clips]), equal_nan=True
            )


@pytest.fixture
def engine(request):
    overrides = ["experiment=parity_tiny", "optim.grad_clip=0.5", *request.param]
    cfg = compose(overrides).config
    world = distributed.start("cpu", 1)
    dtype = getattr(torch, request.param[0].partition("=")[2])
    # Named as the matrices that Muon takes, and large enough for moments in 8 bits.
    layers = OrderedDict(blocks=nn.Sequential(nn.Linear(7, 600), nn.Linear(600, 3)))
    model = nn.Sequential(layers)
    if dtype == torch.float64:
        model.double()
    found = FsdpEngine(
        model,
        cfg,
        world,
        Layout(Degrees(1, 1, 1, 1), dtype),
        partial(build_optimizer, cfg.optim),
    )
    yield found
    found.close()
    distributed.stop(world)


def state_of(engine: FsdpEngine) -> dict[str, torch.Tensor]:
    state = engine.model_state() | engine.optimizer_state()
    return {name: value.clone() for name, value in state.items()}


def backward(engine: FsdpEngine, scale: float) -> None:
    draws = torch.Generator().manual_seed(0)
    dtype = next(engine.model.parameters()).dtype
    x = torch.randn(4, 7, generator=draws).to(dtype)
    engine.backward(engine.model(x).square().sum() * scale, last=True)


CASES = [
    ("parallel.param_dtype=float32", "optim=adamw"),
    ("parallel.param_dtype=bfloat16", "optim=adamw"),
    ("parallel.param_dtype=float64", "optim=adamw"),
    ("parallel.param_dtype=float32", "optim=sgd"),
    ("parallel.param_dtype=float32", "optim=adamw", "parallel.offload_optimizer=true"),
]


NAMED = ("optim.name=muon", "optim.name=schedule_free", "optim.state=int8", "optim.state=fp8")
MORE = [
    (f"parallel.param_dtype={dtype}", "optim=adamw", optimizer)
    for dtype in ("float32", "bfloat16", "float64")
    for optimizer in NAMED
]


@pytest.mark.parametrize("engine", CASES + MORE, indirect=True, ids=str)
@pytest.mark.parametrize("scale", [1.0, math.inf])
def test_a_bad_step_leaves_no_trace(engine: FsdpEngine, scale: float) -> None:
    backward(engine, 1.0)
    engine.step(0.1, engine.gradient_norm(), torch.tensor(False))
    before = state_of(engine)
    backward(engine, scale)
    engine.step(0.1, engine.gradient_norm(), torch.tensor(True))
    after = state_of(engine)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    # And the next one is a step as if it had not been.
    backward(engine, 1.0)
    engine.step(0.1, engine.gradient_norm(), torch.tensor(False))
    assert all(float(v) == 2.0 for n, v in state_of(engine).items() if n.endswith(".step"))


@pytest.mark.parametrize("engine", CASES, indirect=True, ids=str)
@pytest.mark.parametrize("scale", [0.001, 1.0])
def test_gradients_are_clipped_to_the_norm_and_no_further(engine: FsdpEngine, scale: float) -> None:
    """By torch's own clipping and optimizer, in float64."""
    masters = {n: p.detach().double().clone().requires_grad_() for n, p in engine.named.items()}
    backward(engine, scale)
    norm = engine.gradient_norm()
    for name, shard in engine.shards.items():
        assert shard.grad is not None
        masters[name].grad = shard.grad.double().clone()
    total = nn.utils.clip_grad_norm_(masters.values(), 0.5)
    assert float(norm) == pytest.approx(float(total), rel=1e-5)
    assert (float(norm) > 0.5) == (scale == 1.0)
    group = engine.optimizer.param_groups[0]
    kind = type(engine.optimizer)
    names = ("betas", "eps") if kind is torch.optim.AdamW else ()
    reference = kind(
        list(masters.values()),
        lr=0.1,
        weight_decay=0.0,
        foreach=False,
        **{name: group[name] for name in names},
    )
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = 0.0
    reference.step()
    engine.step(0.1, norm, torch.tensor(False))
    for name, weight in engine.model_state().items():
        torch.testing.assert_close(weight.double(), masters[name].detach(), rtol=1e-5, atol=1e-6)
    # AdamW's first update does not tell how large a gradient was; its moments do.
    for name, moment in engine.optimizer_state().items():
        parameter, _, key = name.rpartition(".")
        if key in ("exp_avg", "exp_avg_sq"):
            wanted = reference.state[masters[parameter]][key]
            torch.testing.assert_close(moment.double(), wanted, rtol=1e-4, atol=1e-12)
    for name, computed in engine.model.named_parameters():
        assert torch.equal(computed, engine.model_state()[name].to(computed.dtype)), name


@pytest.mark.parametrize("engine", MORE, indirect=True, ids=str)
@pytest.mark.parametrize("scale", [0.001, 1.0])
def test_optimizers_of_ours_are_given_clipped_gradients(engine: FsdpEngine, scale: float) -> None:
    """Their first moments are known parts of the gradient and its square."""
    backward(engine, scale)
    norm = engine.gradient_norm()
    clip = min(1.0, 0.5 / float(norm))
    assert (clip < 1.0) == (scale == 1.0)
    grads = {name: shard.grad.double() * clip for name, shard in engine.shards.items()}
    engine.step(0.1, norm, torch.tensor(False))
    beta1, beta2 = 0.9, 0.99
    for name, moment in engine.optimizer_state().items():
        parameter, _, key = name.rpartition(".")
        wanted = {
            "momentum": (1 - 0.95) * grads[parameter],
            "exp_avg": (1 - beta1) * grads[parameter],
            "exp_avg_sq": (1 - beta2) * grads[parameter].square(),
        }.get(key)
        if wanted is not None and moment.dtype != torch.uint8:
            torch.testing.assert_close(moment.double(), wanted, rtol=1e-4, atol=1e-12)

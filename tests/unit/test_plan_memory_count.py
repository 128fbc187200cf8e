"""The counter of live bytes, and the laws of the memory plan on fake tensors."""

from dataclasses import asdict
from functools import cache

import pytest
import torch
from sentences import refuses
from torch import nn

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.sample import Bucket
from sora_train.errors import ConfigError
from sora_train.tools.plan.memory.count import Held
from sora_train.tools.plan.memory.plan import KINDS, MemoryPlan, memory_of
from sora_train.training.optim.muon import is_matrix

MODEL = (
    "experiment=parity_tiny", "model.num_heads=4", "model.head_dim=32", "model.ffn_dim=256",
    "text.trainable=false", "optim=adamw", "parallel=fsdp", "train.micro_batches=1",
)  # fmt: skip
BUCKET = Bucket(9, 128, 128)


@cache
def plan(world: int, *overrides: str, layers: int = 3) -> MemoryPlan:
    cfg: Config = compose([*MODEL, f"model.num_layers={layers}", *overrides]).config
    return memory_of(cfg, world, BUCKET, 2, device="cpu")


def test_counts_what_is_alive_and_what_was_at_the_height() -> None:
    with Held() as held:
        held.during("work")
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        assert held.total == 8000
        del a, b
        assert held.total == 4000
        del view
        assert held.total == 0
    assert sum(held.peaks["work"].values()) == 8000


def test_a_storage_that_is_emptied_and_filled_again_counts_as_it_is() -> None:
    with Held() as held:
        a = torch.zeros(1000)
        a.untyped_storage().resize_(0)
        assert held.total == 0
        a.untyped_storage().resize_(4000)
        assert held.total == 4000
        del a
        assert held.total == 0
    assert torch.UntypedStorage.resize_.__name__ == "resize_"


def test_kinds_are_told_apart_and_the_host_is_no_part_of_the_sum() -> None:
    with Held() as held:
        with held.making("weights"):
            weight = nn.Linear(10, 10, bias=False).weight
        moved = torch.zeros(50)
        held.mark([moved], "host")
        assert held.now["weights"] == 400
        assert held.now["host"] == 200
        assert held.total == 400
    assert weight.numel() == 100


def test_parts_sum_to_the_peak_and_states_are_the_closed_form() -> None:
    found = plan(2)
    assert sum(asdict(found)[kind] for kind in KINDS) == found.peak
    from sora_train.models.transformer.dit import VideoDiT

    with torch.device("meta"):
        model = VideoDiT(compose([*MODEL, "model.num_layers=3"]).config.model)
    # FSDP splits the first dimension, filled up to a multiple of the ranks.
    shards = sum(4 * -(-p.shape[0] // 2) * p.numel() // p.shape[0] for p in model.parameters())
    values = sum(1 for _ in model.parameters())
    assert found.weights == shards
    assert found.ema == shards
    assert found.optimizer == 2 * shards + 4 * values


def test_what_other_optimizers_keep_is_counted() -> None:
    adamw, muon, int8 = plan(2), plan(2, "optim.name=muon"), plan(2, "optim.state=int8")
    from sora_train.models.transformer.dit import VideoDiT

    with torch.device("meta"):
        model = VideoDiT(compose([*MODEL, "model.num_layers=3"]).config.model)
    named = {f"transformer.{name}": p for name, p in model.named_parameters()}
    rows = {name: -(-p.shape[0] // 2) for name, p in named.items()}
    # A second moment and a count of steps fewer for each matrix.
    matrices = [name for name, p in named.items() if is_matrix(name, p)]
    saved = sum(4 * rows[n] * named[n].numel() // named[n].shape[0] + 4 for n in matrices)
    assert adamw.optimizer - muon.optimizer == saved > 0.2 * adamw.optimizer
    # 3 bytes of 4 for each coded moment, but for a scale of each row's 256 values.
    coded = [n for n, p in named.items() if p.ndim > 1 and p.numel() >= 4096]
    widths = {n: named[n].shape[1:].numel() for n in coded}
    saved = sum(2 * rows[n] * (3 * widths[n] - 4 * -(-widths[n] // 256)) for n in coded)
    assert adamw.optimizer - int8.optimizer == saved > 0.5 * adamw.optimizer
    assert muon.weights == int8.weights == adamw.weights


@pytest.mark.slow
def test_shards_are_filled_up_where_the_ranks_do_not_divide_a_dimension() -> None:
    from sora_train.models.transformer.dit import VideoDiT

    with torch.device("meta"):
        model = VideoDiT(compose([*MODEL, "model.num_layers=3"]).config.model)
    assert plan(7).weights == sum(
        4 * -(-p.shape[0] // 7) * p.numel() // p.shape[0] for p in model.parameters()
    )


@pytest.mark.slow
def test_more_shards_hold_no_more() -> None:
    peaks = [plan(world).peak for world in (2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.slow
def test_checkpointing_and_context_parallelism_lower_activations() -> None:
    none, selective, full = (
        plan(2, f"parallel.activation_checkpointing={kind}").activations
        for kind in ("none", "selective", "full")
    )
    assert full < selective < none
    cut = [plan(4, f"parallel.ulysses={u}").activations for u in (1, 2, 4)]
    assert cut[0] > cut[1] > cut[2]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_deep_models_are_counted_exactly_from_two_depths(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = f"parallel.activation_checkpointing={checkpointing}"
    from_two = plan(2, option, layers=11)
    monkeypatch.setattr("sora_train.tools.plan.memory.plan.DEPTHS", (11, 12))
    cfg = compose([*MODEL, "model.num_layers=11", option]).config
    assert memory_of(cfg, 2, BUCKET, 2, device="cpu") == from_two


def test_a_task_without_tokens_is_refused() -> None:
    cfg = compose(["experiment=tiny_vae"]).config
    with refuses(ConfigError, "task=vae", "planned"):
        memory_of(cfg, 1, BUCKET, 1)

"""Promise 1 with a frozen base of codes: the same losses, norms and adapter in every layout, and of a swapped base the
same bits.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from memory_worker import train

from sora_train.config.compose import compose
from sora_train.errors import ConfigError
from sora_train.models.quantised.codes import KINDS
from sora_train.models.quantised.linear import quantised_layers
from sora_train.training.trainer import Trainer

WORKER = Path(__file__).with_name("memory_worker.py")
SIZES = ["model.num_heads=2", "model.head_dim=32", "model.ffn_dim=128", "model.num_layers=4"]
SHORT = [*SIZES, "train.steps=3", "validation.every=0", "train.micro_batches=2"]
ADAPTER = [
    *SHORT, "adapter.rank=4", "adapter.targets=[attention+mlp]", "optim.lr=1.0",
    "parallel.param_dtype=float64",
]  # fmt: skip
LAYOUTS = {
    "fsdp": ["parallel.dp_shard=2"],
    "ddp": ["parallel.dp_replicate=2", "parallel.dp_shard=1"],
    "ulysses": ["parallel.ulysses=2"],
    "ring": ["parallel.ring=2"],
    # Its masters are float32.
    "zero2": ["parallel.engine=zero2", "parallel.param_dtype=float32"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What an adapter needs to begin with: a run whose last layer is no longer zero."""
    folder = tmp_path_factory.mktemp("base") / "run"
    cfg = compose(["experiment=parity_tiny", f"run.dir={folder}", *SHORT, "optim.lr=0.5"]).config
    Trainer(cfg).train()
    return [f"init.run={folder}", "init.weights=live"]


def require_alike(mine: Path, theirs: Path, digits: float = 1e-9) -> None:
    one, other = torch.load(mine), torch.load(theirs)
    assert len(one["numbers"]) == 3 and len({loss for loss, _ in one["numbers"]}) == 3
    for a, b in zip(one["numbers"], other["numbers"], strict=True):
        assert a == pytest.approx(b, rel=digits)
    assert one["weights"].keys() == other["weights"].keys()
    assert all(
        name.endswith(("lora_A.default.weight", "lora_B.default.weight")) for name in one["weights"]
    )
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, other["weights"][name], rtol=100 * digits, atol=digits), name


def ranks(folder: Path, count: int, cells: list[list[str]]) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
        str(WORKER), str(folder), *map(json.dumps, cells),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_layouts_agree_with_one_process(base: list[str], tmp_path: Path) -> None:
    kinds = dict(zip(LAYOUTS, ["nf4", "int8", "fp8", "nf4", "int8"], strict=True))
    cells = [[*ADAPTER, *base, *LAYOUTS[name], f"memory.base={kinds[name]}"] for name in LAYOUTS]
    ranks(tmp_path / "two", 2, cells)
    for number, kind in enumerate(KINDS):
        train(tmp_path / "one", number, [*ADAPTER, *base, f"memory.base={kind}"])
    narrow = ["parallel.param_dtype=float32", "memory.base=int8"]
    train(tmp_path / "one", len(KINDS), [*ADAPTER, *base, *narrow])
    for number, name in enumerate(LAYOUTS):
        of, digits = (len(KINDS), 1e-5) if name == "zero2" else (KINDS.index(kinds[name]), 1e-9)
        mine, single = tmp_path / "two" / f"cell-{number}.pt", tmp_path / "one" / f"cell-{of}.pt"
        require_alike(mine, single, digits)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replicas_of_shards_agree_with_one_process(base: list[str], tmp_path: Path) -> None:
    micro = ["train.micro_batches=4", "parallel.accumulate=sharded"]
    cells = [
        [
            *ADAPTER,
            *base,
            *micro,
            "parallel.dp_replicate=2",
            "parallel.dp_shard=2",
            "memory.base=nf4",
        ]
    ]
    ranks(tmp_path / "four", 4, cells)
    train(tmp_path / "one", 0, [*ADAPTER, *base, "train.micro_batches=4", "memory.base=nf4"])
    require_alike(tmp_path / "four" / "cell-0.pt", tmp_path / "one" / "cell-0.pt")


@pytest.mark.parametrize("kind", ["compute", "nf4"])
def test_a_swapped_base_gives_the_same_bits(base: list[str], tmp_path: Path, kind: str) -> None:
    wanted = [*ADAPTER, *base, f"memory.base={kind}"]
    train(tmp_path, 0, wanted)
    train(tmp_path, 1, [*wanted, "memory.swap_blocks=3"])
    plain, swapped = (torch.load(tmp_path / f"cell-{number}.pt") for number in range(2))
    assert plain["numbers"] == swapped["numbers"]
    for name, weight in plain["weights"].items():
        assert torch.equal(swapped["weights"][name], weight), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_computes_with_the_bases_own_weights(
    base: list[str], parity_config: Callable, kind: str
) -> None:
    """Codes of what `init.run` holds, read in rows, and in DoRA lengths of what they widen to."""
    wanted = [*ADAPTER, *base, "adapter.dora=true"]
    plain = Trainer(parity_config(*wanted, name="plain"))
    coded = Trainer(parity_config(*wanted, f"memory.base={kind}", name="coded"))
    weights = dict(plain.engine.model.named_parameters())
    layers = quantised_layers(coded.engine.model)
    assert len(layers) == 4 * 10
    for name, layer in layers.items():
        exact = weights[f"{name}.base_layer.weight"]
        assert 0 < (layer.weight - exact).abs().max() <= 0.16 * exact.abs().max(), name
        lengths = coded.engine.model_state()[f"{name}.lora_magnitude_vector.default.weight"]
        assert torch.allclose(lengths, layer.weight.norm(dim=1), rtol=1e-6)
    for trainer in (plain, coded):
        trainer.close()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["memory.base=nf4"], ["memory.base=nf4", "adapter.rank"]),
        (["memory.swap_blocks=4"], ["memory.swap_blocks=4", "adapter.rank"]),
        ([*ADAPTER, "init.run=x", "memory.swap_blocks=2"], ["memory.swap_blocks=2", "3 or more"]),
        (
            [*ADAPTER, "init.run=x", "memory.swap_blocks=9"],
            ["memory.swap_blocks=9", "num_layers=4"],
        ),
        (
            [*ADAPTER, "init.run=x", "memory.base=nf4", "model.head_dim=24"],
            ["memory.base=nf4", "head_dim=48", "int8"],
        ),
        (
            [*ADAPTER, "init.run=x", "memory.base=int8", "model.float8=rowwise"],
            ["memory.base=int8", "model.float8=rowwise"],
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(wanted: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compose(["experiment=parity_tiny", *wanted])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["memory.base=int8", "parallel.engine=zero3"], ["memory.base=int8", "zero3", "fsdp"]),
        (["memory.swap_blocks=3", "parallel.engine=zero2"], ["memory.swap_blocks=3", "zero2"]),
    ],
)
def test_what_an_engine_cannot_hold_is_refused(
    base: list[str], parity_config: Callable, wanted: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        Trainer(parity_config(*ADAPTER, *base, *wanted))
    assert all(word in str(error.value) for word in words), error.value

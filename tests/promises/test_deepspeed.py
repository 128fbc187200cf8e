"""Promises 1 and 3 for DeepSpeed: ZeRO-1, 2, 3 give the numbers of one process, and a run moves between engines.

Plain SGD without clipping (AdamW and clipping both hide a wrong scale) and AdamW with it, in float32, whose rounding
is all that may differ. Videos and images are mixed, some micro-batches weigh nothing, and before the third step another
one is computed and skipped: what that leaves behind would be seen in the steps after it.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_worker import LONG, run_cell

from sora_train.monitoring.metrics import read_metrics
from sora_train.runtime import world as distributed
from sora_train.training.trainer import Trainer

WORKER = Path(__file__).with_name("deepspeed_worker.py")
SGD = ["optim=sgd", "optim.lr=0.05", "optim.grad_clip=0"]
ADAMW = [
    "optim=adamw", "optim.lr=0.001", "optim.grad_clip=0.1", "optim.text_lr_scale=0.5", "optim.weight_decay=0.1",
]  # fmt: skip
KINDS = {
    f"{name} x {count} micro-batches": [*kind, f"train.micro_batches={count}"]
    for name, kind in (("sgd", SGD), ("adamw", ADAMW))
    for count in (2, 5)
}
"""Five micro-batches on two ranks are three a rank, one of them a slot left over."""
CELLS = {
    f"{engine} {kind}": [f"parallel={engine}", *overrides]
    for engine in ("zero1", "zero2", "zero3")
    for kind, overrides in KINDS.items()
}
VAE = ["task=vae", *SGD, "optim.lr=0.001", "train.micro_batches=2"]
VAE_CELLS = {f"{engine} vae": [f"parallel={engine}", *VAE] for engine in ("fsdp", "zero1")}
"""In each row of micro-batches one rank has an image, which passes no convolution over time, and the other a clip."""
FAST = (
    "zero1 sgd x 5 micro-batches", "zero2 adamw x 5 micro-batches", "zero3 sgd x 5 micro-batches",
)  # fmt: skip
"""A cell of each; the others are slow."""
ADAMW_5 = KINDS["adamw x 5 micro-batches"]
OFFLOADED = {
    "zero1 offloaded": ["parallel=zero1", "parallel.offload_optimizer=true", *ADAMW_5],
    "zero2 offloaded": ["parallel=zero2", "parallel.offload_optimizer=true", *ADAMW_5],
    "zero3 offloaded": [
        "parallel=zero3", "parallel.offload_optimizer=true", "parallel.offload_params=true", *ADAMW_5,
    ],
}  # fmt: skip
TUNED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 100,
        # Let go of a weight as soon as its block is done, as a model that does not fit has to.
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
        "reduce_bucket_size": 1000,
        "contiguous_gradients": False,
        "sub_group_size": 20000,
    },
    "gradient_clipping": 0.1,
    "train_batch_size": "auto",
}
TUNED_CELLS = {
    f"zero3 adamw x 5 micro-batches: {options}": [
        *("parallel=zero3", *ADAMW_5),
        *(f"parallel.{option}" for option in options.split()),
    ]
    for options in (
        "activation_checkpointing=full offload_activations=true",
        "activation_checkpointing=selective mlp_chunks=3",
    )
}
"""Of a model whose weights come and go, block by block, with what is computed again."""
BF16 = {
    f"{engine} bfloat16": [f"parallel={engine}", *ADAMW_5, "parallel.param_dtype=bfloat16"]
    for engine in ("fsdp", "zero1", "zero2", "zero3")
}
ALTERNATING = {
    f"{engine} alternating": [f"parallel={engine}", *KINDS["adamw x 2 micro-batches"], LONG]
    for engine in ("fsdp", "zero3")
}
LAYOUT_WORKER = Path(__file__).with_name("layout_worker.py")


def launch(worker: Path, out: Path, cells: list[list[str]]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(worker), str(out), *map(json.dumps, cells)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def run_cells(folder: Path, cells: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Every cell on two ranks, in one launch."""
    run = launch(WORKER, folder / "found.pt", list(cells.values()))
    # Nothing of DeepSpeed's own lines, and none of its warnings.
    assert run.stdout == "" and "DeepSpeed" not in run.stderr and "Warning" not in run.stderr
    return dict(zip(cells, torch.load(folder / "found.pt"), strict=True))


@pytest.fixture(scope="module")
def world() -> Iterator[distributed.World]:
    world = distributed.start("cpu", 1)
    yield world
    distributed.stop(world)


@pytest.fixture(scope="module")
def one(world: distributed.World) -> dict[str, dict[str, Any]]:
    """The references: one process."""
    return {kind: run_cell(cell, world) for kind, cell in (KINDS | {"vae": VAE}).items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    (folder / "tuned.json").write_text(json.dumps(TUNED))
    file = f"parallel.deepspeed_json={folder / 'tuned.json'}"
    tuned = {name: [*cell, file] for name, cell in TUNED_CELLS.items()}
    return run_cells(folder, {name: CELLS[name] for name in FAST} | tuned | VAE_CELLS)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    rest = {name: cell for name, cell in CELLS.items() if name not in FAST}
    return run_cells(tmp_path_factory.mktemp("others"), rest)


def apart(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The norm of the difference over that of the values, over all tensors together."""
    assert some.keys() == others.keys()
    square = sum(
        float((some[name].double() - value).square().sum()) for name, value in others.items()
    )
    return (square / sum(float(value.double().square().sum()) for value in others.values())) ** 0.5


def assert_same(cell: dict[str, Any], reference: dict[str, Any], tolerance: float = 2e-6) -> None:
    assert len(cell["curve"]) == len(reference["curve"]) > 0
    for step, (found, expected) in enumerate(
        zip(cell["curve"], reference["curve"], strict=True), 1
    ):
        assert found == pytest.approx(expected, rel=tolerance), f"loss and norm of step {step}"
    assert apart(cell["weights"], reference["weights"]) < tolerance
    if reference["moments"]:
        assert apart(cell["moments"], reference["moments"]) < tolerance
    else:
        # AdamW divides by a gradient's size, rounding that is all there is of some included; SGD does not.
        assert cell["moments"] == {}
        for name in reference["weights"]:
            # Gradients of a key's bias are sums that cancel, since a softmax hardly sees it: with the query's it is.
            together = {name, name.replace("to_k.bias", "to_q.bias")}
            mine, theirs = (
                {one: run["weights"][one] for one in together} for run in (cell, reference)
            )
            assert apart(mine, theirs) < tolerance, name


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [*FAST, *TUNED_CELLS, *VAE_CELLS])
def test_numbers_of_one_process(
    two: dict[str, dict[str, Any]], one: dict[str, dict[str, Any]], name: str
) -> None:
    kind = name.partition(":")[0].split(" ", 1)[1]
    assert_same(two[name], one[kind])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in CELLS if name not in FAST])
def test_numbers_of_one_process_in_every_cell(
    others: dict[str, dict[str, Any]], one: dict[str, dict[str, Any]], name: str
) -> None:
    assert_same(others[name], one[name.split(" ", 1)[1]])


def test_the_comparison_can_fail(one: dict[str, dict[str, Any]]) -> None:
    sgd, other = (one[f"sgd x {count} micro-batches"] for count in (2, 5))
    with pytest.raises(AssertionError):
        assert_same(sgd, other)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_offloaded_in_bfloat16_and_alternating(
    tmp_path: Path, one: dict[str, dict[str, Any]]
) -> None:
    """Host memory changes no number; bfloat16 is that of FSDP; images and videos by turns end."""
    found = run_cells(tmp_path, OFFLOADED | BF16 | ALTERNATING)
    for name in OFFLOADED:
        assert_same(found[name], one["adamw x 5 micro-batches"])
    fsdp = found["fsdp bfloat16"]
    for name in BF16:
        assert found[name]["dtypes"] == ["torch.float32" if "fsdp" in name else "torch.bfloat16"]
        assert {value.dtype for value in found[name]["weights"].values()} == {torch.float32}
        # A weight that is rounded otherwise by one bit is 4e-3 away.
        for mine, other in zip(found[name]["curve"], fsdp["curve"], strict=True):
            assert mine == pytest.approx(other, rel=1e-2)
        assert apart(found[name]["weights"], fsdp["weights"]) < 1e-2
    for name in ALTERNATING:
        assert len(found[name]["curve"]) == 50
    long, short = (found[name]["curve"] for name in ALTERNATING)
    assert long[-1] == pytest.approx(short[-1], rel=1e-3)


def rows(run_dir: Path) -> list[dict[str, float]]:
    compared = ("train/loss", "train/grad_norm", "val/loss", "val/live/loss")
    return [
        {key: row[key] for key in compared if key in row}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_moves_between_engines(parity_config: Callable, tmp_path: Path) -> None:
    """One process, ZeRO-2 and ZeRO-3 on two ranks, one process: a step each, then the checkpoint.

    Weights, moments and averages come from the engine before; the run's own probe compares as well.
    """
    every = [*ADAMW, "train.steps=4", "checkpoint.every=1", "checkpoint.keep_last=9"]
    every += ["validation.every=1", "resume.probe_tolerance=1e-5"]
    straight = parity_config(*every, name="straight")
    Trainer(straight).train()
    engines, before = ("zero2", "zero3"), tmp_path / "straight"
    # What the config says as well, which the self-test at the start has to see so too.
    clipped = tmp_path / "clipped.json"
    clipped.write_text(json.dumps({"gradient_clipping": 0.1}))
    every_zero = [*every, f"parallel.deepspeed_json={clipped}"]
    cells = []
    for number, engine in enumerate(engines):
        cells.append([*every_zero, f"parallel={engine}", f"resume.run={before}@{number + 1}"])
        before = tmp_path / "two" / f"cell-{number}"
    launch(LAYOUT_WORKER, tmp_path / "two", cells)
    Trainer(parity_config(*every, f"resume.run={before}@3", name="last")).train()
    expected = rows(tmp_path / "straight")
    for run_dir in [
        *(tmp_path / "two" / f"cell-{i}" for i in range(len(engines))),
        tmp_path / "last",
    ]:
        found = rows(run_dir)
        assert len(found) == len(expected) == 4
        for step, (row, reference) in enumerate(zip(found, expected, strict=True), 1):
            assert row == pytest.approx(reference, rel=5e-6), f"{run_dir.name}, step {step}"

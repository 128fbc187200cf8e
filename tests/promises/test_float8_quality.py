"""Products in float8 learn as bfloat16 does: their curves of held-out loss part by less than seeds part."""

import statistics

import pytest

from sora_train.config.compose import compose
from sora_train.monitoring.metrics import read_metrics
from sora_train.parallel.memory.float8 import is_installed
from sora_train.training.trainer import Trainer

SEEDS = (0, 1, 2)
LEARNS = (
    "experiment=quickstart",
    "parallel.param_dtype=bfloat16",
    "train.steps=120",
    "optim.warmup_steps=20",
    "validation.every=40",
    "data.shapes_clips=96",
    "data.shapes_val_clips=16",
    "data.num_workers=1",
    "run.threads=1",
    "checkpoint.every=1000",
    "checkpoint.rehearse=false",
    "sample.every=0",
    "sample.oracle_prompts=0",
)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason="needs the extra float8")
@pytest.mark.timeout(3000)
def test_float8_parts_from_bfloat16_by_less_than_seeds_part(
    tmp_path_factory: pytest.TempPathFactory,
):
    """Printed with `-s`: held-out loss by step of every run, and both distances. One seed decides clips, first weights
    and draws."""
    curves: dict[str, dict[int, list[float]]] = {}
    for float8 in ("off", "rowwise"):
        curves[float8] = {}
        for seed in SEEDS:
            folder = tmp_path_factory.mktemp(f"{float8}{seed}")
            changes = (f"model.float8={float8}", f"seed={seed}", f"run.dir={folder / 'run'}")
            Trainer(compose([*LEARNS, *changes]).config).train()
            rows = read_metrics(folder / "run" / "metrics.jsonl")
            curves[float8][seed] = [row["val/loss"] for row in rows if "val/loss" in row]
            print(float8, seed, [round(loss, 4) for loss in curves[float8][seed]])
    columns = list(zip(*curves["off"].values(), strict=True))
    assert len(columns) == 3 and statistics.mean(columns[-1]) < 0.9 * statistics.mean(columns[0])
    for place, losses in enumerate(columns):
        spread = max(losses) - min(losses)
        parted = [abs(curves["rowwise"][s][place] - curves["off"][s][place]) for s in SEEDS]
        print(f"seeds part by {spread:.4f}, float8 from bfloat16 by at most {max(parted):.4f}")
        # Without a difference the option would have had no effect.
        assert 0 < max(parted) < spread

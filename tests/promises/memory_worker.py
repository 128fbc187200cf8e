"""Run under torchrun by test_memory_options: trains one cell after another in one process group.

Arguments: a folder, then one JSON list of overrides a cell. Rank 0 writes the losses, gradient norms and final
weights of each cell to FOLDER/cell-N.pt; every rank the most bytes that lived while the first weights of a larger
model were made to FOLDER/built-RANK.json.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.memory import LiveBytes
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.monitoring.metrics import read_metrics
from sora_train.parallel.engine import build_engine, resolve_layout
from sora_train.parallel.materialise import fill
from sora_train.parallel.shards import full
from sora_train.runtime import world as distributed
from sora_train.training.components import build_model
from sora_train.training.optim.optim import build_optimizer
from sora_train.training.trainer import Trainer


def train(folder: Path, number: int, overrides: list[str]) -> None:
    run_dir = folder / f"cell-{number}"
    cfg = compose(["experiment=parity_tiny", f"run.dir={run_dir}", *overrides]).config
    kept: dict[str, torch.Tensor] = {}

    class Kept(Trainer):
        def close(self) -> None:
            if hasattr(self, "engine"):
                kept.update((k, full(v).clone()) for k, v in self.engine.model_state().items())
            super().close()

    # A subclass that leaves build_model alone trains what the stock Trainer does.
    Kept(cfg).train()
    if not dist.is_initialized() or dist.get_rank() == 0:
        rows = read_metrics(run_dir / "metrics.jsonl")
        numbers = [(row["train/loss"], row["train/grad_norm"]) for row in rows]
        torch.save({"numbers": numbers, "weights": kept}, folder / f"cell-{number}.pt")


def watch_building(folder: Path, cfg: Config) -> None:
    world = distributed.start("cpu", 1)
    world, layout = resolve_layout(cfg, world)
    with LiveBytes() as live:
        model = build_model(cfg, empty=True)
        frozen = live.now
        engine = build_engine(model, cfg, world, layout, partial(build_optimizer, cfg.optim))
        fill(engine.model_state(), model.initial_values(cfg.seed))
    sizes = [4 * p.numel() for p in model.parameters()]
    found = {"peak": live.peak - frozen, "model": sum(sizes), "largest": max(sizes)}
    (folder / f"built-{world.rank}.json").write_text(json.dumps(found))


def main() -> None:
    folder, *cells = sys.argv[1:]
    dist.init_process_group("gloo")
    for number, cell in enumerate(cells):
        train(Path(folder), number, json.loads(cell))
    larger = ["model.num_layers=6", "model.num_heads=4", "model.head_dim=32", "model.ffn_dim=512"]
    watch_building(Path(folder), compose(["experiment=parity_tiny", *larger]).config)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

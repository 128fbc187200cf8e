"""Trains cells of the parity matrix, one after the other in one process group; started by parity.py.

    python -m sora_train.tools.doctor.parity.worker PLAN.json

Every rank of every world size is a fork of this process, so that torch is imported once. A cell leaves its
losses, norms and bytes in FOLDER/result.json and its weights in FOLDER/weights.pt.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import types
from collections import Counter
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.sample import ClipBatch
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import TextToVideoObjective
from sora_train.parallel.checks.volume import CountedVolume, Slot, expected_volume, units_of
from sora_train.parallel.shards import full
from sora_train.training.trainer import Trainer

PATIENCE = timedelta(seconds=300)
COUNTED_STEP = 2
"""The step (counted from 0) whose bytes are counted: the engines have settled by then."""


class ParityTrainer(Trainer):
    """A trainer whose master weights are float64 where compute is, and which keeps the batches of its last step."""

    batches: list[ClipBatch]
    units: list[list[torch.Size]]

    def build_model(self, empty: bool = False) -> nn.Module:
        model = super().build_model()
        self.units = units_of(model)
        if self.cfg.parallel.param_dtype != "float64":
            return model
        for module in model.modules():
            if isinstance(module, UMT5LayerNorm):
                module.forward = types.MethodType(norm_in_own_dtype, module)
        return model.double()

    def read(self) -> tuple[list[ClipBatch], list[dict[str, float]], Exception | None]:
        batches_read = super().read()
        self.batches = batches_read[0]
        return batches_read

    def expected(self) -> Counter[str]:
        """Bytes of the last step by the formula, this rank's part."""
        assert isinstance(self.objective, TextToVideoObjective)
        slots = [
            Slot(max(1, len(batch.clips)), *self.objective.token_grid(batch))
            for batch in self.batches
        ]
        dtype = self.engine.param_dtype  # type: ignore[attr-defined]
        return expected_volume(self.cfg, self.degrees, self.units, slots, dtype)


def norm_in_own_dtype(norm: UMT5LayerNorm, x: Tensor) -> Tensor:
    """A norm computed in the dtype of `x`. The original squares in float32 whatever the dtype, where a difference in
    the 16th digit may become one in the 8th."""
    return nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def train(overrides: list[str], folder: Path, until: int, result_file: str) -> None:
    """Take the steps of one run up to `until`; rank 0 writes the result."""
    trainer = ParityTrainer(compose([*overrides, f"run.dir={folder}"]).config)
    rows, counted, expected = [], {}, {}
    try:
        for step in range(trainer.step, until):
            volume = CountedVolume([trainer.control.group, trainer.control.peers])
            with volume if step == COUNTED_STEP else nullcontext():
                row = trainer.train_step()
            rows.append({key: row[key] for key in ("train/loss", "train/grad_norm", "train/clips")})
            if step == COUNTED_STEP:
                counted, expected = added(volume.bytes), added(trainer.expected())
        if until < trainer.cfg.train.steps:
            trainer.save()
            trainer.commit()
        weights = {
            name: full(value).cpu().clone() for name, value in trainer.engine.model_state().items()
        }
    finally:
        trainer.close()
    if trainer.world.is_main:
        torch.save(weights, folder / "weights.pt")
        result = {"rows": rows, "counted": counted, "expected": expected}
        (folder / result_file).write_text(json.dumps(result))


def added(mine: Counter[str]) -> dict[str, float]:
    """The sums over all ranks."""
    ranks: list[Any] = [mine]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
    total: Counter[str] = Counter()
    for rank in ranks:
        total.update(rank)
    return {kind: round(value, 3) for kind, value in total.items()}


def run_rank(rank: int, launch: int, plan: dict[str, Any]) -> None:
    folder, size = Path(plan["folder"]), plan["launches"][launch]["world"]
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    with (folder / f"log-{launch}.{rank}").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if size > 1:
        store = dist.FileStore(str(folder / f"store-{launch}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    for cell in plan["launches"][launch]["cells"]:
        own = folder / cell["folder"]
        if rank == 0:
            share_clips(folder, own)
        if size > 1:
            dist.barrier()
        train(cell["overrides"], own, cell["until"], cell["result"])
        if rank == 0:
            with (folder / "done").open("a") as file:
                file.write(cell["folder"] + "\n")
    if size > 1:
        dist.destroy_process_group()


def share_clips(folder: Path, own: Path) -> None:
    """Copy the clips that the first cell rendered; they are the same in all cells."""
    for made in sorted(folder.glob("*/data")):
        if made.parent != own and not (own / "data").exists():
            shutil.copytree(made, own / "data")


def import_everything() -> None:
    """Import what a rank does, building a small model too, so that forks of this process begin at once."""
    torch.set_num_threads(1)
    cfg: Config = compose(["experiment=parity_tiny"]).config
    TextToVideo(cfg.model, cfg.text, seed=cfg.seed)
    VideoVAE.from_config(cfg.vae)


def end_with(parent: int) -> None:
    """Kill this session's processes when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    plan = json.loads(Path(sys.argv[1]).read_text())
    import_everything()
    for number, launch in enumerate(plan["launches"]):
        torch.multiprocessing.start_processes(
            run_rank, (number, plan), nprocs=launch["world"], start_method="fork"
        )


if __name__ == "__main__":
    main()

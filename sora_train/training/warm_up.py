"""Before the first step of a compiled run: one forward and backward pass of every size that it will meet.

All ranks compile together under a deadline of their own (`health.compile_seconds`), so a compiler that
hangs is named as such and no rank waits in the middle of a step for another one's compiler. Clips are
black and count for nothing: no weight, moment, average or draw of the run is touched.
"""

from typing import TYPE_CHECKING

import torch

from sora_train.base.progress import Progress
from sora_train.data.sample import Bucket, ClipBatch, MicroBatch
from sora_train.objectives import placeholder
from sora_train.parallel.compile import resolve_compile

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer


def warm_up(trainer: "Trainer") -> None:
    """Run every size once; a collective."""
    found = sizes(trainer)
    with Progress(len(found), "compiling", enabled=trainer.world.is_main) as bar:
        for done, (bucket, clips) in enumerate(found, 1):
            with trainer.health.phase("compile"):
                run_once(trainer, bucket, clips)
                # Until the slowest rank is done, this is its phase too.
                trainer.control.barrier()
            bar.update(done, size=f"{clips} x {bucket.name}")


def sizes(trainer: "Trainer") -> list[tuple[Bucket, int]]:
    """Buckets with clips, and clips in a micro-batch that each is compiled for: a compiler takes one clip apart
    from several, and without symbolic sizes every number from the others."""
    cfg, data = trainer.cfg, trainer.data
    full = data.part(trainer.data_step).sizes
    counts = data.assignment.clips_per_bucket(data.table)
    static = resolve_compile(cfg.model.compile, trainer.world.device) == "static"
    found: list[tuple[Bucket, int]] = []
    for spec in data.table:
        if not counts.get(spec.bucket.name, 0):
            continue
        # A bucket with fewer clips than a micro-batch has its rests alone; a slot without any holds one clip.
        most = full.get(spec.bucket, counts[spec.bucket.name])
        found += [(spec.bucket, n) for n in sorted({1, most if static else min(most, 2)})]
    return found


def run_once(trainer: "Trainer", bucket: Bucket, clips: int) -> None:
    """A micro-batch of so many black clips through forward, backward and norm; its gradients are forgotten."""
    empty = ClipBatch(MicroBatch(-1, bucket, 0, (), ()), [], [], 0.0)
    batch = ClipBatch(empty.micro_batch, placeholder(empty) * clips, [], 0.0)
    terms = trainer.objective.terms(trainer.engine.model, batch)
    loss = torch.stack([term.sum for term in terms.values()]).sum() * 0.0
    trainer.engine.backward(loss, last=True)
    trainer.engine.gradient_norm()
    trainer.engine.skip()
    trainer.objective.skip()

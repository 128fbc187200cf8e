"""Before the first step of a compiled run: one forward and backward pass of every size that it will meet.

All ranks compile together under a deadline of their own (`health.compile_seconds`), so a compiler that
hangs is named as such and no rank waits in the middle of a step for another one's compiler. Clips are
black and count for nothing: no weight, moment, average or draw of the run is touched.
"""

import torch

from sora_train.base.progress import Progress
from sora_train.data.sample import Bucket, ClipBatch, MicroBatch
from sora_train.objectives import Objective, placeholder
from sora_train.parallel.compile import resolve_compile
from sora_train.parallel.protocol import Engine
from sora_train.training.components import Components
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.run import RunContext


def warm_up(run: RunContext, parts: Components, data_step: int) -> None:
    """Run every size once; a collective. `data_step` is the step of the tape that is read next."""
    to_compile = sizes(run, parts.data, data_step)
    with Progress(len(to_compile), "compiling", enabled=run.is_main) as bar:
        for done, (bucket, clips) in enumerate(to_compile, 1):
            with run.health.phase("compile"):
                run_once(parts.engine, parts.objective, bucket, clips)
                # Until the slowest rank is done, this is its phase too.
                run.control.barrier()
            bar.update(done, size=f"{clips} x {bucket.name}")


def sizes(run: RunContext, data: TrainingData, data_step: int) -> list[tuple[Bucket, int]]:
    """Buckets with clips, and clips in a micro-batch that each is compiled for.

    A compiler treats one clip apart from several, and without symbolic sizes every number apart from the others.
    """
    full = data.part(data_step).sizes
    counts = data.assignment.clips_per_bucket(data.table)
    static = resolve_compile(run.cfg.model.compile, run.world.device) == "static"
    to_compile: list[tuple[Bucket, int]] = []
    for spec in data.table:
        if not counts.get(spec.bucket.name, 0):
            continue
        # A bucket with fewer clips than a micro-batch has its rests alone; a slot without any holds one clip.
        most = full.get(spec.bucket, counts[spec.bucket.name])
        to_compile += [(spec.bucket, n) for n in sorted({1, most if static else min(most, 2)})]
    return to_compile


def run_once(engine: Engine, objective: Objective, bucket: Bucket, clips: int) -> None:
    """A micro-batch of so many black clips through forward, backward and norm; its gradients are forgotten."""
    empty = ClipBatch(MicroBatch(-1, bucket, 0, (), ()), [], [], 0.0)
    batch = ClipBatch(empty.micro_batch, placeholder(empty) * clips, [], 0.0)
    terms = objective.terms(engine.model, batch)
    loss = torch.stack([term.sum for term in terms.values()]).sum() * 0.0
    engine.backward(loss, last=True)
    engine.gradient_norm()
    engine.skip()
    objective.skip()

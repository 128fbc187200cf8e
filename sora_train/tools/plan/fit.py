"""`memory.fit=auto`: a run takes what the plan finds to fit the card that is there, and says so."""

import os

from sora_train.config import Config
from sora_train.config.messages import validated
from sora_train.errors import UserError
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.plan import bench_of, units_of_config
from sora_train.tools.plan.search import overrides_of, search
from sora_train.tools.plan.time.cluster import BY_MEMORY, GB, GIB, TABLE, Cluster

PLANNED_STEPS = 1000
"""Of a run that is given by epochs, whose clips nobody has counted yet."""


def fitted(
    cfg: Config, cluster: Cluster, assume: Assumptions | None = None
) -> tuple[Config, list[str]]:
    """The config with the fastest memory options that fit, and what to print. Every rank comes to the same.

    Raises:
        UserError: nothing fits; it names what comes nearest.
    """
    asked = cfg.model_copy(update={"memory": cfg.memory.model_copy(update={"base": "compute"})})
    if not cfg.train.steps:
        train = cfg.train.model_copy(update={"steps": PLANNED_STEPS, "epochs": 0.0})
        asked = asked.model_copy(update={"train": train})
    # Of several ranks each would count on its own.
    assume = assume or Assumptions(counted=1 if cluster.gpus == 1 else 0)
    bench, _ = bench_of(asked, cluster, assume, units_of_config(asked))
    result = search(bench, lambda *_: None)
    if not result.best:
        nearest = "; ".join(f"{each.name}: {each.reason}" for each in result.refused)
        raise UserError(
            f"memory.fit=auto: nothing fits {cluster} with {cluster.gpu.memory_gib:.1f} GiB ({nearest}); take shorter "
            "or smaller clips (buckets), a smaller model, or a larger card"
        )
    best = result.best[0]
    values = cfg.model_dump() | {
        "parallel": best.cfg.parallel.model_dump(),
        "memory": best.cfg.memory.model_dump() | {"fit": "as_set"},
        "data": cfg.data.model_dump() | {"cache": best.cfg.data.cache},
    }
    told = [
        f"memory.fit=auto on {cluster} with {cluster.gpu.memory_gib:.1f} GiB: {best.name}; {best.options}; "
        f"{best.bytes / GIB:.1f} GiB and {best.step.seconds:.2f} s a step (predicted)",
        *(
            f"  not {each.name} ({each.options}): slower, {each.step.seconds:.2f} s"
            for each in result.best[1:]
        ),
        *(f"  not {each.name}: {each.reason}" for each in result.refused),
        f"  the same by hand: {' '.join(overrides_of(best.cfg))}",
    ]
    return validated(type(cfg), values), told


def cluster_here(device: str) -> Cluster:
    """The cards that this job runs on, as the first of them is: one of the table by its name, else by its memory."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    memory, name = memory_here(device)
    gpu = TABLE[name].model_copy(update={"memory_gib": memory / GIB, "gpus_per_node": per_node})
    return Cluster(name=name, gpus=ranks, gpu=gpu)


def memory_here(device: str) -> tuple[float, str]:
    """(bytes of a card, its name in the table) of the first GPU, or of the host where there is none."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "cpu"
    card = torch.cuda.get_device_properties(0)
    return float(card.total_memory), named(card.name, card.total_memory)


def named(card: str, memory: float) -> str:
    """The card of the table with such a name, or the largest of BY_MEMORY that it holds."""
    words = card.upper().replace("-", " ").split()
    found = [name for name in TABLE if name != "cpu" and name.upper().split("-")[0] in words]
    if found:
        return found[0]
    fitting = [name for size, name in BY_MEMORY.items() if float(size[:-2]) * GB <= 1.1 * memory]
    return fitting[-1] if fitting else BY_MEMORY["12GB"]

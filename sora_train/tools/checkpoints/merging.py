"""A run folder whose weights have adapters in them: `sora ckpt merge`.

A weight is read, merged in float32 and written, one at a time. The folder samples, exports and is started from
(`init.run`) like imported weights; nothing can be trained on in it.
"""

import shlex
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sora_train import checkpoint as checkpoints
from sora_train.base.files import folder_when_whole, write_atomically
from sora_train.base.progress import Progress
from sora_train.checkpoint import Checkpoint
from sora_train.checkpoint.layout import prefix_of
from sora_train.checkpoint.meta import CheckpointMeta, TrainState, read_meta
from sora_train.checkpoint.tensors import LIVE
from sora_train.config import AdapterConfig, InitConfig
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import UserError
from sora_train.sampling.adapters import AdaptedBase, adapted_base
from sora_train.sampling.api import checkpoint_info


def merge_adapters(
    run: Path,
    step: int | None,
    adapters: list[str],
    out: Path,
    weights: str = "ema",
    *,
    base: str = "",
    any_base: bool = False,
) -> str:
    """Write the run folder `out` and return what was done, in lines.

    Args:
        run: whose weights, or whose adapter and its base.
        adapters: files or runs, `:0.8` behind one for its strength.
        weights: of runs, `ema` or `live`.
        base: where the base of an adapter's run is now.
        any_base: take adapters of another base too.

    Raises:
        UserError: there is nothing to merge, an adapter does not fit, or `out` is not empty.
        Fault: a file of a checkpoint is damaged, or the disk is full.
    """
    info = checkpoint_info(run, step)
    if not adapters and not info.cfg.adapter.on:
        raise UserError(
            f"{run} trained a whole model, so there is nothing to merge; give --adapter FILE, or RUN"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty; name a new folder or empty it")
    adapted = adapted_base(
        info.cfg, info.checkpoint, weights, adapters, base=base, any_base=any_base
    )
    checkpoints.verify(adapted.base.checkpoint)
    lines = [
        f"{one.strength:g} x {one.source}, {len(one.weights.shapes)} weights"
        for one in adapted.adapters
    ]
    _write(info.checkpoint, adapted, out, [f"base {adapted.base.checkpoint.path}", *lines])
    merged = f"merged into {adapted.base.checkpoint.path}, {len(adapted.changed)} weights changed"
    following = f'next: sora sample --ckpt {shlex.quote(str(out))} --prompt "..."'
    return "\n".join([*adapted.notes, *lines, merged, f"wrote {out}", following])


def _write(like: Checkpoint, adapted: AdaptedBase, out: Path, lines: list[str]) -> None:
    """With the config of `like`, an adapter's run or the base itself, as a run without an adapter."""
    config = _of_whole_model(load_yaml(like.path.parent.parent / "config.yaml"), out)
    before = read_meta(like)
    blank = CheckpointMeta(
        TrainState(pending=[]), before.task, _of_whole_model(before.config, out), before.spec
    )
    meta = replace(
        blank,
        sample_shape=before.sample_shape,
        frame_rates=before.frame_rates,
        versions=checkpoints.state_versions(),
        imported_from=str(like.path),
        notes={"merged": lines},
    )
    shapes = {
        f"{prefix}{name}": shape
        for prefix in (LIVE, prefix_of(""))
        for name, shape in adapted.base.shapes.items()
    }
    with (
        folder_when_whole(out) as partial,
        Progress(len(shapes), "merging") as progress,
        torch.no_grad(),
    ):
        done = count(1)

        def read(key: str) -> Tensor:
            name = key.partition(".")[2]
            progress.update(next(done))
            return adapted.merged(name, adapted.base.read(name))

        write_atomically(partial / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        checkpoints.save_streamed(partial / "checkpoints", 0, shapes, read, meta.to_dict())


def _of_whole_model(config: dict[str, Any], out: Path) -> dict[str, Any]:
    """The config of a run in `out` that has neither an adapter nor another run's weights to begin with."""
    return config | {
        "run": config.get("run", {}) | {"dir": str(out)},
        "ema": config.get("ema", {}) | {"more": [], "post_hoc": []},
        "adapter": AdapterConfig().model_dump(mode="json"),
        "init": InitConfig().model_dump(mode="json"),
    }

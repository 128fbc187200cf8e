"""A run folder of averaged weights: of several checkpoints, or by post-hoc EMA of one run's snapshots.

Tensors are read, added up in float64 and written one at a time, small ones a few together. The folder
samples, exports and is started from (`init.run`) like any run's; nothing can be trained on in it, for
it has no moments.
"""

import math
import shlex
from collections.abc import Callable, Sequence
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
from sora_train.checkpoint.layout import prefix_of, tag_of
from sora_train.checkpoint.meta import read_meta
from sora_train.checkpoint.tensors import LIVE, StoredTensors
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import UserError
from sora_train.tools.checkpoints.inspect import require_numbers
from sora_train.training.optim.ema_profiles import WIDEST, Profile, solve
from sora_train.training.optim.ema_snapshots import FOLDER as SNAPSHOTS

SHOWN = 10
GROUP = 1 << 24
"""Values added up together, unless a single tensor has more."""
EMA = prefix_of("")
Source = tuple[float, StoredTensors, str]
"""A coefficient, where its tensors lie, and what their names begin with there."""


def average_checkpoints(sources: Sequence[Checkpoint], weights: Sequence[float], out: Path) -> str:
    """Write the mean of several checkpoints, live weights and averages each among themselves.

    Args:
        weights: how much each counts, in any unit; none: all alike.

    Raises:
        UserError: fewer than two, weights that do not fit, or models that differ.
    """
    if len(sources) < 2:
        raise UserError(
            "averaging one checkpoint changes nothing; give two or more, such as RUN@1000 RUN@2000, or --sigma-rel "
            "for the post-hoc average of one run"
        )
    if weights and (
        len(weights) != len(sources) or min(weights) < 0 or not 0 < sum(weights) < float("inf")
    ):
        raise UserError(
            f"--weights has {len(weights)} numbers ({', '.join(f'{w:g}' for w in weights)}) for {len(sources)} "
            "checkpoints; give one for each, none negative and not all 0"
        )
    require_one_adapter(sources)
    verified(sources)
    stored = [StoredTensors(source) for source in sources]
    for other in stored[1:]:
        require_same_model(stored[0], other)
    total = sum(weights) if weights else float(len(sources))
    shares = [weight / total for weight in weights] or [1 / total] * len(sources)
    parts = {
        prefix: [(share, one, prefix) for share, one in zip(shares, stored, strict=True)]
        for prefix in (LIVE, EMA)
    }
    lines = [f"{share:.4f} x {source.path}" for share, source in zip(shares, sources, strict=True)]
    newest = max(sources, key=lambda source: source.step)
    write_run(newest, parts, out, {"averaged": lines})
    return "\n".join([*lines, *_next(out)])


def require_one_adapter(sources: Sequence[Checkpoint]) -> None:
    """Raises UserError where adapters of several runs would be averaged: the mean of each factor is not the mean of
    the products, unless the factors belong together."""
    adapters = [one for one in sources if read_meta(one).config.get("adapter", {}).get("rank")]
    runs = {one.path.parent.parent.resolve() for one in adapters}
    if len(runs) > 1:
        raise UserError(
            f"{adapters[0].path} and {adapters[-1].path} hold adapters of two runs, whose factors cannot be averaged "
            "one by one; merge them into their base with weights: sora ckpt merge BASE --adapter RUN:0.5 --adapter "
            "OTHER:0.5"
        )


def average_post_hoc(run: Path, step: int | None, sigma_rel: float, out: Path) -> str:
    """Write the average of another width than those that were tracked, as of a checkpoint's step.

    Raises:
        UserError: the run tracked none, or the width cannot be.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(
            f"--sigma-rel {sigma_rel:g} is no width of an average; give one above 0 and at most {WIDEST:.3f} (the "
            "plain mean of all steps)"
        )
    newest = checkpoints.find(run, step)
    if newest.step == 0:
        raise UserError(f"{newest.path} is of step 0, before which there is nothing to average")
    profiles: dict[str, float] = _tracked(newest)
    before = [
        one for one in checkpoints.list_checkpoints(run / SNAPSHOTS) if one.step < newest.step
    ]
    verified([*before, newest])
    held: list[tuple[Profile, StoredTensors, str]] = []
    for source in [*before, newest]:
        stored = StoredTensors(source)
        held += [
            (Profile(width, source.step), stored, prefix_of(tag))
            for tag, width in profiles.items()
            if stored.names(prefix_of(tag))
        ]
    coefficients, distance = solve(
        [profile for profile, _, _ in held], Profile(sigma_rel, newest.step)
    )
    averaged = [
        (float(share), stored, prefix)
        for share, (_, stored, prefix) in zip(coefficients, held, strict=True)
    ]
    live = [(1.0, StoredTensors(newest), LIVE)]
    lines = [
        f"sigma_rel {sigma_rel:g} as of step {newest.step}, from {len(held)} averages of sigma_rel "
        f"{', '.join(f'{width:g}' for width in profiles.values())}",
        f"the profile made is {distance:.2%} from the requested one; coefficients are up to "
        f"{max(map(abs, coefficients)):.3g}",
    ]
    write_run(newest, {LIVE: live, EMA: averaged}, out, {"averaged": lines})
    return "\n".join([*lines, *_next(out)])


def _tracked(checkpoint: Checkpoint) -> dict[str, float]:
    """Tag -> width of the power-function averages in a checkpoint."""
    widths = (read_meta(checkpoint).config.get("ema") or {}).get("post_hoc") or []
    if not widths:
        raise UserError(
            f"{checkpoint.path} has no averages for post-hoc EMA; train with ema.post_hoc=[0.05,0.10], or average "
            "checkpoints"
        )
    return {tag_of(width, "s"): width for width in widths}


def verified(sources: Sequence[Checkpoint]) -> None:
    """Compare every file with its digest, and look at every weight. Raises Fault for a damaged file or a weight that is
    not finite."""
    with Progress(len(sources), "verifying") as progress:
        for number, source in enumerate(sources, 1):
            checkpoints.verify(source)
            require_numbers(source, (LIVE, EMA))
            progress.update(number)


def require_same_model(one: StoredTensors, other: StoredTensors) -> None:
    """Raises UserError, naming the first differences, when weights have other names or shapes."""
    ours, theirs = ({k: v for k, v in s.shapes.items() if _kept(k)} for s in (one, other))
    differ = [f"{name} is missing" for name in ours if name not in theirs]
    differ += [f"{name} is added" for name in theirs if name not in ours]
    differ += [
        f"{name} is {list(theirs[name])}, not {list(shape)}"
        for name, shape in ours.items()
        if theirs.get(name, shape) != shape
    ]
    if differ:
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise UserError(
            f"{other.checkpoint.path} holds another model than {one.checkpoint.path}: "
            f"{'; '.join(differ[:SHOWN])}{more}; average checkpoints of one model"
        )


def _kept(name: str) -> bool:
    return name.startswith((LIVE, EMA))


def write_run(
    like: Checkpoint, parts: dict[str, list[Source]], out: Path, notes: dict[str, Any]
) -> None:
    """A run folder with the config and state of `like`, whose tensors are sums.

    Args:
        parts: prefix -> coefficients and places of what is added up under it.

    Raises:
        UserError: `out` is not empty.
        Fault: the disk is full or the files cannot be written; `out` is left as it was.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty; name a new folder or empty it")
    shapes = {
        f"{prefix}{name}": sources[0][1].shapes[f"{sources[0][2]}{name}"]
        for prefix, sources in parts.items()
        for name in sources[0][1].names(sources[0][2])
    }
    meta = replace(read_meta(like), quarantine=[], imported_from=str(like.path), notes=notes)
    with folder_when_whole(out) as partial:
        config = load_yaml(like.path.parent.parent / "config.yaml")
        config["run"] = config.get("run", {}) | {"dir": str(out)}
        config["ema"] = config.get("ema", {}) | {"more": [], "post_hoc": []}
        write_atomically(partial / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        with Progress(len(shapes), "averaging") as progress:
            read = _summing(parts, shapes, progress)
            checkpoints.save_streamed(
                partial / "checkpoints", like.step, shapes, read, meta.to_dict()
            )


def _summing(
    parts: dict[str, list[Source]], shapes: dict[str, tuple[int, ...]], progress: Progress
) -> Callable[[str], Tensor]:
    """Reads tensors of `shapes`, best in their order: small ones are added up together, since every read of a
    checkpoint has a cost of its own."""
    names, ready, done = list(shapes), dict[str, Tensor](), count(1)

    def read(key: str) -> Tensor:
        if key not in ready:
            prefix = next(prefix for prefix in parts if key.startswith(prefix))
            ready.clear()
            ready.update(_sums(parts[prefix], prefix, _together(key, prefix, names, shapes)))
        progress.update(next(done))
        return ready.pop(key)

    return read


def _together(
    key: str, prefix: str, names: list[str], shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """The name and those after it under its prefix, as many as have GROUP values."""
    group, values = [key], math.prod(shapes[key])
    for name in names[names.index(key) + 1 :]:
        values += math.prod(shapes[name])
        if values > GROUP or not name.startswith(prefix):
            break
        group.append(name)
    return group


def _sums(sources: list[Source], prefix: str, names: list[str]) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for share, stored, at in sources:
        places = {f"{at}{name.removeprefix(prefix)}": name for name in names}
        for place, part in stored.read(*places).items():
            scaled, name = part.to(torch.float64).mul_(share), places[place]
            totals[name] = totals[name].add_(scaled) if name in totals else scaled
    return {name: total.to(torch.float32) for name, total in totals.items()}


def _next(out: Path) -> list[str]:
    return [f"wrote {out}", f'next: sora sample --ckpt {shlex.quote(str(out))} --prompt "..."']

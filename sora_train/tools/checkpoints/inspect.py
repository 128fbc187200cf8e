"""The work of `sora ckpt ls`, `inspect`, `verify` and `prune`.

Weights are read a tensor at a time, so a laptop can look at a checkpoint of any size.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from sora_train import checkpoint as checkpoints
from sora_train.base.progress import Progress, duration
from sora_train.checkpoint import Checkpoint
from sora_train.checkpoint.layout import listed_files, why_incomplete
from sora_train.checkpoint.tensors import StoredTensors, chunks
from sora_train.errors import Fault, UserError
from sora_train.models.finite_weights import require_finite
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.run_folder import take_lock
from sora_train.training.optim.ema_snapshots import FOLDER as SNAPSHOTS

Rows = list[tuple[str, ...]]


# --- ls ---


@dataclass(frozen=True)
class Entry:
    """A folder under checkpoints/, whole or not.

    Attributes:
        fault: why it cannot be gone on from; empty if it can.
    """

    path: Path
    step: int
    size: int
    fault: str


def entries(run: Path) -> list[Entry]:
    """Everything that a save has left in a run, complete or not, by step.

    Raises:
        UserError: the folder is no run.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(
            f"{run} holds no folder 'checkpoints'; give a run folder that `sora train` has written"
        )
    saved = []
    for path in folder.glob("step-*"):
        number, _, rest = path.name.removeprefix("step-").partition(".")
        if number.isdigit() and path.is_dir():
            fault = f"a save that was cut off (.{rest})" if rest else why_incomplete(path)
            saved.append(Entry(path, int(number), size_of(path), fault))
    return sorted(saved, key=lambda entry: (entry.step, entry.path.name))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show_size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


LS_COLUMNS = ("step", "size", "age", "samples seen", "val loss", "state")


def ls(run: Path, now: float | None = None) -> tuple[Rows, str]:
    """A row a checkpoint, and a line of what all of it takes on disk."""
    saved = entries(run)
    whole = [entry for entry in saved if not entry.fault]
    losses = validated(run)
    rows: Rows = []
    for entry in saved:
        state = {} if entry.fault else Checkpoint(entry.path, entry.step).state()
        age = (time.time() if now is None else now) - entry.path.stat().st_mtime
        loss = losses.get(entry.step)
        what = entry.fault or ("complete, the newest" if entry == whole[-1] else "complete")
        rows.append(
            (
                str(entry.step),
                show_size(entry.size),
                duration(max(0.0, age)),
                f"{state['samples_seen']:,}" if "samples_seen" in state else "",
                "" if loss is None or entry.fault else f"{loss:.5f}",
                what,
            )
        )
    totals = [f"{len(whole)} complete in {show_size(sum(entry.size for entry in saved))}"]
    if len(saved) > len(whole):
        totals.append(
            f"{len(saved) - len(whole)} incomplete, which `sora ckpt prune {run} --keep-last {max(1, len(whole))}` "
            "removes"
        )
    snapshots = checkpoints.list_checkpoints(run / SNAPSHOTS)
    if snapshots:
        totals.append(f"{len(snapshots)} in {SNAPSHOTS}, {show_size(size_of(run / SNAPSHOTS))}")
    return rows, "; ".join(totals)


def validated(run: Path) -> dict[int, float]:
    """Step -> validation loss, of the steps that were validated."""
    if not (run / "metrics.jsonl").is_file():
        return {}
    rows = read_metrics(run / "metrics.jsonl")
    return {int(row["step"]): row["val/loss"] for row in rows if "val/loss" in row}


# --- inspect ---


GROUP_COLUMNS = ("tensors", "count", "values", "size", "precision")


def groups(stored: StoredTensors) -> Rows:
    """A row for the weights, the moments and each average."""
    rows: Rows = []
    for prefix in dict.fromkeys(name.partition(".")[0] for name in stored.shapes):
        names = [name for name in stored.shapes if name.partition(".")[0] == prefix]
        kinds = {str(stored.dtypes[name]).removeprefix("torch.") for name in names}
        numbers = sum(math.prod(stored.shapes[name]) for name in names)
        size = sum(map(stored.bytes_of, names))
        rows.append(
            (prefix, str(len(names)), f"{numbers:,}", show_size(size), ", ".join(sorted(kinds)))
        )
    return rows


def facts(checkpoint: Checkpoint) -> Rows:
    """(what, value) of everything that is not a tensor, the config in short."""
    state = checkpoint.state()
    spec, cfg = state.get("spec") or {}, state.get("config") or {}
    rows: Rows = [("folder", str(checkpoint.path)), ("size", show_size(size_of(checkpoint.path)))]
    for key, value in state.items():
        if not isinstance(value, dict | list):
            rows.append((key.replace("_", " "), str(value)))
    rows += [(f"versions of {key}", str(value)) for key, value in state.get("versions", {}).items()]
    rows += [
        (key.replace("_", " "), str(value))
        for key, value in state.get("notes", {}).items()
        if not isinstance(value, dict | list)
    ]
    shape = state.get("sample_shape")
    if shape:
        size = f"{shape['width']}x{shape['height']}"
        rows.append(("usual clip", f"{shape['frames']} frames of {size} at {shape['fps']:g}"))
    if state.get("frame_rates"):
        lowest, highest = state["frame_rates"]
        rows.append(("frame rates trained", f"{lowest:g} to {highest:g} a second"))
    rows.append(("quarantine", f"{len(state.get('quarantine', []))} clips"))
    rows += [(f"spec {key}", str(value)) for key, value in spec.items()]
    rows += [(f"config {key}", value) for key, value in in_short(cfg)]
    return rows


SHOWN_KEYS = (
    "name",
    "seed",
    "init.run",
    "data.source",
    "model.dim",
    "model.num_layers",
    "model.num_heads",
    "vae.path",
    "text.kind",
    "text.path",
    "optim.name",
    "optim.lr",
    "train.steps",
    "train.micro_batches",
    "ema.decay",
    "ema.more",
    "ema.post_hoc",
)


def in_short(cfg: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys that tell runs apart, as far as the config has them."""
    for key in SHOWN_KEYS:
        value: Any = cfg
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, "", []):
            yield key, str(value)


TENSOR_COLUMNS = ("tensor", "shape", "precision", "mean", "std", "min", "max", "not finite")


def tensor_rows(stored: StoredTensors, pattern: str) -> Rows:
    """What the values of each tensor are like whose name holds or matches `pattern`."""
    names = matching(stored, pattern)
    rows: Rows = []
    with Progress(len(names), "reading tensors", enabled=len(names) > 50) as progress:
        for number, name in enumerate(names, 1):
            numbers = statistics(stored.read(name)[name])
            shape = "x".join(map(str, stored.shapes[name])) or "scalar"
            kind = str(stored.dtypes[name]).removeprefix("torch.")
            shown = [f"{numbers[key]:.4g}" for key in ("mean", "std", "min", "max")]
            rows.append((name, shape, kind, *shown, f"{numbers['not_finite']:,.0f}"))
            progress.update(number)
    return rows


def matching(stored: StoredTensors, pattern: str) -> list[str]:
    """Names by shell pattern, or by a part of them.

    Raises:
        UserError: there is none.
    """
    names = [name for name in stored.shapes if fnmatch(name, pattern) or pattern in name]
    if not names:
        first = ", ".join(list(stored.shapes)[:3])
        raise UserError(
            f"--tensors '{pattern}' matches no tensor of {stored.checkpoint.path}; names are such as {first}"
        )
    return names


def statistics(tensor: Tensor) -> dict[str, float]:
    """mean, std, min and max of the finite values in float64, and how many are not finite."""
    count, total, square = 0, 0.0, 0.0
    low, high = math.inf, -math.inf
    for (part,) in chunks(tensor):
        finite = part[part.isfinite()]
        if finite.numel():
            count, total = count + finite.numel(), total + float(finite.sum())
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    mean = total / count if count else math.nan
    for (part,) in chunks(tensor):
        square += float((part[part.isfinite()] - mean).square().sum())
    std = math.sqrt(square / count) if count else math.nan
    if not count:
        low = high = math.nan
    return {"mean": mean, "std": std, "min": low, "max": high, "not_finite": tensor.numel() - count}


# --- verify ---


def verify(run: Path, step: int | None) -> str:
    """Compare every file of one checkpoint, or of all, with its digest, showing how far it has come; then look at every
    value, one tensor in memory at a time.

    Raises:
        Fault: a file is damaged, or a tensor holds values that are not finite, named.
        UserError: no such run or checkpoint.
    """
    # Those of the wrong size are damaged too, and `find` would not tell of them.
    chosen = [entry for entry in entries(run) if not entry.path.name.endswith(".tmp")]
    if step is not None:
        chosen = [entry for entry in chosen if entry.step == step] or [_entry_of(run, step)]
    if not chosen:
        checkpoints.find(run)
    for entry in chosen:
        if entry.fault:
            raise Fault(f"{entry.path} is damaged: {entry.fault}; go on from another checkpoint")
    files = [
        (entry.path / name, one)
        for entry in chosen
        for name, one in listed_files(entry.path).items()
    ]
    done = 0
    with Progress(sum(one["size"] for _, one in files), "verifying, bytes") as progress:
        for path, one in files:
            for size in _require_digest(path, one["sha256"]):
                done += size
                progress.update(done)
    steps = ", ".join(str(entry.step) for entry in chosen)
    tensors = sum(require_numbers(Checkpoint(entry.path, entry.step)) for entry in chosen)
    return (
        f"{len(files)} files of steps {steps} match their digests ({show_size(done)}), and all values of {tensors} "
        "tensors are finite"
    )


def require_numbers(checkpoint: Checkpoint, prefixes: tuple[str, ...] = ("",)) -> int:
    """How many tensors a checkpoint has under `prefixes`. Raises Fault naming one with NaN or infinities."""
    stored = StoredTensors(checkpoint)
    names = [name for name in stored.shapes if name.startswith(prefixes)]
    with Progress(len(names), f"values of step {checkpoint.step}, tensors") as progress:
        for done, name in enumerate(names, 1):
            try:
                remedy = "remove this checkpoint to go on from another"
                require_finite(stored.read(name).items(), str(checkpoint.path), remedy)
            except UserError as error:
                raise Fault(str(error)) from error
            progress.update(done)
    return len(names)


def _entry_of(run: Path, step: int) -> Entry:
    checkpoint = checkpoints.find(run, step)
    return Entry(checkpoint.path, checkpoint.step, size_of(checkpoint.path), "")


def _require_digest(path: Path, expected: str) -> Iterator[int]:
    """Reads a file, yielding the bytes of each part. Raises Fault when the digest is another."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            yield len(block)
    if digest.hexdigest() != expected:
        raise Fault(
            f"{path} does not match its digest; the file is damaged, remove this checkpoint to go on from another"
        )


# --- prune ---


def prune(run: Path, keep_last: int, keep_every: int = 0, *, dry_run: bool = False) -> str:
    """Remove old checkpoints and leftovers of torn saves; returns what was removed and what that freed.

    The `keep_last` newest complete ones stay, and those of steps that `keep_every` divides.

    Raises:
        UserError: the run is live, or is none.
    """
    if keep_last < 1:
        raise UserError(
            f"--keep-last {keep_last} would remove the newest checkpoint too; keep at least 1"
        )
    if keep_every < 0:
        raise UserError(f"--keep-every {keep_every} is no number of steps; give one above 0")
    saved = entries(run)
    lock = None if dry_run else take_lock(run)
    try:
        removed = superfluous(saved, keep_last, keep_every)
        for entry in [] if dry_run else removed:
            _remove(entry.path)
    finally:
        if lock is not None:
            lock.close()
    freed = show_size(sum(entry.size for entry in removed))
    kept = ", ".join(str(entry.step) for entry in saved if entry not in removed) or "none"
    verb = "would remove" if dry_run else "removed"
    lines = [
        f"{verb} {entry.path.name} ({show_size(entry.size)}{entry.fault and ', ' + entry.fault})"
        for entry in removed
    ]
    would = "would free" if dry_run else "freed"
    return "\n".join([*lines, f"{would} {freed}; kept: {kept}"])


def superfluous(saved: Sequence[Entry], keep_last: int, keep_every: int) -> list[Entry]:
    """What a rule of retention lets go of; nothing of a run without a complete checkpoint."""
    whole = [entry for entry in saved if not entry.fault]
    if not whole:
        return []
    kept = {entry.path for entry in whole[-keep_last:]}
    if keep_every:
        kept |= {entry.path for entry in whole if entry.step % keep_every == 0}
    return [entry for entry in saved if entry.path not in kept]


def _remove(path: Path) -> None:
    """Under another name first: cut off half-way, what is left is a torn save and not a damaged checkpoint."""
    torn = path if path.name.endswith(".tmp") else path.with_name(path.name + ".tmp")
    if torn != path:
        shutil.rmtree(torn, ignore_errors=True)
        path.rename(torn)
    shutil.rmtree(torn)

"""What lies where in a folder of checkpoints, and which of them are whole.

step-000500/       model.* optim.* ema.* in DCP's format
                   state.json     step, samples seen, config, diffusion spec, versions
                   MANIFEST.json  every file with its size and SHA-256, written last
step-000500.tmp/   being written, or torn
step-000500.old/   the one that a second save of the same step replaces, for the moment of two renames
latest             the name of the newest one
rehearsal/         the rehearsal before step 1, removed again
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.errors import Fault, UserError

STATE, MANIFEST, LATEST, REHEARSAL = "state.json", "MANIFEST.json", "latest", "rehearsal"
TEMPORARY, REPLACED = ".tmp", ".old"
EMA_PREFIX = "ema"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        return json.loads((self.path / STATE).read_text())


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name, None for any other name."""
    digits = name.removeprefix("step-")
    return int(digits) if name.startswith("step-") and digits.isdigit() else None


def split_step(text: str) -> tuple[Path, int | None]:
    """RUN or RUN@STEP -> (folder, step or None). A folder that exists under the whole text is that folder.

    Raises:
        UserError: what stands after the last @ is no step, or nothing stands before it.
    """
    folder, at, step = text.rpartition("@")
    if not at or Path(text).exists():
        return Path(text), None
    if not (folder and step.isascii() and step.isdigit()):
        raise UserError(
            f"'{text}' is no folder, and the step after @ must be a number, for example {folder or 'RUN'}@500"
        )
    return Path(folder), int(step)


def tag_of(number: float, kind: str = "") -> str:
    """`0.9999` -> `9999`, `0.05` of kind `s` (a sigma_rel) -> `s05`: without a dot, since dots part names."""
    return kind + (f"{number:.12f}".rstrip("0").partition(".")[2] or "0")


def prefix_of(tag: str) -> str:
    """What names of an average's tensors begin with in a checkpoint; the empty tag is the one always kept."""
    return f"{EMA_PREFIX}_{tag}." if tag else f"{EMA_PREFIX}."


def complete(path: Path) -> bool:
    """Whether the manifest is there and every file it lists has the size it says."""
    return not why_incomplete(path)


def why_incomplete(path: Path) -> str:
    """What a checkpoint's folder lacks by names and sizes, or an empty string."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing: the save was cut off"
    try:
        files = listed_files(path)
    except Fault:
        return f"{MANIFEST} is damaged"
    for name, entry in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        size = (path / name).stat().st_size
        if size != entry["size"]:
            return f"{name} has {size:,} bytes instead of {entry['size']:,}"
    return ""


def listed_files(path: Path) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint's folder by its manifest: name -> size and SHA-256.

    Raises Fault where the manifest is no such list.
    """
    manifest = path / MANIFEST
    try:
        files: dict[str, dict[str, Any]] = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(f"{manifest} cannot be read ({error}); the checkpoint is damaged") from error
    return files


def weights_digest(checkpoint: Checkpoint, weights: str) -> str:
    """SHA-256 that tells a checkpoint's weights from others', from the digests in its manifest; nothing is read anew.

    Args:
        weights: which of them, `ema` or `live`.
    """
    files = listed_files(checkpoint.path)
    stored = [f"{name} {entry['sha256']}" for name, entry in sorted(files.items()) if name != STATE]
    return hashlib.sha256("\n".join([weights, *stored]).encode()).hexdigest()


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first; a torn one is not listed."""
    paths: dict[int, Path] = {}
    for path in folder.glob("step-*"):
        step = step_of(path.name.removesuffix(REPLACED))
        if step is None or not complete(path):
            continue
        if step not in paths or paths[step].name.endswith(REPLACED):
            paths[step] = path
    return [Checkpoint(path, step) for step, path in sorted(paths.items())]


def find(run_dir: Path, step: int | None = None) -> Checkpoint:
    """The newest complete checkpoint of a run, or the one of `step`.

    Raises:
        UserError: the folder is no run, or has no such checkpoint.
    """
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        raise UserError(
            f"{run_dir} holds no complete checkpoint; give a run folder that `sora train` has written"
        )
    if step is None:
        return checkpoints[-1]
    for checkpoint in checkpoints:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
    raise UserError(f"{run_dir} has no checkpoint of step {step}; it has {steps}")


def recover(folder: Path) -> None:
    """Undo what a save left that was killed between two renames, and remove a rehearsal; one process calls this.

    Raises UserError where the folder cannot be written.
    """
    try:
        for old in folder.glob(f"step-*{REPLACED}"):
            final = old.with_name(old.name.removesuffix(REPLACED))
            if not complete(final) and complete(old):
                if final.exists():
                    shutil.rmtree(final)
                old.replace(final)
            else:
                shutil.rmtree(old)
        if (folder / REHEARSAL).exists():
            shutil.rmtree(folder / REHEARSAL)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}; give yourself the permission or choose another run.dir"
        ) from error

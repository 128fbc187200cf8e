"""What a changed key means for a resumed run: every key of the configuration has a class.

`free` keys change nothing that is trained. `recorded` ones may change: the new value takes effect, and the
change is shown and written down with its step. `refused` ones would make another experiment of the run.
"""

from collections.abc import Iterable
from typing import Any, Literal

ResumeClass = Literal["free", "recorded", "refused"]

MEANING: dict[ResumeClass, str] = {
    "free": "may change, nothing that is trained depends on it",
    "recorded": "may change, takes effect and is written to changes.jsonl with its step",
    "refused": "must stay as it is, or the run would be another experiment",
}

CLASSES: dict[str, ResumeClass] = {
    "name": "free",
    "dry_run": "free",
    "task": "refused",
    "seed": "refused",
    "run": "free",
    "run.device": "recorded",
    "run.deterministic": "recorded",
    "run.threads": "recorded",
    "init": "free",
    "resume": "free",
    "stages": "free",
    "data": "recorded",
    "data.val_clips": "refused",
    "data.val_source": "refused",
    "data.num_workers": "free",
    "data.prefetch": "free",
    "data.prefetch_mb": "free",
    "data.decode_timeout": "free",
    "data.read_retries": "free",
    "data.read_timeout": "free",
    "data.read_block_mb": "free",
    "data.disk_cache_dir": "free",
    "data.disk_cache_gb": "free",
    "data.cache_dir": "free",
    "data.cache_text_gb": "free",
    "data.probe": "free",
    "buckets": "recorded",
    "model": "refused",
    "model.attention": "recorded",
    "model.compile": "recorded",
    "model.float8": "recorded",
    "vae": "refused",
    "vae.tile": "recorded",
    "text": "refused",
    "image": "refused",
    "objective": "refused",
    "loss": "refused",
    "vae_objective": "refused",
    "distill": "refused",
    "adapter": "refused",
    "adapter.dropout": "recorded",
    "adapter.init": "free",
    "adapter.trigger": "free",
    "optim": "recorded",
    "optim.name": "refused",
    "optim.state": "refused",
    "ema": "recorded",
    "train": "recorded",
    "train.log_every": "free",
    "elastic": "free",
    "parallel": "recorded",
    "memory": "free",
    "memory.base": "recorded",
    "launch": "free",
    "sweep": "free",
    "checkpoint": "free",
    "validation": "recorded",
    "validation.every": "free",
    "sample": "free",
    "tracker": "free",
    "health": "free",
    "spike_detection": "recorded",
}
"""The class of a key, or of all keys below a section that are not named themselves."""


def resume_class(key: str) -> ResumeClass | None:
    """The class of a dotted key (`[]` marks elements of a list): that of the longest prefix in CLASSES, else None."""
    parts = key.replace("[]", "").split(".")
    for length in range(len(parts), 0, -1):
        kind = CLASSES.get(".".join(parts[:length]))
        if kind is not None:
            return kind
    return None


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of all recorded and refused keys whose value differs; a key of no class is refused."""
    return [change for change in differences(old, new) if resume_class(change[0]) != "free"]


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys: Iterable[str] = dict.fromkeys([*old, *new])
        return [
            row
            for key in keys
            for row in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [(path, old, new)]

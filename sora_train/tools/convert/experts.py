"""Pipelines that share the noise levels out among two transformers, as Wan 2.2's A14B: which of them are imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_train.errors import UserError

HIGH, LOW = "transformer", "transformer_2"
"""The parts of a pipeline's folder: the expert of high noise and that of low noise."""
NEEDED = {"high": (HIGH,), "low": (LOW,), "both": (HIGH, LOW)}


@dataclass(frozen=True)
class Experts:
    """What is imported."""

    folders: dict[str, Path]
    """Name of a transformer in the checkpoint -> the folder of its weights: one alone is always `transformer`."""
    values: dict[str, Any] = field(default_factory=dict)
    """Keys of the run's configuration that say which they are, and how clips are sampled from them."""

    @property
    def first(self) -> Path:
        """The folder that tells the sizes, which both have."""
        return next(iter(self.folders.values()))


def experts_of(
    source: Path,
    index: Mapping[str, Any],
    *,
    alone: Path | None = None,
    expert: str = "",
    boundary: float | None = None,
) -> Experts:
    """The transformers to import of a pipeline.

    Args:
        source: the pipeline's folder.
        index: its model_index.json.
        alone: a transformer's folder that takes the place of the pipeline's own.
        expert: `high`, `low` or `both`; empty: both, where there are two.
        boundary: in place of the pipeline's `boundary_ratio`.

    Raises:
        UserError: an expert without its weights, no boundary, one outside 0 to 1, or an expert asked of a pipeline that
            has one transformer for all noise levels.
    """
    if boundary is None:
        boundary = index.get("boundary_ratio")
    two = boundary is not None or _has(index, LOW)
    if not two:
        if expert:
            raise UserError(
                f"--expert {expert} is for a pipeline of two transformers, and {source} has one; leave it out"
            )
        return Experts({HIGH: alone or source / HIGH})
    if boundary is None:
        raise UserError(
            f"{source} has two transformers and its model_index.json no boundary_ratio, the noise level at which they "
            "meet; give it as --boundary (Wan 2.2 T2V-A14B: 0.875, I2V-A14B: 0.9)"
        )
    if not 0 < boundary < 1:
        raise UserError(
            f"the boundary of {source} is {boundary:g}; it is the noise level at which its two transformers meet and "
            "must lie between 0 and 1: give it as --boundary"
        )
    return Experts(
        _folders(source, index, alone, expert or "both"), _values(index, expert or "both", boundary)
    )


def _folders(
    source: Path, index: Mapping[str, Any], alone: Path | None, expert: str
) -> dict[str, Path]:
    if expert not in NEEDED:
        raise UserError(f"--expert is '{expert}'; choose among {', '.join(NEEDED)}")
    if alone is not None:
        if expert == "both":
            raise UserError(
                f"{alone} is one transformer, and --base {source} has two; say which of them it is: --expert high or "
                "--expert low"
            )
        return {HIGH: alone}
    for name in NEEDED[expert]:
        if not _has(index, name) or not (source / name).is_dir():
            raise UserError(
                f"{source} has no {name}, whose weights --expert {expert} needs; fetch the whole pipeline, or import "
                f"--expert {'low' if name == HIGH else 'high'} alone"
            )
    return dict(zip((HIGH, LOW), (source / name for name in NEEDED[expert]), strict=False))


def _has(index: Mapping[str, Any], name: str) -> bool:
    part = index.get(name) or [None]
    return part[0] is not None


def _values(index: Mapping[str, Any], expert: str, boundary: float) -> dict[str, Any]:
    """Steps and guidance are those of the cards of Wan 2.2's models."""
    takes_image = index.get("_class_name") == "WanImageToVideoPipeline"
    return {
        "model.expert": expert,
        "model.boundary": boundary,
        "objective.num_steps": 40,
        "objective.guidance_scale": 3.5 if takes_image else 4.0,
        "objective.guidance_scale_2": 3.5 if takes_image else 3.0,
        # One of the two makes no clips by itself.
        **({} if expert == "both" else {"sample.every": 0}),
    }

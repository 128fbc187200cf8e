"""A small fixed batch whose loss is kept in every checkpoint, so that a wrong load is noticed.

Digests say that the files are those that were written; the loss says that the weights, the VAE and the
arithmetic are those that wrote them. Noise and noise level are fixed, nothing that is trained is touched.
"""

from typing import Any

import torch

from sora_train.config import Config
from sora_train.data.sample import Clip
from sora_train.errors import Fault
from sora_train.models.transformer.cpu_kernels import in_use
from sora_train.monitoring.run_folder import fingerprint
from sora_train.objectives.validation import same_shape
from sora_train.training.components import Components
from sora_train.training.run import RunContext

CLIPS = 2


def probe_clips(clips: list[Clip]) -> list[Clip]:
    """A few held-out clips of one shape; none where a run holds none out."""
    groups = same_shape(clips)
    return groups[0][:CLIPS] if groups else []


def measure_probe(run: RunContext, parts: Components) -> dict[str, Any] | None:
    """The loss of the weights as they are, and where it was measured; None where there is nothing to measure by.

    A collective: every rank computes the same clips.
    """
    clips, model = probe_clips(parts.data.val_clips), parts.engine.model
    if not clips or not run.cfg.resume.probe:
        return None
    model.eval()
    try:
        loss = parts.objective.probe_loss(model, clips)
        if loss is None:
            return None
        with parts.averaged():
            averaged = parts.objective.probe_loss(model, clips)
    finally:
        model.train()
    return {
        "loss": loss,
        "ema": averaged,
        "clips": [[clip.row, clip.digest] for clip in clips],
        "ranks": run.world.size,
        "device": run.world.device.type,
        "fingerprint": fingerprint(run.cfg) | {"kernels": str(in_use())},
    }


def require_same_probe(
    cfg: Config, step: int, before: dict[str, Any], now: dict[str, Any] | None, *, exactly: bool
) -> None:
    """Raises Fault where the probe's loss is another than the checkpoint of a step says, beyond
    `resume.probe_tolerance`.

    `exactly`: nothing of the configuration changed, so that on a CPU not a bit may differ.
    """
    if now is None or now["clips"] != before["clips"]:
        return
    differ = [key for key in ("ranks", "device") if now[key] != before[key]]
    old, new = before["fingerprint"], now["fingerprint"]
    differ += [key for key in new if old.get(key) != new[key]]
    same = exactly and not differ and torch.are_deterministic_algorithms_enabled()
    tolerance = 0.0 if same else cfg.resume.probe_tolerance
    wrong = [
        name
        for name in ("loss", "ema")
        if abs(now[name] - before[name]) > tolerance * abs(before[name])
    ]
    if not wrong:
        return
    name = wrong[0]
    whose = "the average" if name == "ema" else "the weights"
    other = f"; not the same are {', '.join(differ)}" if differ else ""
    raise Fault(
        f"the checkpoint of step {step} was written where its probe's loss under {whose} was "
        f"{before[name]!r}, here it is {now[name]!r} (let pass: a relative difference of {tolerance:g}){other}; "
        "weights, VAE or arithmetic are not those of the run, so go on from another step, or set resume.probe=false "
        "if you know why"
    )

"""A small fixed batch whose loss is kept in every checkpoint, so that loading can be seen to be right.

Digests say that the files are those that were written; the loss says that the weights, the VAE and the
arithmetic are those that wrote them. Noise and noise level are fixed, nothing that is trained is touched.
"""

from typing import TYPE_CHECKING, Any

import torch

from sora_train.data.sample import Clip
from sora_train.errors import Fault
from sora_train.monitoring.run_folder import fingerprint
from sora_train.objectives import TextToVideoObjective, VaeObjective
from sora_train.objectives.validation import losses, same_shape, validation_psnr

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer

TIME = 0.5
CLIPS = 2


def probe_clips(trainer: "Trainer") -> list[Clip]:
    """Held-out clips of one shape; none where a run holds none out."""
    groups = same_shape(trainer.data.val_clips)
    return groups[0][:CLIPS] if groups else []


@torch.no_grad()
def measure_probe(trainer: "Trainer") -> dict[str, Any] | None:
    """The loss of the weights as they are, and where it was measured; None without held-out clips.

    A collective: every rank computes the same clips.
    """
    clips, model = probe_clips(trainer), trainer.engine.model
    if not clips or not trainer.cfg.resume.probe:
        return None
    if not isinstance(trainer.objective, TextToVideoObjective | VaeObjective):
        return None
    model.eval()
    try:
        loss = _loss(trainer, clips)
        with trainer.averaged():
            averaged = _loss(trainer, clips)
    finally:
        model.train()
    return {
        "loss": loss,
        "ema": averaged,
        "clips": [[clip.row, clip.digest] for clip in clips],
        "ranks": trainer.world.size,
        "device": trainer.world.device.type,
        "fingerprint": fingerprint(trainer.cfg),
    }


def _loss(trainer: "Trainer", clips: list[Clip]) -> float:
    model, objective = trainer.engine.model, trainer.objective
    if isinstance(objective, VaeObjective):
        return validation_psnr(model, objective, clips)["val/loss"]
    assert isinstance(objective, TextToVideoObjective)
    return losses(model, objective, clips, "t2v", [TIME])[0]


def require_same_probe(trainer: "Trainer", state: dict[str, Any], *, exactly: bool = True) -> None:
    """Raises Fault where the probe's loss is another than the checkpoint says, beyond `resume.probe_tolerance`.

    `exactly`: nothing of the configuration changed, so that on a CPU not a bit may differ.
    """
    before = state.get("probe")
    found = measure_probe(trainer) if before else None
    if before is None or found is None or found["clips"] != before["clips"]:
        return
    differ = [key for key in ("ranks", "device") if found[key] != before[key]]
    old, new = before["fingerprint"], found["fingerprint"]
    differ += [key for key in new if old.get(key) != new[key]]
    same = exactly and not differ and torch.are_deterministic_algorithms_enabled()
    tolerance = 0.0 if same else trainer.cfg.resume.probe_tolerance
    wrong = [
        name
        for name in ("loss", "ema")
        if abs(found[name] - before[name]) > tolerance * abs(before[name])
    ]
    if not wrong:
        return
    name = wrong[0]
    whose = "the average" if name == "ema" else "the weights"
    other = f"; not the same are {', '.join(differ)}" if differ else ""
    raise Fault(
        f"the checkpoint of step {state['step']} was written where its probe's loss under {whose} was "
        f"{before[name]!r}, here it is {found[name]!r} (let pass: a relative difference of {tolerance:g}){other}; "
        "weights, VAE or arithmetic are not those of the run, so go on from another step, or set resume.probe=false "
        "if you know why"
    )

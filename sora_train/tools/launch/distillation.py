"""From RUN to the arguments of `sora train` that distill it: its own configuration, and what distillation sets."""

from collections.abc import Sequence

from sora_train.config import Config, OptimConfig
from sora_train.config.overrides import text_as_written
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import UserError
from sora_train.training.distillation import find_teacher

STEPS = 4
"""Sampler steps of the result."""
TRAINING = {
    "train.steps": 900,
    "optim.warmup_steps": 20,
    "optim.decay": "linear",
    "checkpoint.every": 300,
    "validation.every": 300,
    "sample.every": 300,
}
"""How long: the student begins as its teacher, so it is a fraction of the teacher's own training."""
LR_SHARE = 0.5
"""Of the teacher's peak learning rate."""


def training_arguments(run: str, overrides: Sequence[str]) -> list[str]:
    """Arguments of `sora train`; `overrides` win. Raises UserError where RUN cannot be distilled."""
    found = find_teacher(run)
    folder = found.checkpoint.path.parent.parent
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} has no config.yaml to distill by; give the folder of a run")
    values = load_yaml(config)
    lr = (values.get("optim") or {}).get("lr", OptimConfig().lr)
    texts = {
        "name": f"{values.get('name', 'default')}, distilled",
        "run.dir": f"{folder}-distilled",
        "resume.run": "",
        "init.run": run,
        "distill.teacher": run,
        # Entries are named by what they hold, so the teacher's latents are the student's.
        "data.cache_dir": (values.get("data") or {}).get("cache_dir") or str(folder / "cache"),
    }
    return [
        str(config),
        *(text_as_written(Config, f"{key}={value}") for key, value in texts.items()),
        "stages=[]",
        "init.weights=ema",
        "init.optimizer=false",
        f"distill.guidance_scale={found.spec.guidance_scale}",
        "objective.guidance_scale=1",
        f"objective.num_steps={STEPS}",
        "objective.caption_dropout=0",
        "objective.frame_noise_share=0",
        f"optim.lr={LR_SHARE * lr}",
        *(f"{key}={value}" for key, value in TRAINING.items()),
        *overrides,
    ]

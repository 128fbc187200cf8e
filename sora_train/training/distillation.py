"""The teacher of a run that distills another: that run's averaged weights, frozen, under its own guidance."""

import copy
from dataclasses import dataclass

from torch import nn

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import split_step, weights_digest
from sora_train.checkpoint.meta import read_meta
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import Teacher
from sora_train.parallel.materialise import materialise
from sora_train.training.run import RunContext

WEIGHTS, PREFIX = "ema", "ema."


@dataclass(frozen=True)
class TeacherRun:
    """A checkpoint that can be distilled, and the spec it is sampled with."""

    checkpoint: checkpoints.Checkpoint
    spec: DiffusionSpec


def find_teacher(run: str) -> TeacherRun:
    """The checkpoint of RUN or RUN@STEP.

    Raises:
        UserError: there is none, or it is no whole, guided flow: a VAE, an adapter, one of two experts, or distilled.
    """
    checkpoint = checkpoints.find(*split_step(run))
    meta = read_meta(checkpoint)
    if meta.spec is None:
        raise UserError(
            f"{run} trained a {meta.task}, and a text-to-video model is what is distilled; give the run of one"
        )
    if meta.config.get("adapter", {}).get("rank"):
        raise UserError(
            f"{run} trained an adapter, and a whole model is what is distilled; make one of it and its base with "
            "`sora ckpt merge`"
        )
    spec = DiffusionSpec.from_dict(meta.spec)
    if spec.folded_guidance:
        raise UserError(
            f"{run} is distilled already (guidance {spec.folded_guidance:g} is in its weights); distill the run it was "
            f"made from, {meta.config['distill']['teacher']}"
        )
    if spec.expert:
        raise UserError(
            f"{run} holds two experts, or one of them, and one transformer for all noise levels is what is distilled; "
            "give the run of one"
        )
    if spec.condition_scale != 1:
        raise UserError(
            f"{run} guides by given frames too (condition_scale={spec.condition_scale:g}), and only guidance by "
            "captions can be distilled"
        )
    return TeacherRun(checkpoint, spec)


def build_teacher(run: RunContext, model: nn.Module, vae: VideoVAE) -> Teacher:
    """The teacher of `distill.teacher`, whole on every rank, beside a model of the same sizes that is not sharded yet.

    Raises:
        UserError: as `find_teacher`, or it is a model of other sizes or of another VAE's latents.
    """
    source = run.cfg.distill.teacher
    found = run.control.broadcast(run.control.together(lambda: find_teacher(source)))
    assert isinstance(found, TeacherRun)
    if found.spec.vae_digest != vae.digest():
        raise UserError(
            f"distill.teacher={source} was trained on the latents of another VAE than vae.path={run.cfg.vae.path!r}; "
            "give the vae section of that run's config.yaml"
        )
    # Frozen encoders stand beside a model in tuples; one of each is enough.
    beside = {id(value): value for value in vars(model).values() if isinstance(value, tuple)}
    teacher = copy.deepcopy(model, beside).requires_grad_(False).eval()
    if any(parameter.is_meta for parameter in teacher.parameters()):
        materialise(teacher, run.world.device)
    tensors = {f"{PREFIX}{name}": value.detach() for name, value in teacher.named_parameters()}
    checkpoints.load_part(found.checkpoint, tensors, PREFIX)
    return Teacher(
        teacher.to(run.world.device, run.layout.param_dtype),
        found.spec.replace(guidance_scale=run.cfg.distill.guidance_scale),
        weights_digest(found.checkpoint, WEIGHTS),
    )

"""The parts of a run, and the order in which they are made: each may use those before it.

model -> VAE -> diffusion spec -> data -> objective -> engine -> averages
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import weights_digest
from sora_train.checkpoint.meta import CheckpointMeta
from sora_train.config import Config
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.models.adapters.factors import AdapterWeights
from sora_train.models.adapters.inject import adapter_weights, add_adapter
from sora_train.models.quantised.linear import quantise_base
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import (
    ConsistencyObjective,
    Objective,
    TextToVideoObjective,
    VaeObjective,
)
from sora_train.objectives.spec import build_spec
from sora_train.parallel.engine import build_engine
from sora_train.parallel.materialise import fill
from sora_train.parallel.protocol import Engine
from sora_train.training.distillation import build_teacher
from sora_train.training.initialise import (
    adapter_start,
    begin_adapter,
    require_fitting,
    require_same_base,
    require_same_spec,
    source_of,
    take_adapter,
    take_moments,
    take_weights,
)
from sora_train.training.kernels import settle_kernels
from sora_train.training.optim.ema import Ema
from sora_train.training.optim.optim import build_optimizer
from sora_train.training.optim.schedule_free import average_of
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.pipeline.release import release_encoders
from sora_train.training.run import RunContext


class Components:
    """What a run is made of. Parts are there once they are built."""

    model: nn.Module | None = None
    """What is trained, before it is sharded; `engine.model` computes. None: a step is looked at without weights."""
    vae: VideoVAE
    """Frozen, or the model itself."""
    spec: DiffusionSpec | None
    data: TrainingData
    objective: Objective
    engine: Engine
    ema: Ema
    num_params: int
    """Trainable parameters."""
    base: str = ""
    """Digest of the frozen base of an adapter."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with the averaged weights."""
        return self.ema.swapped_in(self.engine.weights)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint by name, in place loadable."""
        named = checkpoints.canonical(
            self.engine.model_state(), self.engine.optimizer_state(), self.ema.state()
        )
        return named | self.ema.further_state() | self.objective.tensors()


class Builder(Protocol):
    """Whose parts are built: the Trainer, or who looks at one step of a run (`sora replay`)."""

    run: RunContext
    parts: Components
    resumed: CheckpointMeta | None

    def build_model(self, empty: bool = ...) -> nn.Module: ...

    def build_objective(self) -> Objective: ...

    def build_data(self, model: nn.Module | None) -> TrainingData: ...


def build(builder: Builder, resumed: CheckpointMeta | None) -> None:
    """Make all parts. `resumed` is that of the checkpoint that the run goes on from.

    `train.epochs` becomes steps in `builder.run.cfg` once the data are known.
    """
    parts, run = builder.parts, builder.run
    build_networks(builder, empty=run.cfg.parallel.engine == "fsdp")
    # The base of an adapter is in no checkpoint of its run.
    initial = initial_weights(run, parts) if run.cfg.adapter.on or not resumed else None
    start = None
    if run.cfg.adapter.on and initial is not None:
        parts.base = weights_digest(initial, run.cfg.init.weights)
        require_same_base(run.cfg, parts.base, resumed)
        assert parts.model is not None
        start = None if resumed else adapter_start(run.cfg, initial, parts.model)
    assert parts.model is not None
    parts.spec = build_spec(run.cfg, parts.vae, parts.model)
    if resumed:
        require_same_spec(parts.spec, resumed)
    parts.data = builder.build_data(parts.model)
    builder.run = run = replace(run, cfg=parts.data.with_steps(run.cfg))
    settle_kernels(run, parts.data)
    if run.cfg.memory.encode_first and not run.cfg.dry_run:
        release_encoders(parts.vae, parts.model, run.world.device)
    parts.objective = builder.build_objective()
    build_for_training(run, parts, initial, start)


def build_networks(builder: Builder, *, empty: bool) -> None:
    """The model and the VAE; an `empty` model has no memory for what is trained, if its builder can make such a one."""
    parts, run = builder.parts, builder.run
    options = {"empty": True} if empty and takes_empty(builder.build_model) else {}
    parts.model = model = builder.build_model(**options)
    if run.cfg.adapter.on:
        add_adapter(model, run.cfg.adapter, run.layout.param_dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts.num_params = sum(parameter.numel() for parameter in trained)
    parts.vae = build_vae(run, model)


def takes_empty(build: Callable[..., nn.Module]) -> bool:
    """Whether a builder says that it can make a model without memory for what is trained, which then has
    `initial_values`."""
    return "empty" in inspect.signature(build).parameters


def build_vae(run: RunContext, model: nn.Module | None) -> VideoVAE:
    """The model itself where a VAE is trained, else the frozen one of the configuration."""
    if isinstance(model, VideoVAE):
        return model
    return VideoVAE.from_config(run.cfg.vae).to(run.world.device)


def initial_weights(run: RunContext, parts: Components) -> checkpoints.Checkpoint | None:
    """The checkpoint of `init.run`. Raises UserError where it does not fit this run's model."""
    if not run.cfg.init.run:
        return None
    # Another run may be writing there: what rank 0 sees holds for all.
    checkpoint = run.control.broadcast(run.control.together(lambda: source_of(run.cfg)))
    assert isinstance(checkpoint, checkpoints.Checkpoint)
    assert parts.model is not None
    require_fitting(run.cfg, parts.model, parts.vae, checkpoint)
    return checkpoint


def build_for_training(
    run: RunContext,
    parts: Components,
    initial: checkpoints.Checkpoint | None,
    start: AdapterWeights | None,
) -> None:
    """The engine and the averages, with the weights that the run begins with: those of `initial`, or drawn ones; an
    adapter's those of `start`."""
    cfg, model = run.cfg, parts.model
    assert model is not None
    empty = any(parameter.is_meta for parameter in model.parameters())
    if cfg.adapter.on and initial is not None and not empty:
        begin_adapter(cfg, initial, model, adapter_weights(model))
        take_adapter(cfg, start, adapter_weights(model))
    if cfg.adapter.on:
        quantise_base(model, cfg.memory.base)
    parts.engine = engine = build_engine(
        model, cfg, run.world, run.layout, partial(build_optimizer, cfg.optim)
    )
    if cfg.adapter.on and initial is not None:
        if empty:
            begin_adapter(cfg, initial, engine.model, engine.model_state())
            take_adapter(cfg, start, engine.model_state())
            engine.weights_changed()
    elif initial is not None:
        take_weights(cfg, initial, engine.model_state())
        engine.weights_changed()
        if cfg.init.optimizer:
            take_moments(initial, engine.optimizer_state())
    elif empty:
        fill(engine.model_state(), engine.model.initial_values(cfg.seed))
        engine.weights_changed()
    parts.ema = Ema(
        engine.weights,
        cfg.ema.decay,
        cfg.ema.more,
        cfg.ema.post_hoc,
        engine.weights_changed,
        average_of(cfg.optim, engine.optimizer_state()),
    )


# --- the stock builders ---


def build_model(cfg: Config, empty: bool = False) -> nn.Module:
    """The trainable model on the CPU, with every weight drawn from `seed` and its own name.

    An `empty` one has no memory for what is trained: `initial_values` of the model tells each weight later. A VAE is
    small, so it is always whole.
    """
    if cfg.task == "vae":
        return VideoVAE.from_config(cfg.vae, trainable=True, seed=cfg.seed)
    return TextToVideo(cfg.model, cfg.text, cfg.image, seed=cfg.seed, empty=empty)


def build_objective(run: RunContext, parts: Components) -> Objective:
    """Rectified flow on latents, the distillation of one, or reconstruction for a VAE."""
    if run.cfg.task == "vae":
        return VaeObjective(run.cfg, run.world.device)
    assert parts.spec is not None, "a text-to-video model has a diffusion spec"
    common = run.cfg, parts.spec, parts.vae, run.world.device, run.sharing
    if not run.cfg.distill.teacher:
        return TextToVideoObjective(*common)
    assert parts.model is not None, "the teacher is of the model's sizes"
    return ConsistencyObjective(*common, teacher=build_teacher(run, parts.model, parts.vae))


def build_data(
    run: RunContext, parts: Components, resumed: CheckpointMeta | None = None
) -> TrainingData:
    """The sources, the tape and the loader of the configuration. Raises as TrainingData.build does."""
    return TrainingData.build(run, parts.vae, parts.model, resumed)

"""The Trainer: __init__ builds, train() loops, train_step() steps. Each fits on a screen.

To make it your own, subclass it and override `build_model`, `build_objective`, `build_data` or
`callbacks`; docs/extend.md shows each.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train import distributed
from sora_train.card import print_card
from sora_train.config import Config
from sora_train.distributed import ControlPlane, World
from sora_train.ema import Ema
from sora_train.errors import Fault
from sora_train.finish import finish
from sora_train.initialise import refuse_imported, start_from
from sora_train.metrics import MetricsFile
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae import VideoVAE
from sora_train.objectives import Objective, TextToVideoObjective, VaeObjective
from sora_train.optim import build_optimizer, lr_at
from sora_train.parallel.engine import Engine, FsdpEngine, check_kernels
from sora_train.parallel.mesh import resolve_degrees
from sora_train.progress import Progress
from sora_train.run_folder import RunFolder
from sora_train.sample_folder import sample_shape, write_samples
from sora_train.specification import build_spec
from sora_train.tracking import start_tracker
from sora_train.training_data import TrainingData
from sora_train.validate import validated_kinds, validation_loss, validation_psnr

Callback = Callable[["Trainer", dict[str, float]], None]


class Trainer:
    # fixed by the config
    cfg: Config
    world: World
    control: ControlPlane
    folder: RunFolder
    # swappable parts
    vae: VideoVAE
    data: TrainingData
    objective: Objective
    engine: Engine
    ema: Ema
    # state of training: exactly this, the weights and the moments are in a checkpoint
    step: int
    samples_seen: int
    dropped: int
    captions_cut: int

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.world = distributed.start(cfg.run.device, cfg.run.threads)
        deterministic = cfg.run.deterministic is True or (
            cfg.run.deterministic == "auto" and self.world.device.type == "cpu"
        )
        torch.use_deterministic_algorithms(deterministic)
        # Filling every fresh tensor with NaN is a hunt for bugs, not determinism, and costs a tenth of a small step.
        torch.utils.deterministic.fill_uninitialized_memory = False
        resolve_degrees(
            cfg.parallel, self.world.size
        )  # a wrong one is told before any clip is read
        check_kernels(cfg, self.world.device)
        self.control = ControlPlane(self.world)
        self.folder = RunFolder(cfg, is_main=self.world.is_main)
        self.step = self.samples_seen = self.dropped = self.captions_cut = 0
        self.started = time.monotonic()
        self.resumed = self.newest_checkpoint() if cfg.checkpoint.resume == "auto" else None
        self.state_before = self.resumed.state() if self.resumed else None
        refuse_imported(cfg.run.dir, self.state_before)

        model = self.build_model()
        self.vae = (
            model
            if isinstance(model, VideoVAE)
            else VideoVAE.from_config(cfg.vae).to(self.world.device)
        )
        self.params = sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        )
        if cfg.init.run and self.resumed is None:
            start_from(cfg, model, self.vae)
        self.spec = build_spec(cfg, self.vae, model)
        self.data = self.build_data(model)
        self.cfg = cfg = self.data.with_steps(cfg)
        self.objective = self.build_objective()
        self.engine = FsdpEngine(
            model, cfg, self.world, lambda named: build_optimizer(named, cfg.optim)
        )
        self.ema = Ema(self.engine.model, cfg.ema.decay)
        self.resume()

    # --- what a project of one's own may replace ---

    def build_model(self) -> nn.Module:
        """The trainable model, on the CPU, with every weight drawn from `seed` and its own name."""
        if self.cfg.task == "vae":
            return VideoVAE.from_config(self.cfg.vae, trainable=True, seed=self.cfg.seed)
        return TextToVideo(self.cfg.model, self.cfg.text, seed=self.cfg.seed)

    def build_objective(self) -> Objective:
        if self.cfg.task == "vae":
            return VaeObjective(self.cfg, self.world.device)
        assert self.spec is not None, "a text-to-video model has a diffusion spec"
        return TextToVideoObjective(self.cfg, self.spec, self.vae, self.world.device)

    def build_data(self, model: nn.Module) -> TrainingData:
        return TrainingData.build(
            self.cfg, self.vae, model, self.world, self.control, self.folder, self.state_before
        )

    def callbacks(self) -> list[Callback]:
        """Called on every rank after each step with the trainer and the step's metrics, which they may add to."""
        return []

    # --- the loop ---

    def train(self) -> None:
        """Train to `train.steps` (those of `train.epochs`), from step 0 or from where the run folder stands."""
        print_card(self)
        if self.cfg.dry_run:
            return self.close()
        metrics = (
            MetricsFile(self.folder.metrics, resume_step=self.step) if self.world.is_main else None
        )
        tracker = start_tracker(self.cfg.tracker, self.folder.path) if self.world.is_main else None
        callbacks = self.callbacks()
        try:
            if self.step == 0:
                self.write_samples()
            with Progress(
                self.cfg.train.steps, "training", start=self.step, enabled=self.world.is_main
            ) as progress:
                while self.step < self.cfg.train.steps:
                    row = self.train_step()
                    if self.due(self.cfg.validation.every) or self.step == self.cfg.train.steps:
                        row |= self.validate()
                    for callback in callbacks:
                        callback(self, row)
                    if metrics and (self.step % self.cfg.train.log_every == 0 or "val/loss" in row):
                        metrics.write(self.step, row)
                    progress.update(self.step, **headline(row))
                    if self.due(self.cfg.checkpoint.every):
                        self.save()
                    if self.due(self.cfg.sample.every):
                        self.write_samples()
            finish(self)
        finally:
            if metrics:
                metrics.close()
            if tracker:
                tracker.finish()
            self.close()

    def train_step(self) -> dict[str, float]:
        """One optimizer step over this step's slots of the tape; returns the step's metrics.

        The true total weight over all ranks and slots is known before the first backward, so each
        micro-batch is scaled once and gradients are summed, at any world size.
        """
        began = time.monotonic()
        batches = self.data.step(self.step)
        totals, waited = self.announce([self.objective.weights(batch) for batch in batches])
        sums = dict.fromkeys(totals, 0.0)
        for i, batch in enumerate(batches):
            terms = self.objective.terms(self.engine.model, batch)
            scaled = [term.sum / max(totals[name], 1.0) for name, term in terms.items()]
            loss: Tensor = torch.stack(scaled).sum()
            self.engine.backward(loss, last=i == len(batches) - 1)
            for name, term in terms.items():
                sums[name] += float(term.sum.detach())

        lr = lr_at(self.step, self.cfg.train.steps, self.cfg.optim)
        grad_norm = self.engine.step(lr)
        self.ema.update(self.engine.model, self.step)
        self.step += 1
        return self.metrics_row(batches, sums, totals, grad_norm, lr, waited, began)

    # --- what the loop calls ---

    def announce(self, weights: list[dict[str, float]]) -> tuple[dict[str, float], float]:
        """The step's one small exchange: each term's total weight, and the mean wait for data."""
        names = list(weights[0])
        mine = [sum(weight[name] for weight in weights) for name in names]
        *totals, waited = self.control.sum([*mine, self.data.take_wait_seconds()])
        return dict(zip(names, totals, strict=True)), waited / self.world.size

    def metrics_row(
        self,
        batches: list[Any],
        sums: dict[str, float],
        totals: dict[str, float],
        grad_norm: float,
        lr: float,
        waited: float,
        began: float,
    ) -> dict[str, float]:
        """Sum the step's numbers over the ranks and name them (docs/metrics.md).

        Raises:
            Fault: loss or gradient is not finite; the weights were not touched by this step.
        """
        mine = [
            *sums.values(),
            sum(batch.weight for batch in batches),
            sum(batch.weight * self.data.tokens_of(batch.micro_batch.bucket) for batch in batches),
            sum(len(batch.failures) for batch in batches),
            self.take_captions_cut(),
        ]
        *term_sums, clips, tokens, failed, cut = self.control.sum(mine)
        terms = {
            name: total / max(totals[name], 1.0)
            for name, total in zip(sums, term_sums, strict=True)
        }
        loss = sum(terms.values())
        if not all(map(torch.isfinite, map(torch.tensor, (loss, grad_norm)))):
            raise Fault(
                f"step {self.step}: loss {loss} and gradient norm {grad_norm} are not both finite; the last "
                f"checkpoint is sound, lower optim.lr ({self.cfg.optim.lr}) or look at the clips of this step"
            )
        self.samples_seen += int(clips)
        self.dropped += int(failed)
        self.captions_cut += int(cut)
        seconds = time.monotonic() - began
        return {
            "train/loss": loss,
            **{f"train/loss/{name}": value for name, value in terms.items()},
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/step_seconds": seconds,
            "train/data_wait": waited / seconds,
            "train/tokens_per_second": tokens / seconds,
            "train/clips": clips,
            "train/samples_seen": float(self.samples_seen),
            "train/epoch": self.data.epoch_at(self.step),
            "train/dropped": float(self.dropped),
            "train/captions_cut": float(self.captions_cut),
        }

    def take_captions_cut(self) -> int:
        """Captions this rank has cut since it was asked last."""
        model = self.engine.model
        return model.take_truncated() if isinstance(model, TextToVideo) else 0

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the last step is finish()'s."""
        return every > 0 and self.step % every == 0 and self.step < self.cfg.train.steps

    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out clips, and of the live ones; {} without such clips."""
        clips = self.data.val_clips
        if not clips or self.cfg.validation.every == 0:
            return {}
        model = self.engine.model
        model.eval()
        try:
            if isinstance(self.objective, VaeObjective):
                with self.ema.swapped_in(model):
                    return validation_psnr(model, self.objective, clips)
            assert isinstance(self.objective, TextToVideoObjective)
            times, kinds = self.cfg.validation.times, validated_kinds(self.cfg)
            with self.ema.swapped_in(model):
                row = validation_loss(model, self.objective, clips, times, kinds, self.control)
            if row and self.cfg.validation.live:
                live = validation_loss(model, self.objective, clips, times, kinds[:1], self.control)
                row["val/live/loss"] = live["val/loss"]
            return row
        finally:
            model.train()

    def write_samples(self) -> None:
        """Sample clips of the averaged weights into the run folder."""
        if self.cfg.sample.every == 0 or self.cfg.task == "vae":
            return
        with self.ema.swapped_in(self.engine.model):
            write_samples(self)

    def state(self) -> dict[str, Any]:
        """Everything of a checkpoint that is not a tensor."""
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "dropped": self.dropped,
            "captions_cut": self.captions_cut,
            "task": self.cfg.task,
            "config": self.cfg.model_dump(mode="json"),
            "spec": self.spec.to_dict() if self.spec else None,
            "sample_shape": asdict(sample_shape(self)),
            "manifest_digest": self.data.sources.digest(),
            "stocks": [asdict(stock) for stock in self.data.sources.stocks],
            "quarantine": self.data.loader.quarantine.lines(),
            "versions": checkpoints.state_versions(),
        }

    def tensors(self) -> dict[str, Tensor]:
        return checkpoints.canonical(
            self.engine.model_state(), self.engine.optimizer_state(), self.ema.state()
        )

    def save(self) -> None:
        checkpoints.save(
            self.folder.checkpoints, self.step, self.tensors(), self.state(), self.control
        )
        if self.world.is_main:
            checkpoints.prune(self.folder.checkpoints, self.cfg.checkpoint.keep_last)

    def newest_checkpoint(self) -> checkpoints.Checkpoint | None:
        """The newest complete checkpoint of the run folder, as rank 0 sees it."""
        found = checkpoints.list_checkpoints(self.folder.checkpoints) if self.world.is_main else []
        newest = self.control.broadcast(found[-1] if found else None)
        assert newest is None or isinstance(newest, checkpoints.Checkpoint)
        return newest

    def resume(self) -> None:
        """Go on from the newest complete checkpoint of the run folder, if there is one."""
        state = self.state_before
        if self.resumed is None or state is None:
            return
        self.data.sources.require_following(state)
        checkpoints.load(self.resumed, self.tensors(), self.control)
        self.data.loader.quarantine.restore(state["quarantine"], record=self.world.is_main)
        self.step, self.samples_seen, self.dropped = (
            state["step"],
            state["samples_seen"],
            state["dropped"],
        )
        # Checkpoints of before it was counted have none.
        self.captions_cut = state.get("captions_cut", 0)

    def close(self) -> None:
        self.data.close()
        self.folder.close()
        distributed.stop(self.world)


def headline(row: dict[str, float]) -> dict[str, float | str]:
    """The few numbers of the progress line."""
    return {
        "loss": row["train/loss"],
        "s/step": row["train/step_seconds"],
        "tokens/s": f"{row['train/tokens_per_second']:,.0f}",
        "data wait": f"{row['train/data_wait']:.0%}",
        **({"val": row["val/loss"]} if "val/loss" in row else {}),
    }

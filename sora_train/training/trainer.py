"""The Trainer: __init__ builds, train() loops, train_step() steps. Each fits on a screen.

To make it your own, subclass it and override `build_model`, `build_objective`, `build_data` or
`callbacks`; docs/extend.md shows each.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train.base.progress import Progress
from sora_train.config import Config
from sora_train.data.sample import ClipBatch, rows_of
from sora_train.errors import Preempted
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.monitoring.metrics import MetricsFile
from sora_train.monitoring.run_folder import RunFolder
from sora_train.monitoring.tracking.process import start_tracker
from sora_train.objectives import LossTerm, Objective, TextToVideoObjective, VaeObjective
from sora_train.objectives.spec import build_spec
from sora_train.objectives.validation import validated_kinds, validation_loss, validation_psnr
from sora_train.parallel.checks.self_test import check_at_start
from sora_train.parallel.context.peers import Peers
from sora_train.parallel.degrees import check_degrees, resolve_degrees
from sora_train.parallel.engine import build_engine, check_engine, check_kernels
from sora_train.parallel.materialise import fill
from sora_train.parallel.protocol import Engine
from sora_train.runtime import world as distributed
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.health import Health, longest_wait, record_collectives
from sora_train.runtime.world import World
from sora_train.training.accounts import Accounts
from sora_train.training.card import print_card
from sora_train.training.checkpointing import make_saver, measure_space, prepare, record
from sora_train.training.optim.ema import Ema
from sora_train.training.optim.ema_snapshots import snapshots_every, write_snapshot
from sora_train.training.optim.optim import build_optimizer, lr_at
from sora_train.training.outputs.finish import finish
from sora_train.training.outputs.samples import sample_prompts, sample_shape, write_samples
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.resilience.debug_mode import start_debug
from sora_train.training.resilience.initialise import (
    empty_model,
    refuse_imported,
    require_fitting,
    source_of,
    take_moments,
    take_weights,
)
from sora_train.training.resilience.out_of_memory import Work, explained, record_allocations
from sora_train.training.resilience.probe import measure_probe
from sora_train.training.resilience.resume import (
    allowed_changes,
    require_same_spec,
    restore,
    starting_point,
)
from sora_train.training.resilience.rollback import roll_back, take_up
from sora_train.training.resilience.spike_report import record_spike
from sora_train.training.spike_detector import SpikeDetector
from sora_train.training.step_metrics import FAILURES
from sora_train.training.warm_up import warm_up

Parts = dict[str, LossTerm]
"""The terms of one micro-batch, without what a backward pass would need."""
Callback = Callable[["Trainer", dict[str, float]], None]


class Trainer:
    # fixed by the config
    cfg: Config
    world: World
    peers: Peers
    control: ControlPlane
    health: Health
    folder: RunFolder
    # swappable parts
    vae: VideoVAE
    data: TrainingData
    objective: Objective
    engine: Engine
    ema: Ema
    # state of training: exactly this, the weights and the moments are in a checkpoint
    step: int
    data_step: int
    """The step of the tape that the next step reads: `step`, until data was passed over."""
    samples_seen: int
    dropped: int
    captions_cut: int
    judge: SpikeDetector
    """Whether a step is to be taken."""
    owed: list[str]
    """What the last step still asks for, in order: `validation`, `row`, `snapshot`, `save`, `samples`."""
    row: dict[str, float]
    """The last step's metrics."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        record_collectives(cfg.run.dir)
        wait = longest_wait(cfg.health)
        meeting = timedelta(seconds=cfg.health.meeting_seconds)
        self.world = distributed.start(cfg.run.device, cfg.run.threads, wait, meeting)
        self.step = self.data_step = self.samples_seen = self.dropped = self.captions_cut = 0
        self.judge = SpikeDetector(cfg.spike_detection)
        self.row, self.owed = {}, ["samples"]
        self.saved: tuple[int, list[str]] | None = None
        self.metrics: MetricsFile | None = None
        self.called: list[Callback] = []
        self.probe: dict[str, Any] | None = None
        self.started = time.monotonic()
        # Whoever starts again in this process finds no lock, no decode process and no group left.
        with on_error(lambda: distributed.stop(self.world)):
            distributed.set_determinism(cfg.run.deterministic, self.world.device)
            self.meet(wait)
        with on_error(self.close), self.health.building():
            with self.health.phase("self-test"):
                self.self_tested = check_at_start(cfg, self.world, self.control)
            self.saver = make_saver(cfg, self.folder, self.control)
            self.build()
            self.space = measure_space(self)

    def meet(self, wait: timedelta) -> None:
        """This rank's place among all, and the control plane; what does not fit is told before any clip is read."""
        cfg = self.cfg
        self.degrees = resolve_degrees(cfg.parallel, self.world.size)
        check_degrees(cfg, self.degrees)
        self.world = replace(self.world, cp=self.degrees.cp)
        check_engine(cfg, self.degrees, self.world.device)
        check_kernels(cfg, self.world.device)
        self.control = ControlPlane(self.world, wait)
        self.peers = Peers(self.control, self.degrees)
        self.folder = self.control.together(lambda: RunFolder(cfg, is_main=self.world.is_main))
        record_allocations(cfg, self.world)
        where = (self.folder.path, self.decoder_stacks, self.degrees.place_of)
        self.health = Health(cfg.health, self.control, *where)

    def build(self) -> None:
        """Make the parts, and bring them to where the run folder stands."""
        cfg = self.cfg
        self.start = starting_point(cfg, self.folder, self.control)
        self.state_before = self.start.state if self.start else None
        refuse_imported(cfg.run.dir, self.state_before)
        changed = allowed_changes(cfg, self.start.state) if self.start else []
        self.folder.record(cfg, self.world.size, self.start.forked_from if self.start else "")

        # Where the stock model is trained, no rank ever holds all of it.
        stock = type(self).build_model is Trainer.build_model
        empty = stock and cfg.task == "text_to_video" and cfg.parallel.engine == "fsdp"
        model = empty_model(cfg) if empty else self.build_model()
        self.vae = (
            model
            if isinstance(model, VideoVAE)
            else VideoVAE.from_config(cfg.vae).to(self.world.device)
        )
        self.params = sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        )
        source: object = None
        if cfg.init.run and self.start is None:
            # Another run may be writing there: what rank 0 sees holds for all.
            source = self.control.broadcast(self.control.together(lambda: source_of(cfg)))
            assert isinstance(source, checkpoints.Checkpoint)
            require_fitting(cfg, model, self.vae, source)
        self.spec = build_spec(cfg, self.vae, model)
        if self.start:
            require_same_spec(self.spec.to_dict() if self.spec else None, self.start)
        self.data = self.build_data(model)
        self.cfg = cfg = self.data.with_steps(cfg)
        self.objective = self.build_objective()
        self.accounts = Accounts(self)
        self.engine = build_engine(
            model, cfg, self.world, lambda named: build_optimizer(named, cfg.optim)
        )
        self.debug = start_debug(self)
        if isinstance(source, checkpoints.Checkpoint):
            take_weights(cfg, source, self.engine.model_state())
            self.engine.weights_changed()
            if cfg.init.optimizer:
                take_moments(source, self.engine.optimizer_state())
        elif empty and isinstance(self.engine.model, TextToVideo):
            fill(self.engine.model, self.engine.model.initial_values(cfg.seed))
        self.ema = Ema(
            self.engine.weights,
            cfg.ema.decay,
            cfg.ema.more,
            cfg.ema.post_hoc,
            self.engine.weights_changed,
        )
        if self.start:
            restore(self, self.start, changed)

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
        return TextToVideoObjective(self.cfg, self.spec, self.vae, self.world.device, self.peers)

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
        if self.cfg.dry_run:
            print_card(self)
            return self.close()
        with self.running(), self.progress() as progress:
            prepare(self)
            if self.engine.recompiles() is not None:
                warm_up(self)
            while self.step < self.cfg.train.steps or self.owed:
                if not self.owed:
                    self.row = self.train_step()
                    self.owed = self.due()
                    if self.judge.exhausted:
                        roll_back(self)
                self.pay()
                progress.update(self.step, **headline(self.row))
                self.health.leave_if_preempted()
            with self.health.phase("finish"):
                finish(self)

    def train_step(self) -> dict[str, float]:
        """One optimizer step over this step's slots of the tape; returns the step's metrics.

        The true total weight over all ranks and slots is known before the first backward, so each
        micro-batch is scaled once and gradients are summed, at any world size. Nothing is changed
        before loss and gradient norm are known to all.
        """
        began = time.monotonic()
        batches, weights, error = self.read()
        totals, waited = self.announce(batches, weights, error)
        parts: list[Parts] = []
        with self.health.phase("compute", rows_of(batches)):
            for i, batch in enumerate(self.debug.watched(batches) if self.debug else batches):
                with explained(self.work(batch, "forward and backward"), self.cfg, self.world):
                    terms = self.objective.terms(self.engine.model, batch)
                    scaled = [term.sum / max(totals[name], 1.0) for name, term in terms.items()]
                    loss: Tensor = torch.stack(scaled).sum()
                    self.engine.backward(loss, last=i == len(batches) - 1)
                parts.append(detached(terms))
            grad_norm = self.engine.gradient_norm()
        row = self.measure(batches, parts, totals, grad_norm)
        with self.health.phase("update"):
            self.update(row, grad_norm, batches, parts, totals)
        self.step += 1
        self.data_step += 1
        return self.timed(row, waited, began)

    # --- what a step calls ---

    def read(self) -> tuple[list[ClipBatch], list[dict[str, float]], Exception | None]:
        """This rank's micro-batches and their weights, or the weights of an idle slot and what went wrong."""
        with self.health.phase("data", self.data.rows_at(self.data_step)):
            try:
                batches = self.data.step(self.data_step)
                return batches, [self.objective.weights(batch) for batch in batches], None
            # Not swallowed: the exchange raises it, on all ranks together.
            except Exception as error:
                return [], [self.objective.weights(self.data.idle(self.data_step))], error

    def announce(
        self, batches: list[ClipBatch], weights: list[dict[str, float]], error: Exception | None
    ) -> tuple[dict[str, float], float]:
        """The step's one exchange before any backward: each term's total weight, and the mean wait for data."""
        names = list(weights[0])
        mine = [sum(weight[name] for weight in weights) for name in names]
        *totals, waited = self.health.exchange(
            [*mine, self.data.take_wait_seconds()], error or self.saver.poll(), slots=len(batches)
        )
        return dict(zip(names, totals, strict=True)), waited / self.world.dp_size

    def measure(
        self,
        batches: list[ClipBatch],
        parts: list[Parts],
        totals: dict[str, float],
        grad_norm: float,
    ) -> dict[str, float]:
        """Sum the step's numbers over the ranks and name them (docs/metrics.md); the same on every rank."""
        sums = dict.fromkeys(totals, 0.0)
        for terms in parts:
            for name, term in terms.items():
                sums[name] += float(term.sum)
        mine = [
            *sums.values(),
            *self.accounts.numbers.sums(batches, parts),
            self.take_captions_cut(),
            grad_norm,
        ]
        own = [self.engine.recompiles() or 0]
        *summed, cut, norms, recompiles = self.health.exchange(mine, own=own)
        term_sums, numbers = summed[: len(sums)], summed[len(sums) :]
        losses = {
            name: total / max(totals[name], 1.0)
            for name, total in zip(sums, term_sums, strict=True)
        }
        self.dropped += int(numbers[FAILURES])
        self.captions_cut += int(cut)
        return {
            "train/loss": sum(losses.values()),
            **{f"train/loss/{name}": value for name, value in losses.items()},
            # A mean of equal numbers, so that whatever is decided by it is decided alike.
            "train/grad_norm": norms / self.world.dp_size,
            "train/lr": lr_at(self.step, self.cfg.train.steps, self.cfg.optim),
            **self.accounts.numbers.row(numbers),
            "train/data_step": float(self.data_step + 1),
            "train/epoch": self.data.epoch_at(self.data_step + 1),
            "train/dropped": float(self.dropped),
            "train/captions_cut": float(self.captions_cut),
            **({} if self.engine.recompiles() is None else {"train/recompiles": recompiles}),
        }

    def update(
        self,
        row: dict[str, float],
        grad_norm: float,
        batches: list[ClipBatch],
        parts: list[Parts],
        totals: dict[str, float],
    ) -> None:
        """Change the weights and their average, or skip a step that all ranks judge to be bad."""
        verdict, clips = (
            self.judge.verdict(row["train/loss"], row["train/grad_norm"]),
            row["train/clips"],
        )
        if verdict.bad:
            self.engine.skip()
            self.objective.skip()
            record_spike(self, verdict, batches, parts, totals)
            self.judge.skip(int(clips))
            return
        with explained(self.work(batches[-1], "the update"), self.cfg, self.world):
            row |= self.objective.step()
            self.engine.step(row["train/lr"], grad_norm)
        self.ema.update(self.engine.weights, self.step)
        self.judge.accept(verdict.loss, verdict.grad_norm)
        self.samples_seen += int(clips)

    def work(self, batch: ClipBatch, doing: str) -> Work:
        return Work(self.step + 1, doing, batch, self.data.tokens_of(batch.micro_batch.bucket))

    def timed(self, row: dict[str, float], waited: float, began: float) -> dict[str, float]:
        """The step's metrics with its times."""
        seconds = time.monotonic() - began
        self.health.stepped(seconds, self.step)
        return row | {
            **self.judge.metrics(),
            "train/samples_seen": float(self.samples_seen),
            "train/step_seconds": seconds,
            "train/data_wait": waited / seconds,
            **self.accounts.step(row, seconds, waited, counts=not self.judge.tally.in_a_row),
        }

    # --- what the loop calls ---

    def due(self) -> list[str]:
        """What the step that was just done asks for, in order."""
        last = self.step == self.cfg.train.steps
        every = self.cfg.validation.every
        due = ["validation"] if every and (last or self.step % every == 0) else []
        due.append("row")
        due += ["snapshot"] if self.falls_on(snapshots_every(self.cfg)) else []
        due += ["save"] if self.falls_on(self.cfg.checkpoint.every) else []
        return due + (["samples"] if self.falls_on(self.cfg.sample.every) else [])

    def falls_on(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the last step is finish()'s."""
        return every > 0 and self.step % every == 0 and self.step < self.cfg.train.steps

    def pay(self) -> None:
        """Do what is owed; each is struck off when it is done, so that a checkpoint in between knows the rest."""
        while self.owed:
            match self.owed[0]:
                case "validation":
                    self.row |= self.validate()
                case "row":
                    self.record()
                case "samples":
                    self.write_samples()
                case "snapshot":
                    write_snapshot(self)
                case "save":
                    # The checkpoint itself is not owed to whoever goes on from it.
                    self.owed = self.owed[1:]
                    self.save()
                    continue
            self.owed = self.owed[1:]

    def record(self) -> None:
        """Hand the step's row to the callbacks and to metrics.jsonl."""
        if self.health.report_due(self.step):
            self.row |= self.health.stragglers(self.step)
        for callback in self.called:
            callback(self, self.row)
        logged = self.step % self.cfg.train.log_every == 0 or "val/loss" in self.row
        if self.metrics and logged:
            self.row |= self.accounts.row()
            self.metrics.write(self.step, self.row)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block the run is recorded; whatever ends it, it ends in order and no rank waits for another."""
        tracker = None
        try:
            print_card(self)
            self.called = self.callbacks()
            self.accounts.start()
            if self.world.is_main:
                self.folder.record_part(self.cfg, self.step, self.world.size)
                written = self.step - ("row" in self.owed)
                self.metrics = MetricsFile(self.folder.metrics, resume_step=written)
                self.accounts.start_goodput(self.folder.path, self.metrics)
                tracker = start_tracker(self.cfg.tracker, self.folder.path)
            with self.health.phase("loop"):
                yield
        except Preempted as notice:
            self.save()
            self.commit()
            if tracker:
                tracker.detach()
            raise Preempted(
                f"{notice}: step {self.step} is saved in {self.folder.checkpoints}"
            ) from notice
        except BaseException as error:
            told = distributed.lost_peer(error)
            self.health.failed(told or error)
            if told:
                raise told from error
            raise
        finally:
            with ExitStack() as ending:
                # In the reverse order; the tracker last, so that no other rank waits meanwhile.
                if tracker:
                    ending.callback(tracker.finish)
                ending.callback(self.close)
                if self.metrics:
                    ending.callback(self.metrics.close)

    def progress(self) -> Progress:
        return Progress(
            self.cfg.train.steps, "training", start=self.step, enabled=self.world.is_main
        )

    def take_captions_cut(self) -> int:
        """Captions this rank has cut since it was asked last."""
        model = self.engine.model
        return model.take_truncated() if isinstance(model, TextToVideo) else 0

    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out clips, and of the live ones; {} without such clips."""
        clips = self.data.val_clips
        if not clips or self.cfg.validation.every == 0:
            return {}
        model, check_preemption = self.engine.model, self.health.check_preemption
        model.eval()
        try:
            with self.health.phase("validation"):
                if isinstance(self.objective, VaeObjective):
                    with self.averaged():
                        return validation_psnr(model, self.objective, clips, check_preemption)
                assert isinstance(self.objective, TextToVideoObjective)
                times, kinds = self.cfg.validation.times, validated_kinds(self.cfg)
                how = (model, self.objective, clips, times)
                with self.averaged():
                    row = validation_loss(*how, kinds, self.control, check_preemption)
                if row and self.cfg.validation.live:
                    live = validation_loss(*how, kinds[:1], self.control, check_preemption)
                    row["val/live/loss"] = live["val/loss"]
                return row
        finally:
            model.train()

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with the averaged weights."""
        return self.ema.swapped_in(self.engine.weights)

    def write_samples(self) -> None:
        """Sample clips of the averaged weights into the run folder."""
        if self.cfg.sample.every == 0 or self.cfg.task == "vae":
            return
        prompts = sample_prompts(self.cfg, self.data)
        if not prompts:
            return
        assert self.spec is not None
        with self.health.phase("samples"), self.averaged():
            write_samples(
                self.folder.samples(self.step) if self.world.is_main else None,
                self.engine.model,
                self.vae,
                self.spec,
                prompts,
                sample_shape(self.cfg, self.data),
                seed=self.cfg.sample.seed,
                on_step=lambda _: self.health.check_preemption(),
            )

    def state(self) -> dict[str, Any]:
        """Everything of a checkpoint that is not a tensor."""
        return {
            "step": self.step,
            "data_step": self.data_step,
            "samples_seen": self.samples_seen,
            "dropped": self.dropped,
            "captions_cut": self.captions_cut,
            "judge": self.judge.state(),
            "owed": self.owed,
            "row": self.row,
            "task": self.cfg.task,
            "config": self.cfg.model_dump(mode="json"),
            "spec": self.spec.to_dict() if self.spec else None,
            "objective": self.objective.facts(),
            "sample_shape": asdict(sample_shape(self.cfg, self.data)),
            "manifest_digest": self.data.sources.digest(),
            "stocks": [asdict(stock) for stock in self.data.sources.stocks],
            "quarantine": self.data.loader.quarantine.lines(),
            "epoch": self.data.epoch_at(self.data_step),
            "plan": self.data.plan_digest(self.data_step * self.data.micro_batches),
            "forked_from": self.start.forked_from if self.start else "",
            "probe": self.probe,
            "versions": checkpoints.state_versions(),
            **record(self),
        }

    def tensors(self) -> dict[str, Tensor]:
        named = checkpoints.canonical(
            self.engine.model_state(), self.engine.optimizer_state(), self.ema.state()
        )
        return named | self.ema.further_state() | self.objective.tensors()

    def save(self) -> None:
        """Save this moment, unless the newest checkpoint is of it already; `commit` waits for it."""
        if self.saved == (self.step, self.owed):
            return
        with self.health.phase("save"):
            self.probe = measure_probe(self)
            self.saver.save(self.step, self.tensors(), self.state())
        self.saved = (self.step, self.owed)

    def commit(self) -> None:
        """Until the last save is a checkpoint. Raises Fault, on all ranks, if it cannot be."""
        with self.health.phase("save"):
            self.saver.wait()

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint says beside its tensors."""
        self.step, self.samples_seen, self.dropped = (
            state["step"],
            state["samples_seen"],
            state["dropped"],
        )
        self.data_step, self.captions_cut = state["data_step"], state["captions_cut"]
        self.owed, self.row = state["owed"], state["row"]
        self.saved = (self.step, self.owed)
        self.health.step = self.step
        self.judge.load(state["judge"])
        take_up(self, state)

    def decoder_stacks(self) -> str:
        """What the decode processes are doing."""
        return self.data.loader.stacks() if hasattr(self, "data") else ""

    def close(self) -> None:
        with self.health.phase("closing"):
            for part in ("accounts", "saver", "data", "engine"):
                if hasattr(self, part):
                    getattr(self, part).close()
        self.health.stop()
        self.folder.close()
        distributed.stop(self.world)


@contextmanager
def on_error(undo: Callable[[], None]) -> Iterator[None]:
    """What fails inside the block fails after `undo`."""
    try:
        yield
    except BaseException:
        undo()
        raise


def detached(terms: dict[str, LossTerm]) -> Parts:
    return {name: replace(term, sum=term.sum.detach()) for name, term in terms.items()}


def headline(row: dict[str, float]) -> dict[str, float | str]:
    """The few numbers of the progress line; none before the first step."""
    if not row:
        return {}
    return {
        "loss": row["train/loss"],
        "s/step": row["train/step_seconds"],
        "tokens/s": f"{row['train/tokens_per_second']:,.0f}",
        "data wait": f"{row['train/data_wait']:.0%}",
        **({"val": row["val/loss"]} if "val/loss" in row else {}),
    }

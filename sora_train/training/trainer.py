"""The Trainer: __init__ builds, train() loops, train_step() steps. Each fits on a screen.

To make it your own, hand it a `Recipe`, or subclass it and override `build_model`, `build_objective`, `build_data`,
`callbacks`, `validate` or `write_samples`; docs/extend.md shows both.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train.base.code_version import code_version
from sora_train.base.progress import Progress
from sora_train.checkpoint.meta import CheckpointMeta, TrainState, read_meta
from sora_train.checkpoint.space import Space, require_space, space_for
from sora_train.config import Config
from sora_train.data.sample import ClipBatch, rows_of
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import Preempted
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.monitoring.metrics import MetricsFile
from sora_train.monitoring.run_folder import RunFolder
from sora_train.monitoring.tracking.process import start_tracker
from sora_train.objectives import LossTerm, Objective
from sora_train.parallel.checks.self_test import check_at_start
from sora_train.parallel.degrees import Degrees
from sora_train.parallel.layout import Layout
from sora_train.parallel.protocol import Engine
from sora_train.runtime import world as distributed
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.health import Health
from sora_train.runtime.world import World
from sora_train.training.card import print_card
from sora_train.training.components import Components, build, takes_empty
from sora_train.training.initialise import refuse_imported
from sora_train.training.optim.ema import Ema
from sora_train.training.optim.ema_snapshots import snapshots_every, write_snapshot
from sora_train.training.optim.optim import lr_at
from sora_train.training.outputs.finish import finish
from sora_train.training.outputs.run_totals import RunTotals, peak_of
from sora_train.training.outputs.samples import sample_shape
from sora_train.training.outputs.saving import config_digest, make_saver, tracker_run_id
from sora_train.training.outputs.step_metrics import FAILURES, KindOfClips, StepMetrics
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.pipeline.frame_rates import rate_range
from sora_train.training.pipeline.release import encoders_at_hand
from sora_train.training.recipe import Callback, Recipe
from sora_train.training.resilience import resume, rollback
from sora_train.training.resilience.debug_mode import start_debug
from sora_train.training.resilience.out_of_memory import Work, explained, record_allocations
from sora_train.training.resilience.outcome import Found, Outcome
from sora_train.training.resilience.probe import measure_probe
from sora_train.training.resilience.spike_detector import Limits, SpikeDetector, judge
from sora_train.training.resilience.spike_report import ComputedStep, record_spike
from sora_train.training.run import RunContext, join
from sora_train.training.warm_up import warm_up

Terms = dict[str, LossTerm]
"""The terms of one micro-batch, without what a backward pass would need."""

RENAMED = {
    "state_before": "resumed, a CheckpointMeta",
    "judge": "spikes",
    "owed": "state.pending",
    "row": "state.row",
    "samples_seen": "state.samples_seen",
    "peers": "run.sharing",
    "params": "parts.num_params",
    "tensors": "parts.tensors",
    "averaged": "parts.averaged",
}
"""Attributes that subclasses of earlier versions used, and where they are."""


class Trainer:
    run: RunContext
    parts: Components
    state: TrainState
    """With the weights, their averages and the moments, this is what a checkpoint holds."""
    kinds: dict[str, KindOfClips]
    """What the step that was measured last holds."""
    resumed: CheckpointMeta | None
    """That of the checkpoint which the run goes on from."""
    # Of `run`, under shorter names for subclasses and callbacks.
    cfg: Config
    world: World
    layout: Layout
    degrees: Degrees
    control: ControlPlane
    health: Health
    folder: RunFolder
    # Of `parts`.
    vae: VideoVAE
    spec: DiffusionSpec | None
    data: TrainingData
    objective: Objective
    engine: Engine
    ema: Ema

    def __init__(self, cfg: Config, recipe: Recipe = Recipe()):  # noqa: B008 - it is frozen
        self.started = time.monotonic()
        self._begin(join(cfg), recipe)
        record_allocations(cfg, self.world)
        self.spikes = SpikeDetector(cfg.spike_detection)
        self.saved: tuple[int, list[str]] | None = None
        self.metrics_file: MetricsFile | None = None
        self.probe: dict[str, Any] | None = None
        # Whoever starts again in this process finds no lock, no decode process and no group left.
        with on_error(self.close), self.health.building():
            with self.health.phase("self-test"):
                self.self_tested = check_at_start(cfg, self.layout, self.control)
            self.saver = make_saver(self.run)
            self.build()
            self.space = self.measure_space()

    def _begin(self, run: RunContext, recipe: Recipe) -> None:
        self.run, self.recipe = run, recipe
        self.parts, self.state, self.resumed = Components(), TrainState(), None

    @classmethod
    def beside(cls, run: RunContext, recipe: Recipe = Recipe()) -> "Trainer":  # noqa: B008
        """One that only builds parts, to look at a step of another run (`sora replay`); it never trains."""
        trainer = cls.__new__(cls)
        trainer._begin(run, recipe)
        return trainer

    def __getattr__(self, name: str) -> Any:
        for holder in ("run", "parts"):
            held = self.__dict__.get(holder)
            if held is not None and (name in vars(held) or name in vars(type(held))):
                return getattr(held, name)
        moved = f"; it is {RENAMED[name]} now" if name in RENAMED else ""
        raise AttributeError(f"{type(self).__name__} has no {name!r}{moved}")

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def data_step(self) -> int:
        """The step of the tape that is read next."""
        return self.state.data_step

    def build(self) -> None:
        """Make the parts, and bring them to where the run folder stands."""
        start = resume.starting_point(self.cfg, self.folder, self.control)
        self.resumed = start.meta if start else None
        refuse_imported(self.cfg.run.dir, self.resumed)
        changes = resume.allowed_changes(self.cfg, start.meta.config) if start else []
        self.folder.record(self.cfg, self.world.size, start.forked_from if start else "")
        build(self, self.resumed)
        self.health.watchdog.children = self.data.loader.stacks
        self.metrics = StepMetrics(self.cfg, self.data, self.world.size, peak_of(self.run))
        self.totals = RunTotals(self.run, self.data.loader.quarantine, self.saver)
        self.debug = start_debug(self.run, self.parts)
        if start:
            self.go_on(start, [*changes, *resume.changed_draws(start.meta)])

    # --- what a project of one's own may replace ---

    def build_model(self, empty: bool = False) -> nn.Module:
        """The trainable model on the CPU, with every weight drawn from `seed` and its own name; see `Recipe.model`."""
        options = {"empty": True} if empty and takes_empty(self.recipe.model) else {}
        return self.recipe.model(self.cfg, **options)

    def build_objective(self) -> Objective:
        return self.recipe.objective(self.run, self.parts)

    def build_data(self, model: nn.Module | None) -> TrainingData:
        return self.recipe.data(self.run, self.parts, self.resumed)

    def callbacks(self) -> list[Callback]:
        """Called on every rank after each step with the trainer and the step's metrics, which they may add to."""
        return list(self.recipe.callbacks)

    def validate(self) -> dict[str, float]:
        """Metrics of the averaged weights on held-out clips; {} without such clips."""
        return self.recipe.validate(self.run, self.parts)

    def write_samples(self) -> None:
        """Sample clips of the averaged weights into the run folder."""
        with self.encoders():
            self.recipe.sample(self.run, self.parts, self.step)

    def encoders(self) -> AbstractContextManager[None]:
        """Inside the block the frozen networks are at hand where `memory.encode_first` has sent them away."""
        assert self.parts.model is not None
        return encoders_at_hand(self.vae, self.parts.model, self.world.device)

    # --- the loop ---

    def train(self) -> None:
        """Train to `train.steps` (those of `train.epochs`), from step 0 or from where the run folder stands."""
        if self.cfg.dry_run:
            print_card(self.run, self.parts, self.state, self.space, self.self_tested)
            return self.close()
        with self.recorded(), self.progress() as progress:
            self.prepare()
            while self.step < self.cfg.train.steps or self.state.pending:
                # A run that was interrupted between two steps first does what the last one still asks for.
                if not self.state.pending:
                    self.state.row = self.train_step()
                    self.state.pending = due_actions(self.cfg, self.step)
                    if self.spikes.exhausted:
                        self.roll_back()
                self.do("validate", lambda: self.state.row.update(self.validate()))
                self.do("log", self.log)
                self.do("snapshot", lambda: write_snapshot(self.run, self.ema, self.step))
                self.do("save", self.save)
                self.do("sample", self.write_samples)
                progress.update(self.step, **headline(self.state.row))
                self.health.leave_if_preempted()
            with self.health.phase("finish"):
                self.save()
                self.commit()
                # What follows can fail without losing the training.
                self.write_samples()
                with self.encoders():
                    finish(
                        self.run, self.parts, self.state, seconds=time.monotonic() - self.started
                    )

    def train_step(self) -> dict[str, float]:
        """One optimizer step over this step's slots of the tape; returns the step's metrics.

        The true total weight over all ranks and slots is known before the first backward, so each
        micro-batch is scaled once and gradients are summed, at any world size. Loss and gradient norm
        of all ranks are judged on the device, and a bad step changes nothing there; the host reads
        them while the device updates.
        """
        began = time.monotonic()
        batches, weights, error = self.read()
        totals, waited = self.announce(batches, weights, error)
        parts: list[Terms] = []
        with self.health.phase("compute", rows_of(batches)):
            watched = self.debug.watched(self.step + 1, batches) if self.debug else batches
            for i, batch in enumerate(watched):
                with explained(self.work(batch, "forward and backward"), self.cfg, self.world):
                    terms = self.objective.terms(self.engine.model, batch)
                    scaled = [term.sum / max(totals[name], 1.0) for name, term in terms.items()]
                    loss: Tensor = torch.stack(scaled).sum()
                    self.engine.backward(loss, last=i == len(batches) - 1)
                parts.append(detached(terms))
            grad_norm = self.engine.gradient_norm()
        shares = self.shares(batches, parts)
        with self.health.phase("update"):
            limits = self.spikes.limits(shares)
            outcome = Outcome(batches, parts, totals, grad_norm, limits, self.world)
            with explained(self.work(batches[-1], "the update"), self.cfg, self.world):
                self.saver.let_write()
                self.engine.step(self.learning_rate(), grad_norm, outcome.bad)
            self.objective.expect(self.data.micro_batches_at(self.data_step + 1))
            found = outcome.read()
        row = self.measure(batches, totals, found, shares)
        self.settle(row, found, limits, ComputedStep(batches, found.parts, totals))
        self.state.step += 1
        self.state.data_step += 1
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

    def learning_rate(self) -> float:
        """That of the step that is being taken."""
        return lr_at(self.step, self.cfg.train.steps, self.cfg.optim)

    def shares(self, batches: list[ClipBatch], parts: list[Terms]) -> dict[str, float]:
        """The share of each kind of clips in the step, over all ranks; the device is not asked."""
        return self.metrics.shares(
            self.health.exchange(self.metrics.kind_weights(batches, parts), slots=len(batches))
        )

    def measure(
        self,
        batches: list[ClipBatch],
        totals: dict[str, float],
        found: Found,
        shares: dict[str, float],
    ) -> dict[str, float]:
        """Sum the step's other numbers over the ranks and name all (docs/metrics.md); the same on every rank."""
        numbers = self.metrics.sums(batches, found.parts, totals)
        own = [self.engine.recompiles() or 0]
        encoding = self.objective.take_encode_seconds() + self.data.take_encode_seconds()
        *numbers, cut, encoding, recompiles = self.health.exchange(
            [*numbers, self.take_captions_cut(), encoding], own=own
        )
        losses = {name: total / max(totals[name], 1.0) for name, total in found.sums.items()}
        self.state.dropped += int(numbers[FAILURES])
        self.state.captions_cut += int(cut)
        self.kinds = self.metrics.kinds_of(numbers, shares)
        return {
            "train/loss": sum(losses.values()),
            **{f"train/loss/{name}": value for name, value in losses.items()},
            "train/grad_norm": found.grad_norm,
            "train/lr": self.learning_rate(),
            **self.metrics.row(numbers),
            "train/data_step": float(self.data_step + 1),
            "train/epoch": self.data.epoch_at(self.data_step + 1),
            "train/dropped": float(self.state.dropped),
            "train/captions_cut": float(self.state.captions_cut),
            "train/encode_seconds": encoding / self.world.dp_size,
            **({} if self.engine.recompiles() is None else {"train/recompiles": recompiles}),
        }

    def settle(
        self, row: dict[str, float], found: Found, limits: Limits, computed: ComputedStep
    ) -> None:
        """Average the weights of a step that was taken; record one that was skipped for what it holds."""
        verdict = judge(row["train/loss"], found.judged, found.grad_norm, limits)
        clips = int(row["train/clips"])
        if verdict.bad:
            self.objective.skip()
            record_spike(self.run, self.parts, self.state, self.spikes, verdict, computed)
            self.spikes.skip(clips)
            return
        row |= self.objective.step()
        self.ema.update(self.step)
        self.spikes.accept(row["train/loss"], found.grad_norm, self.kinds)
        self.state.samples_seen += clips

    def work(self, batch: ClipBatch, doing: str) -> Work:
        return Work(self.step + 1, doing, batch, self.data.tokens_of(batch.micro_batch.bucket))

    def timed(self, row: dict[str, float], waited: float, began: float) -> dict[str, float]:
        """The step's metrics with its times."""
        seconds = time.monotonic() - began
        self.health.stepped(seconds, self.step)
        self.totals.step(seconds, waited, productive=not self.spikes.counters.in_a_row)
        return row | {
            **self.spikes.metrics(),
            "train/samples_seen": float(self.state.samples_seen),
            "train/step_seconds": seconds,
            "train/data_wait": waited / seconds,
            **self.metrics.rates(row, seconds),
        }

    def take_captions_cut(self) -> int:
        """Captions this rank has cut since it was asked last."""
        model = self.engine.model
        return model.take_truncated() if hasattr(model, "take_truncated") else 0

    # --- what the loop calls ---

    def prepare(self) -> None:
        """Before the first step: the memory of the saves, a save on trial, and the compilation of every size."""
        with self.health.phase("save"):
            tensors = self.parts.tensors()
            self.saver.prepare(tensors)
            if self.cfg.checkpoint.rehearse and self.saved is None:
                self.saver.rehearse(tensors, self.meta().to_dict())
        if self.engine.recompiles() is not None:
            warm_up(self.run, self.parts, self.data_step)

    def do(self, name: str, action: Callable[[], None]) -> None:
        """Do what is pending under this name. It is struck off when it is done, so that a checkpoint in between still
        asks for it."""
        if name in self.state.pending:
            self.saver.let_write()
            action()
            self.state.pending = [other for other in self.state.pending if other != name]

    def log(self) -> None:
        """Hand the step's row to the callbacks and to metrics.jsonl."""
        row = self.state.row
        if self.health.report_due(self.step):
            row |= self.health.stragglers(self.step)
        for callback in self.called:
            callback(self, row)
        is_logged = self.step % self.cfg.train.log_every == 0 or "val/loss" in row
        if self.metrics_file and is_logged:
            row |= self.totals.row()
            self.metrics_file.write(self.step, row)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside the block the run is recorded; whatever ends it, it ends in order and no rank waits for another."""
        tracker = None
        try:
            print_card(self.run, self.parts, self.state, self.space, self.self_tested)
            self.called = self.callbacks()
            self.totals.start()
            if self.world.is_main:
                self.folder.record_part(self.cfg, self.step, self.world.size)
                written = self.step - ("log" in self.state.pending)
                self.metrics_file = MetricsFile(self.folder.metrics, resume_step=written)
                self.totals.start_goodput(self.step, self.started, self.metrics_file)
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
            lost = distributed.lost_peer(error)
            self.health.failed(lost or error)
            if lost:
                raise lost from error
            raise
        finally:
            with ExitStack() as ending:
                # In the reverse order; the tracker last, so that no other rank waits meanwhile.
                if tracker:
                    ending.callback(tracker.finish)
                ending.callback(self.close)
                if self.metrics_file:
                    ending.callback(self.metrics_file.close)

    def progress(self) -> Progress:
        return Progress(
            self.cfg.train.steps, "training", start=self.step, enabled=self.world.is_main
        )

    # --- checkpoints ---

    def meta(self) -> CheckpointMeta:
        """Everything of a checkpoint that is not a tensor."""
        cfg, data, spec = self.cfg, self.data, self.spec
        sources = data.sources
        return CheckpointMeta(
            train=replace(self.state, spikes=self.spikes.state()),
            task=cfg.task,
            config=cfg.model_dump(mode="json"),
            spec=spec.to_dict() if spec else None,
            objective=self.objective.facts(),
            sample_shape=asdict(sample_shape(cfg, data)),
            frame_rates=rate_range(cfg, data),
            manifest_digest=sources.digest(),
            snapshots=[asdict(snapshot) for snapshot in sources.snapshots],
            quarantine=data.loader.quarantine.lines(),
            epoch=data.epoch_at(self.data_step),
            plan=data.plan_digest(self.data_step * data.micro_batches),
            forked_from=self.resumed.forked_from if self.resumed else "",
            probe=self.probe,
            versions=checkpoints.state_versions(),
            digests={
                "vae": spec.vae_digest if spec else "",
                "text_encoder": spec.text_digest if spec else "",
                "base": self.parts.base,
                "manifest": sources.digest(),
                "config": config_digest(cfg),
            },
            code=code_version(),
            rng_key=cfg.seed,
            wandb_run_id=tracker_run_id(self.folder.path),
        )

    def save(self) -> None:
        """Save this moment, unless the newest checkpoint is of it already; `commit` waits for it."""
        state = self.state
        # The checkpoint itself is not pending for whoever goes on from it.
        state.pending = [action for action in state.pending if action != "save"]
        if self.saved == (state.step, state.pending):
            return
        # The probe computes with the averages in the place of the weights, which a save may still be copying.
        self.saver.let_write()
        with self.health.phase("probe"):
            self.probe = measure_probe(self.run, self.parts)
        with self.health.phase("save"):
            self.saver.save(state.step, self.parts.tensors(), self.meta().to_dict())
        self.saved = (state.step, state.pending)

    def commit(self) -> None:
        """Until the last save is a checkpoint. Raises Fault, on all ranks, if it cannot be."""
        with self.health.phase("save"):
            self.saver.wait()

    def go_on(self, start: resume.Start, changes: list[resume.Change]) -> None:
        """Bring everything to where a checkpoint stands, and see that it is the same there."""
        resume.load_parts(self.run, self.parts, start)
        self.restore(start.meta.train)
        if start.checkpoint.path.parent != self.folder.checkpoints:
            # A fork's first checkpoint is its own.
            self.saved = None
        resume.require_step(self.cfg, self.step)
        resume.require_same_loss(self.run, self.parts, start, changes)
        self.state.data_step, passed_over = resume.find_place(self.data, start.meta, self.data_step)
        if passed_over and self.world.is_main:
            print(passed_over, flush=True)
        excluded = resume.changed_exclusion(self.data, changes)
        resume.record_changes(self.run, self.step, [*changes, *excluded])

    def restore(self, train: TrainState) -> None:
        """Go on where a checkpoint stands, as far as no tensor tells it."""
        self.state = replace(train)
        self.saved = (train.step, train.pending)
        self.health.step = train.step
        self.spikes.load(train.spikes)
        done = rollback.later(train, self.folder, self.control)
        if done:
            rollback.apply(done, self.state, self.spikes)

    def roll_back(self) -> None:
        """Load an earlier checkpoint in place and leave out the data that led here; see resilience/rollback.py.

        Raises:
            Fault: it was done `spike_detection.max_rollbacks` times, or there is no checkpoint to go to.
        """
        self.commit()
        with self.health.phase("save"):
            target, done = rollback.decide(
                self.state, self.spikes, self.folder, self.control, self.cfg
            )
            rollback.record(done, self.folder, self.control)
            checkpoints.load(target, self.parts.tensors(), self.control)
            self.engine.weights_changed()
            self.restore(read_meta(target).train)
        # What that checkpoint still asked for was done when it was written.
        self.state.pending = []
        self.saved = (self.step, [])
        if self.metrics_file:
            self.metrics_file.go_back(done.to_step)
            self.totals.rolled_back(self.metrics_file)
        if self.world.is_main:
            print(done, flush=True)

    def measure_space(self) -> Space:
        """Room for this run's checkpoints. Raises UserError, on all ranks, where there is not enough."""
        cfg, folder, tensors = self.cfg, self.folder.checkpoints, self.parts.tensors()
        space = space_for(folder, tensors, cfg.checkpoint, self.step, cfg.train.steps)
        self.control.together(
            lambda: require_space(folder, space, cfg.checkpoint) if self.world.is_main else None
        )
        return space

    def close(self) -> None:
        with self.health.phase("closing"):
            for part in ("totals", "saver", "data", "engine"):
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


def due_actions(cfg: Config, step: int) -> list[str]:
    """What a step that was just done asks for, in order; after the last one `train` itself saves and samples."""
    steps, validation = cfg.train.steps, cfg.validation.every
    validates = validation and (step == steps or step % validation == 0)
    every = {
        "snapshot": snapshots_every(cfg),
        "save": cfg.checkpoint.every,
        "sample": cfg.sample.every,
    }
    due = [name for name, n in every.items() if n and step % n == 0 and step < steps]
    return [*(["validate"] if validates else []), "log", *due]


def detached(terms: dict[str, LossTerm]) -> Terms:
    return {name: replace(term, sum=term.sum.detach()) for name, term in terms.items()}


def headline(row: dict[str, float]) -> dict[str, float | str]:
    """The few numbers of the progress line; none before the first step."""
    if not row:
        return {}
    encoding = row.get("train/encode_seconds", 0.0) / row["train/step_seconds"]
    return {
        "loss": row["train/loss"],
        "s/step": row["train/step_seconds"],
        "tokens/s": f"{row['train/tokens_per_second']:,.0f}",
        "data wait": f"{row['train/data_wait']:.0%}",
        **({"encoding": f"{encoding:.0%}"} if encoding >= 0.01 else {}),
        **({"val": row["val/loss"]} if "val/loss" in row else {}),
    }

"""Debug mode: in the first step, every `parallel.debug_every` steps and the last, ranks compare what they are about
to do while they do it; of the steps between they keep a journal, which they compare then.

Compared are the calls of blocks, forward and backward, and the number of micro-batches, on all ranks; clips, draws
and all that the model is given, among ranks that share a clip's tokens; the weights, among replicas; frozen
networks, on all ranks. docs/debugging.md explains the messages.
"""

from collections.abc import Iterator

from torch import Tensor

from sora_train.data.sample import ClipBatch
from sora_train.models.text_to_video import TextToVideo
from sora_train.parallel.checks.agreement import Agreement, digest_of
from sora_train.parallel.checks.block_calls import BlockCalls
from sora_train.parallel.shards import local
from sora_train.runtime.health import longest_wait
from sora_train.training.components import Components
from sora_train.training.run import RunContext

MOST_CLIPS = 8
"""Clips of a micro-batch that are named."""


def start_debug(run: RunContext, parts: Components) -> "DebugMode | None":
    """None where nothing is asked for, or one rank has nobody to compare with: then not a hook is placed."""
    if run.cfg.parallel.debug_every == 0 or run.world.size == 1:
        return None
    return DebugMode(run, parts)


class DebugMode:
    """`watched` goes around the micro-batches of a step."""

    def __init__(self, run: RunContext, parts: Components):
        self.cfg, self.parts = run.cfg, parts
        self.model = parts.engine.model
        degrees, cfg = run.degrees, run.cfg
        # What an engine other than FSDP2 holds of the weights between steps is the same on every rank.
        shards = degrees.shards if cfg.parallel.engine == "fsdp" else 1
        self.agreement = Agreement(run.world, shards, longest_wait(cfg.health), degrees.place_of)
        self.calls = BlockCalls(self.model, self.agreement)
        self._frozen_are_known = False

    def due(self, step: int) -> bool:
        """Whether ranks compare live in this step (counted from 1)."""
        train, every = self.cfg.train, self.cfg.parallel.debug_every
        return not self._frozen_are_known or step % every == 0 or step == train.steps

    def watched(self, step: int, batches: list[ClipBatch]) -> Iterator[ClipBatch]:
        """The micro-batches of a step (counted from 1), one after the other.

        Raises:
            Fault: ranks differ; on all of them.
        """
        calls = self.calls
        calls.where = f"step {step}"
        calls.about = ""
        calls.watching, calls.live = True, False
        try:
            calls.at(f"{len(batches)} micro-batch(es)")
            if self.due(step):
                self._compare(batches, step)
                calls.live = True
            for number, batch in enumerate(batches):
                calls.where, calls.about = _where(step, number), self._clips(batch)
                self._note_batch(batch)
                calls.at("the micro-batch")
                yield batch
            calls.where, calls.about = f"step {step}", ""
            calls.at("the end of backward")
            if calls.live:
                self.agreement.settle()
        finally:
            calls.watching = calls.live = False

    # -- what is noted ------------------------------------------------------------------------

    def _compare(self, batches: list[ClipBatch], step: int) -> None:
        """What was done since ranks agreed last, what they hold, and what they are about to train on."""
        self._note_held()
        if self.agreement.compares("weights"):
            for name, parameter in self.model.named_parameters():
                self.agreement.note(
                    "weights", f"{name} before step {step}", digest_of(local(parameter))
                )
        if self.agreement.compares("batch"):
            for number, batch in enumerate(batches):
                self._note_contents(_where(step, number), batch)
        self.agreement.settle()

    def _note_held(self) -> None:
        """Frozen networks once, since nothing changes them; what an objective trains by itself each time."""
        objective, held = self.parts.objective, {}
        if not self._frozen_are_known:
            self._frozen_are_known = True
            held = {**objective.facts(), **frozen_weights(self.parts)}
        for name, value in {**held, **objective.tensors()}.items():
            self.agreement.note("held", name, digest_of(value))

    def _note_batch(self, batch: ClipBatch) -> None:
        entry, failed = batch.micro_batch, [failure.row for failure in batch.failures]
        description = (
            f"rows {list(entry.rows)} of epochs {list(entry.epochs)} as {entry.bucket.name}"
        )
        description += f", failed {failed}" if failed else ""
        self.agreement.note("batch", self.calls.where, description, self.calls.about)

    def _note_contents(self, where: str, batch: ClipBatch) -> None:
        """Clips as they were read, and what chance decides about them."""
        about = self._clips(batch)
        for clip in batch.clips:
            for name in ("pixels", "latents", "logvar", "text", "caption", "fps"):
                value = getattr(clip, name)
                if value is not None:
                    what = f"{digest_of(value)} for {name} of row {clip.row}"
                    self.agreement.note("batch", where, what, about)
        for clip, info in zip(batch.clips, self.parts.objective.describe(batch), strict=False):
            for name, value in vars(info).items():
                what = f"{digest_of(value)} for the draw {name} of row {clip.row}"
                self.agreement.note("batch", where, what, about)

    def _clips(self, batch: ClipBatch) -> str:
        """A micro-batch in words."""
        rows, bucket = batch.micro_batch.rows, batch.micro_batch.bucket.name
        if not rows:
            return f"no clips, as {bucket}"
        keys = [f"{row} {self.parts.data.manifest.key[row]}" for row in rows[:MOST_CLIPS]]
        more = f" and {len(rows) - MOST_CLIPS} more" if len(rows) > MOST_CLIPS else ""
        return f"rows {', '.join(keys)}{more} as {bucket}"


def _where(step: int, number: int) -> str:
    return f"micro-batch {number} of step {step}"


def frozen_weights(parts: Components) -> dict[str, Tensor]:
    """All tensors of the networks that are used and not trained, by name."""
    model, modules = parts.engine.model, {}
    if parts.vae is not model:
        modules["vae"] = parts.vae
    if isinstance(model, TextToVideo) and model.text_encoder is None:
        modules["text_encoder"] = model.frozen_encoder
    return {
        f"{prefix}.{name}": value
        for prefix, module in modules.items()
        for name, value in module.state_dict().items()
    }

"""What a checkpoint says beside its tensors: the state of training, and what the training was of.

`state.json` is one flat object. It is written here and read here, strictly: an unknown or a missing key is an error.
Checkpoints of format 1 (before `format` was written) are brought to today's names by `_from_format_1`; those of format
2 do not say which frame rates were trained, and those of format 3 not which clips were excluded: none.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sora_train.checkpoint.layout import STATE, Checkpoint
from sora_train.config.renamed import with_new_names
from sora_train.errors import UserError

FORMAT = 4
RENAMED = {"judge": "spikes", "owed": "pending", "stocks": "snapshots"}
"""Keys of format 1 and their names in format 2."""


@dataclass
class TrainState:
    """Where training stands. With the weights, their averages and the moments this is all that a step depends on."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    data_step: int = 0
    """The step of the tape that is read next: `step`, until a roll-back left data out."""
    samples_seen: int = 0
    """Clips trained on."""
    dropped: int = 0
    """Clips that failed to decode."""
    captions_cut: int = 0
    """Captions longer than `text.max_length`."""
    pending: list[str] = field(default_factory=lambda: ["sample"])
    """What the last step asked for and is not done yet, in order: `validate`, `log`, `snapshot`, `save`, `sample`."""
    row: dict[str, float] = field(default_factory=dict)
    """The metrics of the last step."""
    spikes: dict[str, Any] = field(default_factory=dict)
    """The state of the spike detector."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the checkpoint") -> "TrainState":
        """Raises UserError where keys are missing or unknown."""
        return cls(**_exactly(cls, values, where))


@dataclass(frozen=True)
class CheckpointMeta:
    """Everything of a checkpoint that is not a tensor. What has a default may be absent in imported weights only."""

    train: TrainState
    task: str
    """`text_to_video` or `vae`."""
    config: dict[str, Any]
    spec: dict[str, Any] | None
    """The diffusion spec; None for a VAE."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Frozen weights that the loss was made with, by name: `Objective.facts`."""
    sample_shape: dict[str, Any] = field(default_factory=dict)
    """Frames, height, width and fps of a usual clip."""
    frame_rates: list[float] = field(default_factory=list)
    """The lowest and the highest frame rate trained; empty for images alone, and where it is not known."""
    manifest_digest: str = ""
    snapshots: list[dict[str, Any]] = field(default_factory=list)
    """What the sources held whenever a part of the tape began."""
    quarantine: list[Any] = field(default_factory=list)
    """Lines of quarantine.jsonl."""
    epoch: float = 0.0
    """Epochs done."""
    plan: str = ""
    """Digest of the tape's current epoch."""
    forked_from: str = ""
    """RUN@STEP of `resume.run`."""
    imported_from: str = ""
    """Where weights came from that no run of this folder trained; there is no training to go on with."""
    notes: dict[str, Any] = field(default_factory=dict)
    """How weights were made that were not trained: what was averaged, by which factors."""
    probe: dict[str, Any] | None = None
    """Loss on a small fixed batch: resilience/probe.py."""
    versions: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the VAE, the text encoder, the manifest and the configuration."""
    code: dict[str, str] = field(default_factory=dict)
    """Version of the package and commit of the code."""
    rng_key: int = 0
    """The seed, which keys every draw."""
    wandb_run_id: str = ""

    @property
    def step(self) -> int:
        return self.train.step

    def to_dict(self) -> dict[str, Any]:
        """The flat object of state.json."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "train"}
        return {"format": FORMAT, **self.train.to_dict(), **own}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], where: str = "the checkpoint"
    ) -> "CheckpointMeta":
        """Read a state.json of this format or one before.

        Raises:
            UserError: the format is newer, or keys are missing or unknown; it names `where` and the keys.
        """
        version = values.get("format", 1)
        if version > FORMAT:
            raise UserError(
                f"{where} has format {version}, and this version of sora_train reads up to {FORMAT}; update sora_train"
            )
        known = {key: value for key, value in values.items() if key != "format"}
        if "config" in known:
            known["config"] = with_new_names(known["config"])
        if version == 1:
            known = _from_format_1(known)
        if version < 3:
            known.setdefault("frame_rates", [])
        names = {one.name for one in fields(TrainState)}
        train = TrainState.from_dict(
            {key: value for key, value in known.items() if key in names}, where
        )
        rest = {key: value for key, value in known.items() if key not in names}
        return cls(**_exactly(cls, {"train": train, **rest}, where))


def read_meta(checkpoint: Checkpoint) -> CheckpointMeta:
    """The facts of a checkpoint. Raises UserError where its state.json has other keys or a newer format."""
    return CheckpointMeta.from_dict(checkpoint.state(), str(checkpoint.path / STATE))


def _exactly(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values, if their keys are the fields of `cls`."""
    names = {one.name for one in fields(cls)}
    missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
    if missing or unknown:
        parts = [
            f"holds no {', '.join(missing)}" if missing else "",
            f"holds {', '.join(unknown)}, which this version does not know" if unknown else "",
        ]
        raise UserError(
            f"{where} {' and '.join(filter(None, parts))}, so a run cannot go on from it exactly; start another "
            "run.dir with its weights: init.run and init.weights"
        )
    return dict(values)


def _from_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """The same under today's names. Imported and averaged weights had fewer keys; the others get their defaults."""
    known = {RENAMED.get(key, key): value for key, value in values.items()}
    actions = {"validation": "validate", "row": "log", "samples": "sample"}
    if "pending" in known:
        known["pending"] = [actions.get(action, action) for action in known["pending"]]
    names = {one.name for kind in (TrainState, CheckpointMeta) for one in fields(kind)}
    if known.get("imported_from"):
        notes = {key: known.pop(key) for key in set(known) - names}
        train = TrainState(step=known["step"], pending=[])
        blank = CheckpointMeta(train, known["task"], known["config"], known["spec"]).to_dict()
        del blank["format"]
        return {**blank, **known, "notes": notes}
    # Facts for people, which the first checkpoints of format 1 lacked.
    for key in ("objective", "digests", "code", "versions", "sample_shape"):
        known.setdefault(key, {})
    known.setdefault("rng_key", known.get("config", {}).get("seed", 0))
    known.setdefault("wandb_run_id", "")
    return {"imported_from": "", "notes": {}, **known}

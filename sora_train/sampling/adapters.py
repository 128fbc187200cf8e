"""Adapters beside a model: opened from a file or a run, held against their base, and merged into its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from pathlib import Path

import torch
from torch import Tensor

from sora_train import checkpoint as checkpoints
from sora_train.base.code_version import code_version
from sora_train.checkpoint.layout import split_step, weights_digest
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.config import AdapterConfig, Config
from sora_train.errors import UserError
from sora_train.models.adapters.factors import AdapterFacts, AdapterWeights
from sora_train.models.adapters.files.reading import adapter_of_tensors, read_adapter
from sora_train.models.finite_weights import require_finite

PART = "transformer."
"""What the names of the adapted parameters begin with in a model."""
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and peft call the file in a folder that they write."""
KINDS = {"live": "as trained", "ema": "averaged"}


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter, where it came from, and how much of it is wanted."""

    source: str
    weights: AdapterWeights
    strength: float = 1.0


class Base:
    """The whole weights that adapters are merged into.

    Attributes:
        weights: which of them, `ema`, `live` or another average.
        prefix: what their names begin with in `stored`.
    """

    def __init__(self, checkpoint: checkpoints.Checkpoint, weights: str):
        """Raises UserError where there is no such average."""
        self.checkpoint, self.weights = checkpoint, weights
        self.stored = StoredTensors(checkpoint)
        self.prefix = self.stored.prefix(weights)

    def __str__(self) -> str:
        return str(self.checkpoint.path.parent.parent)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the model's parameters."""
        names = self.stored.names(self.prefix)
        return {name: self.stored.shapes[f"{self.prefix}{name}"] for name in names}

    def read(self, name: str) -> Tensor:
        """A parameter of the model, as it is stored."""
        whole = f"{self.prefix}{name}"
        return self.stored.read(whole)[whole]


@dataclass
class AdaptedBase:
    """A base and the adapters that are merged into it."""

    base: Base
    adapters: list[NamedAdapter]
    notes: list[str]
    """What is to be said about how they fit, in lines."""

    def merged(self, name: str, value: Tensor) -> Tensor:
        """The model's parameter `name` with all adapters, in at least float32, `value` where none changes it: what
        each makes of the base by itself is added up."""
        total = value
        for adapter in self.adapters:
            alone = adapter.weights.adapted(name.removeprefix(PART), value, adapter.strength)
            if alone is not value:
                total = alone if total is value else total + (alone - value.to(alone.dtype))
        return total

    @torch.no_grad()
    def merge_into(self, parameters: Mapping[str, Tensor]) -> None:
        """Merge into the model's parameters, which hold the base's values."""
        for name in self.changed:
            parameters[name].copy_(self.merged(name, parameters[name]))

    @torch.no_grad()
    def set_strengths(self, parameters: Mapping[str, Tensor], strengths: Sequence[float]) -> None:
        """Merge at other strengths; the base's values of what the adapters change are read again."""
        self.adapters = [
            replace(adapter, strength=strength)
            for adapter, strength in zip(self.adapters, strengths, strict=True)
        ]
        for name in self.changed:
            # Not by way of the parameter, which may be too narrow to hold the base's value.
            value = self.base.read(name).to(parameters[name].device)
            parameters[name].copy_(self.merged(name, value))

    @property
    def changed(self) -> list[str]:
        """The model's parameters that any of the adapters changes."""
        names = [PART + name for adapter in self.adapters for name in adapter.weights.shapes]
        return list(dict.fromkeys(names))


def adapted_base(
    cfg: Config,
    checkpoint: checkpoints.Checkpoint,
    weights: str,
    adapters: Sequence[str | Path | NamedAdapter],
    *,
    base: str = "",
    any_base: bool = False,
) -> AdaptedBase:
    """What a run's model is made of: its weights, or its base and its adapter, and the adapters given.

    Args:
        weights: `ema`, `live` or another average, of the run and of adapters' runs.
        base: FOLDER or FOLDER@STEP of an adapter's base, if it is no longer where `init.run` says.
        any_base: take an adapter of another base too, and leave out what the model lacks.

    Raises:
        UserError: the base is gone, or an adapter cannot be read or does not fit.
    """
    run = str(checkpoint.path.parent.parent)
    whole = _base_of(cfg, run, checkpoint, weights, base)
    own = [NamedAdapter(run, adapter_of(checkpoint, weights))] if cfg.adapter.on else []
    opened = [
        one if isinstance(one, NamedAdapter) else open_adapter(str(one), weights)
        for one in adapters
    ]
    fitted, notes, shapes = [], list[str](), whole.shapes
    for adapter in [*own, *opened]:
        notes += _same_base(adapter, whole, any_base=any_base)
        kept, said = _same_modules(adapter, shapes, any_base=any_base)
        fitted.append(kept)
        notes += said
    return AdaptedBase(whole, fitted, notes)


# -- opened ---------------------------------------------------------------------------------------


def open_adapter(text: str, weights: str = "ema") -> NamedAdapter:
    """The adapter of FILE, RUN or RUN@STEP, with `:WEIGHT` behind it or 1.

    Args:
        weights: of a run: `ema`, `live` or another average.

    Raises:
        UserError: it is none, cannot be read, or the weight is no number.
    """
    place, strength = _place_and_strength(text)
    path = Path(place)
    inside = [path / name for name in FILES if (path / name).is_file()]
    if inside:
        path = inside[0]
    folder, step = (path, None) if path.is_file() else split_step(place)
    if path.is_file() or (path.suffix and not folder.is_dir()):
        return NamedAdapter(place, read_adapter(path), strength)
    return NamedAdapter(place, adapter_of(checkpoints.find(folder, step), weights), strength)


def _place_and_strength(text: str) -> tuple[str, float]:
    place, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = float("nan")
    if not (place and isfinite(strength)):
        raise UserError(
            f"'{text}' is no file, and what stands after the last : must be a weight, for example {place or 'FILE'}:0.8"
        )
    return place, strength


def adapter_of(checkpoint: checkpoints.Checkpoint, weights: str = "ema") -> AdapterWeights:
    """The adapter that a run has trained, as of a checkpoint.

    Raises:
        UserError: the run trained a whole model, has no such average, or a weight is not finite.
    """
    state = checkpoint.state()
    cfg = AdapterConfig.model_validate(state["config"].get("adapter", {}))
    where = str(checkpoint.path)
    if not cfg.on:
        raise UserError(
            f"{where} is of a run that trained a whole model, no adapter; give the run of one, or its file"
        )
    checkpoints.verify(checkpoint)
    stored = StoredTensors(checkpoint)
    prefix = stored.prefix(weights)
    names = [f"{prefix}{name}" for name in stored.names(prefix)]
    tensors = {key.removeprefix(prefix): value for key, value in stored.read(*names).items()}
    require_finite(tensors.items(), where, "take an older checkpoint, RUN@STEP")
    alpha = cfg.alpha or float(cfg.rank)
    base = str(state["config"]["init"]["run"])
    about = AdapterFacts(
        rank=cfg.rank,
        alpha=alpha,
        rslora=cfg.rslora,
        base_digest=state.get("digests", {}).get("base", ""),
        base=split_step(base)[0].name,
        trigger=cfg.trigger,
        steps=checkpoint.step,
        version=code_version()["package"],
    )
    config = {"lora_alpha": alpha, "use_rslora": cfg.rslora}
    return adapter_of_tensors(where, tensors, config, about)


# -- held against the base ------------------------------------------------------------------------


def _base_of(
    cfg: Config, run: str, checkpoint: checkpoints.Checkpoint, weights: str, where: str
) -> Base:
    """The whole weights of a run: its own, or of an adapter's run those of its base."""
    if not cfg.adapter.on:
        if where:
            raise UserError(
                f"--base {where} is for an adapter's run, and {run} trained a whole model; leave it out"
            )
        return Base(checkpoint, weights)
    folder, step = split_step(where or cfg.init.run)
    if not checkpoints.list_checkpoints(folder / "checkpoints"):
        named = f"--base {where}" if where else f"init.run={cfg.init.run}"
        raise UserError(
            f"{run} trained an adapter, and {named} holds no complete checkpoint of its base; say where the base is "
            "now with --base FOLDER, or FOLDER@STEP"
        )
    return Base(checkpoints.find(folder, step), cfg.init.weights)


def _same_base(adapter: NamedAdapter, base: Base, *, any_base: bool) -> list[str]:
    """Notes where that the bases are the same is not known, or not so."""
    about = adapter.weights.about
    if not about.base_digest:
        return [
            f"{adapter.source} does not say which base it was trained on; its shapes fit {base}"
        ]
    digests = {kind: weights_digest(base.checkpoint, kind) for kind in KINDS}
    if about.base_digest == digests.get(base.weights):
        return []
    other = [kind for kind, digest in digests.items() if digest == about.base_digest]
    if other:
        return [
            f"{adapter.source} was trained on the weights of {base} {KINDS[other[0]]}, not on {base.weights}"
        ]
    what = (
        f"{adapter.source} was trained on another base, {about.base or 'without a name'} (digest "
        f"{about.base_digest[:12]}), than {base.checkpoint.path} (digest {digests.get(base.weights, '')[:12]})"
    )
    if not any_base:
        raise UserError(f"{what}; give its own base, or --any-base to use it all the same")
    return [what]


def _same_modules(
    adapter: NamedAdapter, shapes: Mapping[str, Sequence[int]], *, any_base: bool
) -> tuple[NamedAdapter, list[str]]:
    """The adapter without what the model lacks, which is noted."""
    changed = adapter.weights.shapes
    lacking = [name for name in changed if PART + name not in shapes]
    if len(lacking) == len(changed) or (lacking and not any_base):
        remedy = (
            "give an adapter of this model"
            if len(lacking) == len(changed)
            else ("give an adapter of this model, or --any-base to leave out what it lacks")
        )
        raise UserError(
            f"{adapter.source} changes {lacking[0]}, which the model lacks ({len(lacking)} of {len(changed)} weights); "
            f"{remedy}"
        )
    for name in changed.keys() - set(lacking):
        held = tuple(shapes[PART + name])
        if changed[name] not in (held, (held[0], prod(held[1:]))):
            raise UserError(
                f"{adapter.source} changes {name} of shape {list(changed[name])}, and the model's has "
                f"{list(held)}; give an adapter of a model of this size"
            )
    if not lacking:
        return adapter, []
    weights = adapter.weights.without(lacking)
    note = f"{adapter.source}: left out {len(lacking)} weights that the model lacks, {lacking[0]} first"
    return NamedAdapter(adapter.source, weights, adapter.strength), [note]

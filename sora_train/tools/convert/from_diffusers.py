"""A diffusers folder of Wan's layout as a run folder: `sora ckpt import`.

Nothing is renamed, since parameter names are diffusers' own. Every name and shape has to be met, on both
sides. A weight is in memory while it is written, and one file is open at a time.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sora_train import checkpoint as checkpoints
from sora_train.base.files import folder_when_whole, write_atomically
from sora_train.base.progress import Progress
from sora_train.checkpoint.meta import CheckpointMeta, TrainState
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.errors import UserError
from sora_train.models.finite_weights import require_finite
from sora_train.models.image_encoder import ENCODER, ImageEncoder, read_sizes, tokens_of
from sora_train.models.text.published import build_text_encoder
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.transformer.wan_layout import model_values
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives.spec import spec_of
from sora_train.sampling.pipeline import ClipShape
from sora_train.tools.convert.experts import Experts, experts_of
from sora_train.tools.convert.stored_weights import StoredWeights

Shapes = dict[str, tuple[int, ...]]
WAN_2_1_CLIP = ClipShape(81, 480, 832, 16.0)
WAN_720P_CLIP = ClipShape(81, 720, 1280, 16.0)
WAN_2_2_TI2V_CLIP = ClipShape(121, 704, 1280, 24.0)
"""What the models were trained on, by their cards (Wan 2.2: wan/configs/wan_ti2v_5B.py)."""
SHIFT_OF_720P = 5.0
SHOWN = 10
# Of a scheduler: its class -> solver, grid, rounding and the name of its shift.
SCHEDULERS = {
    "UniPCMultistepScheduler": ("unipc", "unipc", "truncate", "flow_shift"),
    "FlowMatchEulerDiscreteScheduler": ("euler", "flow_match_euler", "none", "shift"),
}


def import_pipeline(
    source: Path,
    out: Path,
    shape: ClipShape,
    *,
    base: Path | None = None,
    mask_channel: bool = False,
    fps_embed: bool = False,
    expert: str = "",
    boundary: float | None = None,
) -> str:
    """Write the run folder `out` with a checkpoint of step 0; returns the report, in lines.

    `shape` is what is sampled where no size is asked for. `base` is the pipeline that VAE, text encoder and
    scheduler come from when `source` is a transformer alone. `mask_channel` and `fps_embed` add the extras,
    at zero, so that the model still computes what it did. `expert` and `boundary` are those of `experts_of`. Raises
    UserError where the folder is not such
    a pipeline, something is missing from it, or `out` is not empty.
    """
    transformer, source = _transformer_and_rest(source, base)
    index = _json(source / "model_index.json")
    experts = experts_of(
        source, index, alone=transformer if base else None, expert=expert, boundary=boundary
    )
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder or empty it")
    extras = {"mask_channel": mask_channel, "fps_embed": fps_embed}
    cfg = _config(experts, source, out, extras)
    parts, report = {}, list[str]()
    for name, folder in experts.folders.items():
        stored = StoredWeights(folder)
        shapes, said = _check(folder, stored, cfg)
        _require_numbers(folder, stored)
        parts[name] = (stored, shapes)
        report += said
    vae = VideoVAE.from_config(cfg.vae)
    _require_channels(experts.first, source, cfg, vae)
    images = ImageEncoder(cfg.image, cfg.model).digest() if cfg.model.image_dim else ""
    spec = spec_of(cfg, vae, build_text_encoder(cfg.text).digest(), images)
    with folder_when_whole(out) as partial:
        values = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
        write_atomically(partial / "config.yaml", values)
        meta = CheckpointMeta(
            TrainState(pending=[]),
            cfg.task,
            cfg.model_dump(mode="json"),
            spec.to_dict(),
            sample_shape=asdict(shape),
            versions=checkpoints.state_versions(),
            imported_from=str(transformer if base else source),
        )
        _save(partial / "checkpoints", parts, meta.to_dict())
    return "\n".join(
        [
            *report,
            f"wrote {out}",
            *_next(cfg, out),
        ]
    )


def _next(cfg: Config, out: Path) -> list[str]:
    """What can be done with the run, in a line; one of two experts is for training."""
    own = cfg.model.expert
    if own in ("high", "low"):
        return [f"next: sora train ... model.expert={own} init.run={shlex.quote(str(out))}"]
    return [f'next: sora sample --ckpt {shlex.quote(str(out))} --prompt "..."']


def usual_clip(source: Path, base: Path | None) -> ClipShape:
    """The clip that a pipeline is for, where nobody says: that of Wan 2.2's TI2V, or of Wan 2.1, whose image-to-video
    models for 480p and 720p differ by the shift of their schedulers alone, or of Wan 2.2's two experts."""
    transformer, rest = _transformer_and_rest(source, base)
    index = _json(rest / "model_index.json")
    if index.get("expand_timesteps"):
        return WAN_2_2_TI2V_CLIP
    if index.get("boundary_ratio") is not None:
        return WAN_720P_CLIP
    if not _json(transformer / "config.json").get("image_dim"):
        return WAN_2_1_CLIP
    shift = _json(rest / "scheduler" / "scheduler_config.json").get("flow_shift") or 0.0
    return WAN_720P_CLIP if shift >= SHIFT_OF_720P else WAN_2_1_CLIP


def _require_channels(transformer: Path, source: Path, cfg: Config, vae: VideoVAE) -> None:
    """Raises UserError where the transformer takes or makes other channels than the VAE's latents have."""
    model, concat = cfg.model, cfg.objective.cond_mode == "concat"
    taken = 2 * vae.channels + vae.temporal_factor if concat else vae.channels
    if (model.velocity_channels, model.in_channels) != (vae.channels, taken):
        raise UserError(
            f"{transformer} takes {model.in_channels} channels and makes {model.velocity_channels}, but the latents of "
            f"{source}/vae have {vae.channels}; what can be imported makes {vae.channels} and takes as many, or "
            f"{2 * vae.channels + vae.temporal_factor} with given frames and their mask"
        )


def _transformer_and_rest(source: Path, base: Path | None) -> tuple[Path, Path]:
    """The folder of the transformer, and that of the pipeline which has all else."""
    if base is None and source.name == "transformer":
        above = source.absolute().parent
        source = above if (above / "model_index.json").is_file() else source
    whole = (source / "model_index.json").is_file()
    places = [source, source / "transformer"]
    alone = [place for place in places if (place / "config.json").is_file() and not whole]
    if not (whole or alone):
        raise UserError(
            f"{source} holds no model_index.json and no config.json; give a pipeline's folder in the diffusers layout "
            "(transformer, vae, text_encoder, tokenizer, scheduler), or a transformer's and the pipeline of its VAE "
            "and text encoder as --base"
        )
    if alone and base is None:
        raise UserError(
            f"{source} is a transformer alone; name the pipeline whose VAE, text encoder, tokenizer and scheduler go "
            "with it, such as --base Wan2.1-T2V-1.3B-Diffusers"
        )
    if base is None:
        return source / "transformer", source
    if whole:
        raise UserError(
            f"--base {base} is for a transformer alone, and {source} is a whole pipeline; leave it out, or give "
            f"{source}/transformer"
        )
    if not (base / "model_index.json").is_file():
        raise UserError(
            f"--base {base} holds no model_index.json; give a pipeline's folder in the diffusers layout"
        )
    return alone[0], base


def _config(experts: Experts, source: Path, out: Path, extras: Mapping[str, bool]) -> Config:
    """The config of a run that has this model, and the pipeline's VAE, text encoder and scheduler."""
    described = [
        model_values(_json(folder / "config.json"), f"{folder}/config.json")
        for folder in experts.folders.values()
    ]
    model = described[0]
    if described[-1] != model:
        raise UserError(
            f"the two transformers of {source} have different sizes; what can be imported are two of the same"
        )
    if "image_dim" in model and not model.get("image_pair"):
        model["image_tokens"] = tokens_of(read_sizes(source / ENCODER))
    text = _json(source / "text_encoder" / "config.json")
    if text.get("model_type") != "umt5":
        raise UserError(
            f"{source}/text_encoder is a {text.get('model_type')}; what can be imported is a umt5, as Wan's"
        )
    pipeline = _json(source / "model_index.json")
    scheduler = _json(source / "scheduler" / "scheduler_config.json")
    name = scheduler.get("_class_name")
    if name not in SCHEDULERS:
        raise UserError(
            f"{source}/scheduler is a {name}; what can be imported is {' or '.join(SCHEDULERS)}"
        )
    solver, grid, rounding, shift = SCHEDULERS[name]
    tokenizer = _json(source / "tokenizer" / "tokenizer_config.json")
    longest = int(min(tokenizer.get("model_max_length", 512), 512)) // 16 * 16
    values = {
        **{f"model.{key}": value for key, value in {**model, **extras}.items()},
        "vae.path": str((source / "vae").absolute()),
        "vae.arch": {},
        "text.kind": "umt5",
        "text.path": str(source.absolute()),
        "text.d_model": text["d_model"],
        "text.trainable": False,
        "text.padding": "wan",
        "text.max_length": longest,
        "objective.solver": solver,
        "objective.time_grid": grid,
        "objective.time_rounding": rounding,
        "objective.shift": float(scheduler.get(shift) or 1.0),
        "objective.shift_rule": "constant",
        "objective.num_steps": 50,
        "objective.guidance_scale": 5.0,
        **_conditioning(model, expand_timesteps=bool(pipeline.get("expand_timesteps"))),
        "image.path": str(source.absolute()) if "image_dim" in model else "",
        **experts.values,
        "name": out.name,
        "run.dir": str(out),
    }
    return compose([f"{key}={json.dumps(value)}" for key, value in values.items()]).config


def _conditioning(model: Mapping[str, Any], *, expand_timesteps: bool) -> dict[str, Any]:
    """Which given frames a pipeline is trained on, and how they reach the model."""
    concat = bool(model["out_channels"]) and model["out_channels"] < model["in_channels"]
    # Wan 2.2's TI2V is trained on both; half each, as the shares are not published.
    share = 1.0 if concat else 0.5 if expand_timesteps else 0.0
    kinds = {"i2v": 0.0, "i2v_both": 0.0, "i2v_both" if model.get("image_pair") else "i2v": share}
    return {
        "objective.cond_mode": "concat" if concat else "replace",
        **{f"objective.conditioning.{kind}": value for kind, value in kinds.items()},
    }


def _json(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing; give a whole pipeline's folder in the diffusers layout"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}; copy the folder again") from error
    return values


def _check(folder: Path, stored: StoredWeights, cfg: Config) -> tuple[Shapes, list[str]]:
    """Every weight of the transformer in the order of the files, added ones last, and the report.

    Raises UserError where names or shapes differ."""
    with torch.device("meta"):
        model = VideoDiT(cfg.model)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    extras = [name for name in ("mask_proj.weight", "fps_proj.weight") if name in expected]
    added = [name for name in extras if name not in stored.shapes]
    shapes = {**stored.shapes, **{name: expected[name] for name in added}}
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    differ = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = [
        *(f"{name} is missing" for name in missing),
        *(f"{name} is unexpected" for name in unexpected),
        *differ,
    ]
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(
            f"{folder} holds the weights of another architecture than its config.json: "
            f"{'; '.join(faults[:SHOWN])}{more}"
        )
    report = [f"matched {len(expected) - len(added)} weights, missing 0, unexpected 0"]
    report += [f"added {name} at zero" for name in added]
    return shapes, report


def _require_numbers(folder: Path, stored: StoredWeights) -> None:
    """Raises UserError where a weight holds NaN or an infinity; one of them is in memory at a time."""
    with Progress(len(stored.shapes), "checking the transformer's weights") as progress:
        for done, name in enumerate(stored.shapes, 1):
            require_finite(
                [(name, stored.read(name))], str(stored.files[name]), f"copy {folder} again"
            )
            progress.update(done)


def _save(
    folder: Path, parts: Mapping[str, tuple[StoredWeights, Shapes]], state: dict[str, Any]
) -> None:
    """The checkpoint of step 0; each weight is read when it is written, added ones are zero."""

    def read(key: str) -> Tensor:
        _, part, name = key.split(".", 2)
        stored, shapes = parts[part]
        return stored.read(name) if name in stored.shapes else torch.zeros(shapes[name])

    named = {
        f"{kind}.{part}.{name}": shape
        for kind in ("model", "ema")
        for part, (_, shapes) in parts.items()
        for name, shape in shapes.items()
    }
    try:
        checkpoints.save_streamed(folder, 0, named, read, state)
    finally:
        for stored, _ in parts.values():
            stored.close()

"""A run as a pipeline's folder that diffusers' WanPipeline, or WanImageToVideoPipeline, runs: `sora ckpt export`.

Parameter names are diffusers' own, so weights are copied, shard by shard; no more than one is in
memory. What the pipeline has no place for is left out where that changes nothing, folded in where that
is exact, and otherwise refused by name.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sora_train import checkpoint as checkpoints
from sora_train.base.files import folder_when_whole
from sora_train.base.progress import Progress
from sora_train.checkpoint.layout import split_step
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.errors import Fault, UserError
from sora_train.models.finite_weights import require_finite
from sora_train.models.image_encoder import ENCODER, PROCESSOR, ImageEncoder
from sora_train.models.text.published import build_text_encoder
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.transformer.layers import sinusoid
from sora_train.models.transformer.wan_layout import CLASS_NAME, wan_arguments
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.published import WAN
from sora_train.sampling.api import CheckpointInfo, checkpoint_info
from sora_train.sampling.experts import require_both, require_pair
from sora_train.tools.convert.experts import HIGH, LOW
from sora_train.tools.convert.model_card import departures, model_card

WEIGHTS = "diffusion_pytorch_model"
EXTRAS = ("mask_proj.weight", "fps_proj.weight")
TIME_BIAS = "condition_embedder.time_embedder.linear_2.bias"
EXPANDED_PATCH = (1, 2, 2)
"""The patches of diffusers' `expand_timesteps`, which takes every second row and column of the noise levels."""
MAX_SHARD_BYTES = 5_000_000_000


def export_pipeline(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    weights: str = "ema",
    fps: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    other: str = "",
) -> str:
    """Write the pipeline's folder and return what was done, in lines.

    `fps` is folded into the weights of a model that is told the frame rate. `other` is the run, or RUN@STEP, of the
    other expert where this one holds one of two. Raises UserError where the run cannot be such a pipeline, `out` is
    not empty, or the run is none.
    """
    info = checkpoint_info(run, step)
    _require(info, fps)
    parts = _transformers(info, run, other)
    for part, _ in parts.values():
        StoredTensors(part.checkpoint).prefix(weights)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder or empty it")
    vae = _vae(info, run)
    for part, _ in parts.values():
        checkpoints.verify(part.checkpoint)
    with folder_when_whole(out) as partial:
        notes: list[str] = []
        for name, (part, held) in parts.items():
            notes += _write_transformer(part, held, weights, fps, partial / name, max_shard_bytes)
        images = _takes_images(info, weights)
        notes += _about_images(info, images)
        vae.save(partial / "vae")
        _write_text_encoder(info, weights, partial)
        _write_image_encoder(info, partial)
        scheduler = _write_scheduler(info, vae, partial / "scheduler")
        differences, name = departures(info, scheduler), _pipeline_class(info)
        _write_index(name, info, scheduler, partial, expand_timesteps=images)
        card = model_card(info, run, weights, fps, scheduler, differences, name)
        (partial / "README.md").write_text(card)
    done = [f"wrote {out}", f"next: {name}.from_pretrained({str(out)!r})"]
    return "\n".join([*notes, *differences, *done])


def _pipeline_class(info: CheckpointInfo) -> str:
    """The pipeline of diffusers that samples from the folder: with condition channels a clip has a first image."""
    return "WanImageToVideoPipeline" if info.spec.cond_mode == "concat" else "WanPipeline"


def _transformers(
    info: CheckpointInfo, run: Path, other: str
) -> dict[str, tuple[CheckpointInfo, str]]:
    """Name of each of the pipeline's transformers -> the checkpoint that holds it, and its name there."""
    require_both(info.spec, str(run), other)
    if other:
        second = checkpoint_info(*split_step(other))
        require_pair(info, second)
        high, low = (info, second) if info.spec.expert == "high" else (second, info)
        return {HIGH: (high, HIGH), LOW: (low, HIGH)}
    names = (HIGH, LOW) if info.spec.expert == "both" else (HIGH,)
    return {name: (info, name) for name in names}


def _require(info: CheckpointInfo, fps: float | None) -> None:
    cfg, spec = info.cfg, info.spec
    if spec.text_padding != "wan":
        raise UserError(
            "text.padding=masked cannot be exported, because WanPipeline attends to the padding; train with "
            "text.padding=wan"
        )
    if cfg.text.kind not in ("umt5_bytes", "umt5"):
        raise UserError(
            f"text.kind={cfg.text.kind} cannot be exported, because WanPipeline reads captions with a UMT5EncoderModel"
        )
    if cfg.model.fps_embed and fps is None:
        raise UserError(
            "this model is told the frame rate (fps_proj), which WanPipeline does not do; give the one to fold into "
            f"the weights, such as --fps {info.shape.fps:g}"
        )
    if not cfg.model.fps_embed and fps is not None:
        raise UserError(
            f"--fps {fps:g} has no effect: this model is not told the frame rate; leave it out"
        )
    if not cfg.model.qk_norm:
        raise UserError("model.qk_norm=false cannot be exported: diffusers' class always has it")
    if spec.cond_mode == "concat":
        _require_images(info)
    elif spec.conditioning and not dict(spec.conditioning).get("t2v"):
        kinds = ", ".join(kind for kind, share in spec.conditioning if share)
        through = " through mask_proj" if cfg.model.mask_channel else ""
        raise UserError(
            f"objective.conditioning has trained no text to video, which is all that WanPipeline does, but {kinds}"
            f"{through}; sample with `sora sample --op`, or train on with shares of less than 1 in sum and export that"
        )


def _require_images(info: CheckpointInfo) -> None:
    """Raises UserError where a model of condition channels was not trained on the frames that its pipeline gives it."""
    needed = ("i2v_both",) if info.cfg.model.image_pair else ("i2v", "i2v_both")
    kinds = [kind for kind, share in info.spec.conditioning if share]
    if not set(needed) & set(kinds):
        raise UserError(
            f"objective.conditioning has trained {', '.join(kinds)} and not {needed[0]}, which is what "
            "WanImageToVideoPipeline does; sample with `sora sample --op`, or train on with a share of it"
        )


def _vae(info: CheckpointInfo, run: Path) -> VideoVAE:
    """The run's VAE. Raises UserError when it is another than in training, or not the pipeline's."""
    path = info.cfg.vae.path
    vae = VideoVAE.from_config(info.cfg.vae)
    if vae.digest() != info.spec.vae_digest:
        raise UserError(
            f"vae.path={path!r} no longer holds the VAE that {run} was trained with; restore it"
        )
    if vae.kind.class_name != WAN:
        raise UserError(
            f"vae.path={path!r} is an {vae.kind.class_name}, and WanPipeline decodes with {WAN}; such a run cannot "
            "be exported: sample with `sora sample`, or train one with a VAE of that class"
        )
    return vae


# -- transformer ----------------------------------------------------------------------------------


def _write_transformer(
    info: CheckpointInfo,
    held: str,
    weights: str,
    fps: float | None,
    folder: Path,
    max_shard_bytes: int,
) -> list[str]:
    """config.json, the shards and their index of the transformer `held`; returns what became of the extras."""
    stored = StoredTensors(info.checkpoint)
    prefix = f"{stored.prefix(weights)}{held}."
    shapes = {name: torch.Size(stored.shapes[f"{prefix}{name}"]) for name in stored.names(prefix)}
    kept = {name: shape for name, shape in shapes.items() if name not in EXTRAS}
    _require_same(kept, _expected(info))
    folder.mkdir()
    arguments = {"_class_name": CLASS_NAME, **wan_arguments(info.cfg.model)}
    (folder / "config.json").write_text(json.dumps(arguments, indent=2) + "\n")
    shards = _shards(kept, max_shard_bytes)
    index: dict[str, str] = {}
    with Progress(len(kept), f"writing the {folder.name}") as progress:
        for number, names in enumerate(shards, start=1):
            tensors = _read(stored, prefix, names)
            if fps is not None and TIME_BIAS in tensors:
                extra = _read(stored, prefix, ["fps_proj.weight"])
                tensors[TIME_BIAS] += fps_offset(extra["fps_proj.weight"], fps)
            file = (
                f"{WEIGHTS}.safetensors"
                if len(shards) == 1
                else f"{WEIGHTS}-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)
            index |= dict.fromkeys(names, file)
            progress.update(len(index))
    if len(shards) > 1:
        total = sum(4 * math.prod(shape) for shape in kept.values())
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n"
        )
    notes = [f"{folder.name}: {len(kept)} weights in {len(shards)} file(s)"]
    if "mask_proj.weight" in shapes:
        notes.append("left out mask_proj: text to video gives no frame, so it adds zero")
    if fps is not None:
        notes.append(f"folded fps_proj at {fps:g} frames a second into {TIME_BIAS}")
    return notes


def _takes_images(info: CheckpointInfo, weights: str) -> bool:
    """Whether the model makes a video of an image as Wan 2.2's TI2V does, whose pipeline has `expand_timesteps`: the
    image's tokens are told noise level 0, and nothing else tells of it."""
    cfg, stored = info.cfg.model, StoredTensors(info.checkpoint)
    if info.spec.cond_mode == "concat":
        return False
    if not dict(info.spec.conditioning).get("i2v") or tuple(cfg.patch_size) != EXPANDED_PATCH:
        return False
    if not cfg.mask_channel:
        return True
    name = f"{stored.prefix(weights)}transformer.mask_proj.weight"
    return not bool(stored.read(name)[name].any())


def _about_images(info: CheckpointInfo, images: bool) -> list[str]:
    """Which kinds of conditioning the pipeline has, and which it lacks."""
    kinds = [kind for kind, share in info.spec.conditioning if kind != "t2v" and share]
    notes = []
    if info.spec.cond_mode == "concat":
        given = ("i2v", "i2v_both")
        kinds = [kind for kind in kinds if kind not in given]
        notes.append("WanImageToVideoPipeline makes videos of images from the folder")
    if images:
        kinds.remove("i2v")
        notes.append(
            "expand_timesteps: WanImageToVideoPipeline makes videos of images from the same folder"
        )
    if kinds:
        notes.append(
            f"{_pipeline_class(info)} does no other kind; {', '.join(kinds)} stay with `sora sample --op`"
        )
    return notes


def fps_offset(fps_proj: Tensor, fps: float) -> Tensor:
    """What `fps_proj` adds to the time embedding at a rate: the same at every noise level, as a bias is."""
    code = sinusoid(torch.tensor([fps], dtype=torch.float32), fps_proj.shape[1])
    return (code @ fps_proj.T)[0]


def _expected(info: CheckpointInfo) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = VideoDiT(info.cfg.model)
    return {name: value.shape for name, value in model.state_dict().items() if name not in EXTRAS}


def _require_same(stored: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    differ = [
        name
        for name in sorted(stored.keys() | expected.keys())
        if stored.get(name) != expected.get(name)
    ]
    if differ:
        raise UserError(
            f"the checkpoint's transformer is not the one of its config: {', '.join(differ[:10])}; a model of your "
            "own cannot be exported"
        )


def _shards(shapes: Mapping[str, torch.Size], most: int) -> list[list[str]]:
    """Names in order, cut where a file of float32 would exceed `most` bytes."""
    shards: list[list[str]] = [[]]
    room = most
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if shards[-1] and size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def _read(stored: StoredTensors, prefix: str, names: list[str]) -> dict[str, Tensor]:
    tensors = stored.read(*(f"{prefix}{name}" for name in names))
    require_finite(
        tensors.items(),
        str(stored.checkpoint.path),
        "export an older checkpoint, RUN@STEP, or other weights, --live or --ema TAG",
    )
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


# -- what stands beside it ------------------------------------------------------------------------


def _write_text_encoder(info: CheckpointInfo, weights: str, folder: Path) -> None:
    encoder = build_text_encoder(info.cfg.text)
    encoder.init_weights(info.cfg.seed)
    if info.cfg.text.trainable:
        stored = StoredTensors(info.checkpoint)
        prefix = stored.prefix(weights) + "text_encoder."
        names = [name for name, _ in encoder.named_parameters()]
        with torch.no_grad():
            for name, value in _read(stored, prefix, names).items():
                encoder.get_parameter(name).copy_(value)
    elif encoder.digest() != info.spec.text_digest:
        raise UserError(
            f"text.path={info.cfg.text.path!r} no longer holds the encoder this run was trained with; restore it"
        )
    encoder.model.save_pretrained(folder / "text_encoder")
    encoder.tokenizer.model_max_length = info.cfg.text.max_length
    encoder.tokenizer.save_pretrained(folder / "tokenizer")


def _write_image_encoder(info: CheckpointInfo, folder: Path) -> None:
    """Nothing for a model that has none."""
    if not info.cfg.model.image_dim:
        return
    encoder = ImageEncoder(info.cfg.image, info.cfg.model)
    if encoder.digest() != info.spec.image_digest:
        raise UserError(
            f"image.path={info.cfg.image.path!r} no longer holds the encoder this run was trained with; restore it"
        )
    encoder.save(folder)


def _write_scheduler(info: CheckpointInfo, vae: VideoVAE, folder: Path) -> dict[str, Any]:
    """The scheduler of the spec's solver with its shift for the run's usual clip; class and shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    shape, spec = info.shape, info.spec
    shift = spec.shift_for(vae.latent_shape(shape.frames, shape.height, shape.width)[1:])
    if spec.solver == "unipc":
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ).save_pretrained(folder)
        return {"class": "UniPCMultistepScheduler", "shift": shift, "grid": "unipc"}
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder)
    return {"class": "FlowMatchEulerDiscreteScheduler", "shift": shift, "grid": "flow_match_euler"}


def _write_index(
    name: str,
    info: CheckpointInfo,
    scheduler: Mapping[str, Any],
    folder: Path,
    *,
    expand_timesteps: bool,
) -> None:
    import diffusers

    tokenizer = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    parts: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler["class"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer.get("tokenizer_class", "ByT5Tokenizer")],
        "transformer": ["diffusers", CLASS_NAME],
        "vae": ["diffusers", WAN],
        "expand_timesteps": expand_timesteps,
    }
    if info.spec.expert:
        parts |= {LOW: ["diffusers", CLASS_NAME], "boundary_ratio": info.spec.boundary}
    if name == "WanImageToVideoPipeline":
        has = (folder / ENCODER).is_dir()
        parts[ENCODER] = ["transformers", "CLIPVisionModel"] if has else [None, None]
        parts[PROCESSOR] = ["transformers", "CLIPImageProcessor"] if has else [None, None]
    (folder / "model_index.json").write_text(json.dumps(parts, indent=2) + "\n")
    missing = [
        name
        for name, part in parts.items()
        if isinstance(part, list) and part[0] and not (folder / name).is_dir()
    ]
    if missing:
        raise Fault(f"the pipeline's folder lacks {', '.join(missing)}")

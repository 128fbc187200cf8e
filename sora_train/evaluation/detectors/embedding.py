"""What a model of pictures and words says: how well a clip fits its caption, and how pleasing it looks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.errors import UserError


def embedded(
    pictures: Sequence[np.ndarray],
    caption: str | None,
    clip: str,
    head: str,
    names: tuple[str, str],
) -> dict[str, Any]:
    """Of pictures, uint8 (H, W, 3) RGB, and the CLIP model in the folder `clip`.

    `clip_similarity`: the mean cosine between a picture and the caption, in [-1, 1]; null without a caption. Longer
    captions are cut at the model's length. `aesthetic`: the mean of the head in the file `head`, in the units it was
    trained on (1 to 10 for LAION's); null without one. `names`: what the user calls the model and the head.
    """
    import torch

    model, processor = _clip(clip, names[0])
    scores: dict[str, Any] = {}
    with torch.inference_mode():
        images = processor(images=list(pictures), return_tensors="pt")
        seen = _unit(model.get_image_features(**images))
        if caption:
            words = processor(
                text=[caption],
                return_tensors="pt",
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
            )
            said = _unit(model.get_text_features(**words))
            scores["clip_similarity"] = float((seen @ said.T).mean())
        if head:
            scores["aesthetic"] = float(_through(_head(head, seen.shape[1], names), seen).mean())
    return scores


def _unit(features: Any) -> Any:
    features = getattr(features, "pooler_output", features)
    return features / features.norm(dim=-1, keepdim=True)


def _through(layers: Sequence[tuple[Any, Any]], values: Any) -> Any:
    import torch

    for weight, bias in layers:
        values = torch.nn.functional.linear(values, weight, bias)
    return values


@cache
def _clip(folder: str, name: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = Path(folder).expanduser()
    try:
        model = CLIPModel.from_pretrained(path, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise UserError(f"{name}={folder} cannot be loaded: {error}") from error
    return model.eval().float(), processor


@cache
def _head(file: str, width: int, names: tuple[str, str]) -> list[tuple[Any, Any]]:
    """(weight, bias) of linear layers in their order: LAION's heads have one, or five without anything between."""
    import torch
    from safetensors.torch import load_file

    path = Path(file).expanduser()
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        stems = [name.removesuffix("weight") for name in state if name.endswith("weight")]
        stems.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
        layers = [(state[n + "weight"].float(), state[n + "bias"].float()) for n in stems]
    except Exception as error:
        raise UserError(f"{names[1]}={file} cannot be loaded: {error}") from error
    sizes = [width, *(len(weight) for weight, _ in layers)]
    if (
        not layers
        or sizes[-1] != 1
        or any(w.shape[1] != n for (w, _), n in zip(layers, sizes, strict=False))
    ):
        raise UserError(
            f"{names[1]}={file} is no head of linear layers from the {width} numbers of {names[0]} to one; "
            "give the one that was trained with that model"
        )
    return layers

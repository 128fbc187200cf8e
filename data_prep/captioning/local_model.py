"""A local vision-language model of transformers, from a folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.captioning.asking import Reply
from data_prep.captioning.schema import prompt
from data_prep.captioning.settings import CaptionConfig
from sora_train.errors import UserError


def check_model(settings: CaptionConfig) -> None:
    """Raises UserError where there is no folder of a model."""
    if not settings.model_path:
        raise UserError(
            "caption.by=model needs caption.model_path; give the folder of an image-text-to-text model"
        )
    if not (Path(settings.model_path).expanduser() / "config.json").is_file():
        raise UserError(
            f"caption.model_path={settings.model_path} holds no config.json; give the folder of an image-text-to-text "
            "model of transformers, downloaded beforehand"
        )


def ask_model(settings: CaptionConfig, frames: Sequence[bytes], attempt: int) -> Reply:
    """The model's answer about frames (JPEG): its likeliest one first, then drawn ones, each with a seed of its own."""
    import torch

    processor, model = _loaded(settings.model_path, settings.device)
    pictures = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames]
    content = [
        *({"type": "image", "image": picture} for picture in pictures),
        {"type": "text", "text": prompt(settings)},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    torch.manual_seed(attempt)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, max_new_tokens=settings.max_answer_tokens, do_sample=attempt > 0
        )
    sent = inputs["input_ids"].shape[1]
    answer = tokens[0, sent:]
    text = processor.decode(answer, skip_special_tokens=True)
    return Reply(text, sent, len(answer))


@cache
def _loaded(path: str, device: str) -> tuple[Any, Any]:
    """The processor and the model. Raises UserError where the folder holds no such model."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    folder = str(Path(path).expanduser())
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, dtype="auto"
        )
        return processor, model.eval().to(device)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(
            f"caption.model_path={path} cannot be loaded as an image-text-to-text model on caption.device={device}: "
            f"{str(error).strip().splitlines()[0]:.200}"
        ) from error

"""The frozen image encoder of Wan 2.1's image-to-video models: transformers' CLIPVisionModel and its image processor.

Its embeddings are those of the last layer but one, as diffusers' WanImageToVideoPipeline takes them.

Dimension key: B clips, N images of a clip, I embeddings of an image, E their width.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config.sections.model import ImageConfig, ModelConfig
from sora_train.device.transfer import to_device
from sora_train.errors import ConfigError, UserError
from sora_train.models.finite_weights import require_finite
from sora_train.models.hub import weights_folder
from sora_train.models.text.encoder import weights_digest
from sora_train.models.work_sharing import NO_SHARING, WorkSharing

ENCODER, PROCESSOR = "image_encoder", "image_processor"
"""The parts of a pipeline's folder."""
GREY = 128
"""A picture of which nothing is known has this value everywhere, as unknown pixels of a clip are mid-grey."""


class ImageEncoder(nn.Module):
    """The encoder of `image.path`, always frozen."""

    def __init__(self, cfg: ImageConfig, model: ModelConfig):
        """Raises UserError where a file is missing or another encoder's, ConfigError where `image.path` is
        empty or its embeddings are not those of `model.image_dim` and `model.image_tokens`."""
        super().__init__()
        if not cfg.path:
            raise ConfigError(
                f"model.image_dim is {model.image_dim} and image.path is empty; give the folder of the image encoder, "
                "or set model.image_dim=0"
            )
        self.cfg = cfg
        folder = weights_folder("image.path", cfg.path, ENCODER)
        self.sizes = read_sizes(folder)
        width, tokens = int(self.sizes["hidden_size"]), tokens_of(self.sizes)
        if (width, tokens) != (model.image_dim, model.image_tokens):
            raise ConfigError(
                f"model.image_dim={model.image_dim} and model.image_tokens={model.image_tokens}, but the encoder of "
                f"image.path={cfg.path} makes {tokens} embeddings of width {width}; set them to these"
            )
        self.model = load_model(folder, getattr(torch, cfg.dtype)).requires_grad_(False).eval()
        self.processor = load_processor(folder)
        self._digest = ""

    @torch.no_grad()
    def forward(self, picture_HW3: np.ndarray) -> Tensor:
        """Embeddings (I, E) of one picture, uint8 RGB of any size, float32."""
        weight = next(self.model.parameters())
        pixels = self.processor(images=[picture_HW3], return_tensors="pt").pixel_values
        found = self.model(
            to_device(pixels, weight.device).to(weight.dtype), output_hidden_states=True
        )
        embeddings: Tensor = found.hidden_states[-2][0]
        return embeddings.float()

    def embed(self, pictures_BNHW3: np.ndarray, sharing: WorkSharing = NO_SHARING) -> Tensor:
        """Embeddings (B, N * I, E) of the pictures of clips, uint8 (B, N, H, W, 3); one by one, so that they depend on
        no others. `sharing` deals them out."""
        batch, count = pictures_BNHW3.shape[:2]
        pictures = list(pictures_BNHW3.reshape(batch * count, *pictures_BNHW3.shape[2:]))
        return torch.cat(sharing(pictures, self)).unflatten(0, (batch, -1))

    def digest(self) -> str:
        """SHA-256 of weights, sizes, how pictures are prepared, and the precision."""
        if not self._digest:
            how = {k: v for k, v in self.processor.to_dict().items() if k in _PREPARED}
            sizes = {k: self.sizes[k] for k in _SIZES if k in self.sizes}
            facts = json.dumps([how, sizes, self.cfg.dtype], sort_keys=True)
            sha = hashlib.sha256(facts.encode())
            self._digest = weights_digest(sha, self.model.named_parameters())
        return self._digest

    def save(self, folder: Path) -> None:
        """Write encoder and processor as parts of a pipeline's folder."""
        self.model.save_pretrained(folder / ENCODER)
        self.processor.save_pretrained(folder / PROCESSOR)


_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps",
)  # fmt: skip
_PREPARED = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std",
)  # fmt: skip


def read_sizes(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises UserError where it is missing or another model's."""
    try:
        sizes: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"image.path={folder} has no readable config.json ({error}); give a folder as transformers' "
            "save_pretrained writes it"
        ) from error
    if sizes.get("model_type") != "clip_vision_model":
        raise UserError(
            f"image.path={folder} holds a model of type {sizes.get('model_type')}; what is read is a clip_vision_model"
        )
    return sizes


def tokens_of(sizes: dict[str, Any]) -> int:
    """Embeddings of one image: its patches and one of the whole."""
    return int((sizes["image_size"] // sizes["patch_size"]) ** 2 + 1)


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Strict: no weight may be missing. A pickle is refused, since it could run code when it is read."""
    from transformers import CLIPVisionModel

    try:
        model, report = CLIPVisionModel.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"image.path={folder} cannot be read as safetensors ({str(error).splitlines()[0]}); copy the folder again, "
            "or save the model anew with transformers' save_pretrained"
        ) from error
    if report["missing_keys"]:
        listed = ", ".join(sorted(report["missing_keys"])[:10])
        raise UserError(
            f"image.path={folder} is not the CLIPVisionModel of its config.json: it misses {listed}"
        )
    require_finite(model.named_parameters(), f"image.path={folder}", "copy the folder again")
    return model


def load_processor(folder: Path) -> Any:
    """From the folder itself, or from `image_processor` beside it as pipelines have it."""
    from transformers import CLIPImageProcessorPil

    name = "preprocessor_config.json"
    places = [place for place in (folder, folder.parent / PROCESSOR) if (place / name).is_file()]
    if not places:
        raise UserError(
            f"image.path={folder} has no {name}, there or in {folder.parent / PROCESSOR}; copy it beside the weights"
        )
    return CLIPImageProcessorPil.from_pretrained(places[0], local_files_only=True)


def pictures_of(frames_FHW3: np.ndarray, known_F: np.ndarray, count: int) -> np.ndarray:
    """The first frame of a clip, and with `count` 2 the last one, grey where it is not known: uint8 (N, H, W, 3).

    Args:
        frames_FHW3: uint8; frames that are not known may hold anything.
        known_F: above 0 for frames that are given.
    """
    ends = [0, -1][:count]
    return np.stack(
        [
            frames_FHW3[end] if known_F[end] > 0 else np.full_like(frames_FHW3[end], GREY)
            for end in ends
        ]
    )

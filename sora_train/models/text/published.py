"""Published text encoders: umT5, T5 and CLIP's, from a folder, frozen.

Which class of transformers reads a kind, whether captions are cleaned first and how long a caption
may be are rows of one table; the rest is the byte encoder's behaviour.

Dimension key: B batch, S caption tokens, E caption width.
"""

import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_train.config.sections.model import TextConfig
from sora_train.errors import ConfigError, UserError
from sora_train.models.finite_weights import require_finite
from sora_train.models.hub import weights_folder
from sora_train.models.text.encoder import LENGTH_STEP, TextEncoder, weights_digest

TOKENIZER = "tokenizer"


def build_text_encoder(cfg: TextConfig) -> TextEncoder:
    """The encoder that the config names: the byte one of the config's sizes, or a stored one."""
    return StoredTextEncoder(cfg) if cfg.path else TextEncoder(cfg)


@dataclass(frozen=True)
class TextKind:
    """How one kind of published encoder is read."""

    class_name: str
    model_type: str
    """What the folder's config.json calls it."""
    clean: Callable[[str], str]
    """Applied to a caption before its tokens are made."""
    beside: tuple[str, ...]
    """First parts of the names of weights that the folder may hold and the encoder leaves."""


def wan_clean(caption: str) -> str:
    """As diffusers' WanPipeline: HTML's escapes undone twice, any white space one blank. Where ftfy
    is installed that pipeline also mends broken encodings; here a caption is never changed by what
    happens to be installed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(caption)).strip()).strip()


def unchanged(caption: str) -> str:
    return caption


TEXT_KINDS: dict[str, TextKind] = {
    "umt5": TextKind("UMT5EncoderModel", "umt5", wan_clean, ("decoder.", "lm_head.")),
    "t5": TextKind("T5EncoderModel", "t5", unchanged, ("decoder.", "lm_head.")),
    "clip": TextKind(
        "CLIPTextModel",
        "clip_text_model",
        unchanged,
        ("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
    ),
}


class StoredTextEncoder(TextEncoder):
    """The encoder of `text.path`, always frozen. Its weights are the folder's, whatever the seed."""

    def __init__(self, cfg: TextConfig):
        """Raises UserError when a file is missing or is another encoder's, ConfigError when
        `text.max_length` or `text.d_model` is not the encoder's."""
        kind = TEXT_KINDS[cfg.kind]
        folder = weights_folder("text.path", cfg.path, "text_encoder")
        sizes = read_sizes(folder, cfg.kind)
        check_sizes(cfg, sizes)
        super().__init__(
            cfg,
            model=load_model(folder, kind, getattr(torch, cfg.dtype)),
            tokenizer=load_tokenizer(folder),
        )
        self.kind = kind
        self._digest = ""

    @property
    def out_dtype(self) -> torch.dtype:
        """float32, whatever the encoder computes in: what follows rounds once, its own way."""
        return torch.float32

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, S) int64 and mask (B, S) bool (True = the caption's own), S a multiple of 16 up
        to `text.max_length`.

        A longer caption is cut, keeping the end mark, and counted in `num_truncated`."""
        limit = self.cfg.max_length
        cleaned = [self.kind.clean(prompt) for prompt in prompts]
        # Not verbose: its warning of long captions is counted here instead.
        rows = self.tokenizer(cleaned, verbose=False).input_ids
        too_long = [row for row, ids in enumerate(rows) if len(ids) > limit]
        self.num_truncated += len(too_long)
        for row in too_long:
            rows[row] = self.tokenizer(cleaned[row], truncation=True, max_length=limit).input_ids
        longest = max(map(len, rows))
        width = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, limit)
        ids_BS = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask_BS = torch.zeros((len(rows), width), dtype=torch.bool)
        for row, ids in enumerate(rows):
            ids_BS[row, : len(ids)] = torch.tensor(ids)
            mask_BS[row, : len(ids)] = True
        return ids_BS, mask_BS

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """The folder's weights."""
        for name, parameter in self.named_parameters():
            yield name, parameter.detach()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Nothing is drawn: the weights came with the folder."""

    def digest(self) -> str:
        """SHA-256 of weights, sizes, vocabulary and how captions are read, precision included."""
        if not self._digest:
            how = self.cfg.model_dump(
                mode="json", include={"kind", "max_length", "padding", "dtype"}
            )
            sizes = {k: v for k, v in self.model.config.to_dict().items() if k in _SIZES}
            vocabulary = sorted(self.tokenizer.get_vocab().items())
            sha = hashlib.sha256(json.dumps([how, sizes, vocabulary], sort_keys=True).encode())
            self._digest = weights_digest(sha, self.named_parameters())
        return self._digest


_SIZES = (
    "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
    "relative_attention_max_distance", "feed_forward_proj", "layer_norm_epsilon", "hidden_size",
    "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
)  # fmt: skip


def read_sizes(folder: Path, kind: str) -> dict[str, Any]:
    """The folder's config.json. Raises UserError when it is missing or another kind's."""
    path = folder / "config.json"
    try:
        sizes: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"text.path={folder} has no readable config.json ({error}); give a folder as "
            "transformers' save_pretrained writes it"
        ) from error
    if "text_config" in sizes and kind == "clip":
        sizes = {"model_type": "clip_text_model", **sizes["text_config"]}
    model_type, expected = sizes.get("model_type"), TEXT_KINDS[kind].model_type
    if model_type != expected:
        raise UserError(
            f"text.path={folder} holds a model of type {model_type}, but text.kind={kind} reads {expected}"
        )
    return sizes


def check_sizes(cfg: TextConfig, sizes: dict[str, Any]) -> None:
    """Raises ConfigError when the config's own sizes are not the encoder's."""
    width = sizes.get("d_model", sizes.get("hidden_size"))
    if width != cfg.d_model:
        raise ConfigError(
            f"text.d_model is {cfg.d_model}, but the encoder of text.path={cfg.path} gives captions "
            f"of width {width}; set text.d_model={width}"
        )
    longest = sizes.get("max_position_embeddings")
    if longest is not None and cfg.max_length > longest:
        raise ConfigError(
            f"text.max_length is {cfg.max_length}, but the encoder of text.path={cfg.path} reads at "
            f"most {longest} tokens; set text.max_length={longest}"
        )


def load_model(folder: Path, kind: TextKind, dtype: torch.dtype) -> Any:
    """Strict: no weight may be missing, and none left over but those of parts not used here."""
    import transformers

    model_class = getattr(transformers, kind.class_name, None)
    if model_class is None:
        raise ConfigError(
            f"text: this transformers ({transformers.__version__}) has no {kind.class_name}; "
            "install a version that does"
        )
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"text.path={folder} cannot be read ({str(error).splitlines()[0]}); copy the folder again"
        ) from error
    over = [name for name in report["unexpected_keys"] if not name.startswith(kind.beside)]
    for what, names in (("misses", report["missing_keys"]), ("has besides", over)):
        if names:
            listed = ", ".join(sorted(names)[:10])
            raise UserError(
                f"text.path={folder} is not the {kind.class_name} of its config.json: it {what} "
                f"{len(names)} weights ({listed})"
            )
    require_finite(model.named_parameters(), f"text.path={folder}", "copy the folder again")
    return model


def load_tokenizer(folder: Path) -> Any:
    """From the folder itself, or from `tokenizer` beside it as pipelines have it."""
    from transformers import AutoTokenizer

    places = [folder, folder.parent / TOKENIZER]
    folders = [
        place
        for place in places
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    ]
    if not folders:
        raise UserError(
            f"text.path={folder} has no tokenizer: no tokenizer.json there or in {places[1]}; copy "
            "it beside the weights"
        )
    try:
        return AutoTokenizer.from_pretrained(folders[0], local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"text.path={folder}: its tokenizer cannot be read ({str(error).splitlines()[0]}); copy "
            "the folder again"
        ) from error

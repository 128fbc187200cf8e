"""The text encoder: transformers' UMT5EncoderModel on UTF-8 bytes (ByT5Tokenizer), so nothing is
downloaded.

Dimension key: B batch, S caption tokens (bytes and an end mark), E caption width.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.config.sections.model import TextConfig
from sora_train.device.transfer import to_device
from sora_train.models.flops import text_flops
from sora_train.models.transformer.layers import keyed_generator
from sora_train.models.work_sharing import NO_SHARING, WorkSharing

# ByT5: 3 special ids, 256 bytes, 125 unused sentinels.
VOCAB_SIZE = 384
# Lengths are rounded up to this, so that few shapes occur.
LENGTH_STEP = 16
# Micro-batches in a row whose captions were all known, after which a frozen encoder leaves the GPU.
SPARED = 64


def byte_encoder(cfg: TextConfig) -> tuple[Any, nn.Module]:
    """Tokenizer and model of the config's sizes."""
    # transformers takes seconds to import, and only those who build an encoder need it.
    from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

    sizes = UMT5Config(
        vocab_size=VOCAB_SIZE,
        d_model=cfg.d_model,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        d_kv=cfg.d_kv,
        d_ff=cfg.d_ff,
        dropout_rate=0.0,
    )
    return ByT5Tokenizer(), UMT5EncoderModel(sizes)


def weights_digest(sha: Any, weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest of `sha` after these weights in float32, by name."""
    for name, value in sorted(weights):
        sha.update(name.encode())
        sha.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    digest: str = sha.hexdigest()
    return digest


class TextEncoder(nn.Module):
    """Captions to embeddings. Frozen unless `text.trainable`; without dropout, so that no draw is
    unkeyed."""

    def __init__(self, cfg: TextConfig, *, model: Any = None, tokenizer: Any = None):
        """`model` and `tokenizer` replace the byte encoder's own, as published.py loads them."""
        super().__init__()
        self.cfg = cfg
        self._spared = 0
        self.num_truncated = 0
        """Captions cut to `text.max_length` so far."""
        self.tokenizer, self.model = byte_encoder(cfg) if model is None else (tokenizer, model)
        self.requires_grad_(cfg.trainable)
        self.train(cfg.trainable)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, S) int64 and mask (B, S) bool (True = the caption's own), S a multiple of 16 up
        to `text.max_length`.

        A longer caption is cut, keeping the end mark, and counted in `num_truncated`. The empty
        caption, the null of classifier-free guidance, is the end mark alone."""
        limit = self.cfg.max_length
        self.num_truncated += sum(len(prompt.encode("utf-8")) + 1 > limit for prompt in prompts)
        encoded = self.tokenizer(
            list(prompts),
            padding=True,
            pad_to_multiple_of=LENGTH_STEP,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        return encoded.input_ids, encoded.attention_mask.bool()

    def forward(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Caption embeddings (B, S, E) with zeros where the mask is False; under `wan` padding S is
        `text.max_length`, so that the number of zeros attended to depends on no other caption of
        the batch."""
        self._spared = 0
        captions_BSE = self.model(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        captions_BSE = captions_BSE.to(self.out_dtype)
        captions_BSE = torch.where(mask_BS[..., None], captions_BSE, torch.zeros_like(captions_BSE))
        if self.cfg.padding == "wan":
            captions_BSE = F.pad(
                captions_BSE, (0, 0, 0, self.cfg.max_length - captions_BSE.shape[1])
            )
        return captions_BSE

    @property
    def weight(self) -> Tensor:
        """The table of token embeddings: where the encoder lies."""
        table: Tensor = self.model.get_input_embeddings().weight
        return table

    @property
    def out_dtype(self) -> torch.dtype:
        """Precision of the embeddings."""
        return self.weight.dtype

    def encode(
        self, prompts: Sequence[str], sharing: WorkSharing = NO_SHARING
    ) -> tuple[Tensor, Tensor | None]:
        """(captions, key mask) of strings, as the transformer takes them; the mask is None under
        `wan` padding. `sharing` deals the captions out, padded as they are together."""
        device = self.weight.device
        ids_BS, mask_BS = (to_device(x, device) for x in self.tokenize(prompts))
        parts = list(
            zip(
                ids_BS.tensor_split(sharing.parts), mask_BS.tensor_split(sharing.parts), strict=True
            )
        )
        # More ranks than captions leave parts without any.
        parts = [part for part in parts if len(part[0])]
        captions_BSE = torch.cat(sharing(parts, lambda part: self(*part)))
        return captions_BSE, mask_BS if self.cfg.padding == "masked" else None

    @torch.no_grad()
    def embedding(self, prompt: str) -> Tensor:
        """The embeddings (L, E) of one caption's own tokens, the end mark included."""
        device = self.weight.device
        ids_BS, mask_BS = self.tokenize([prompt])
        embeddings_SE = self(to_device(ids_BS, device), to_device(mask_BS, device))[0]
        return embeddings_SE[: int(mask_BS.sum())]

    def spare(self) -> None:
        """A micro-batch went without it; after so many in a row a GPU's memory is given back (umT5-XXL: 11 GB), until
        it is asked again."""
        self._spared += 1
        if self._spared == SPARED and self.weight.is_cuda:
            self.to("cpu")

    def batched(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Embeddings (L, E) of several captions as `encode` would give them together."""
        longest = max(len(row) for row in rows)
        width = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self.cfg.max_length)
        if self.cfg.padding == "wan":
            width = self.cfg.max_length
        size = (len(rows), width, self.cfg.d_model)
        captions_BSE = rows[0].new_zeros(size, dtype=self.out_dtype)
        for index, row in enumerate(rows):
            captions_BSE[index, : len(row)] = row
        if self.cfg.padding != "masked":
            return captions_BSE, None
        lengths_B = torch.tensor([len(row) for row in rows])
        mask_BS = torch.arange(width) < lengths_B[:, None]
        return captions_BSE, to_device(mask_BS, rows[0].device)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """First value of every parameter, float32 on the CPU at full shape, keyed by (seed, name);
        T5's own scales."""
        for name, param in self.named_parameters():
            yield name, self._initial_value(name, param.shape, seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill the parameters in place with `initial_values`."""
        params = dict(self.named_parameters())
        for name, value in self.initial_values(seed):
            params[name].copy_(value)

    def flops(self, text_tokens: int) -> int:
        """Floating-point operations of one caption's forward pass; backward costs twice that."""
        return text_flops(self.cfg, text_tokens)

    def digest(self) -> str:
        """SHA-256 of sizes and, if frozen, weights. A trainable encoder's weights change and lie in
        the checkpoint."""
        sizes = self.cfg.model_dump(mode="json", exclude={"path", "dtype"})
        sha = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
        return weights_digest(sha, [] if self.cfg.trainable else self.named_parameters())

    def _initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """As transformers' UMT5PreTrainedModel._init_weights, which draws from the process's
        generator instead, but for two things that let bytes become words sooner under AdamW.

        Heads start with a slope against distance (as ALiBi's; Press et al. 2022, arXiv:2108.12409,
        section 3), so that the first layer sees neighbouring bytes and not the mean of all; and
        embeddings start small enough for a step of the learning rate to matter to them.
        """
        if len(shape) == 1:
            return torch.ones(shape)
        cfg, leaf = self.cfg, name.split(".")[-2]
        if leaf == "relative_attention_bias":
            buckets, heads = shape
            distance = torch.arange(buckets) % (buckets // 2)
            return -distance[:, None] * 2.0 ** (1.0 - torch.arange(heads))
        std = {
            "shared": 0.25,
            "q": (cfg.d_model * cfg.d_kv) ** -0.5,
            "k": cfg.d_model**-0.5,
            "v": cfg.d_model**-0.5,
            "o": (cfg.num_heads * cfg.d_kv) ** -0.5,
            "wi_0": cfg.d_model**-0.5,
            "wi_1": cfg.d_model**-0.5,
            "wo": cfg.d_ff**-0.5,
        }[leaf]
        return torch.randn(shape, generator=keyed_generator(seed, f"text.{name}")) * std

"""The model that is trained: the transformer and, when it is trainable, the text encoder before it. Frozen encoders
stand beside it.

Dimension key: B batch, C latent channels, T, H, W latent frames, rows, columns, S caption tokens,
E caption width.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config.sections.model import ImageConfig, ModelConfig, TextConfig
from sora_train.device.transfer import to_device
from sora_train.errors import ConfigError
from sora_train.models.image_encoder import ImageEncoder
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.text.published import build_text_encoder
from sora_train.models.transformer.dit import KnownCaptions, VideoDiT
from sora_train.models.work_sharing import NO_SHARING, WorkSharing

Text = tuple[Tensor | KnownCaptions, Tensor | None]
"""Byte ids (B, S), caption embeddings (B, S, E) or what the blocks make of them, and the mask (B, S) of the caption's
own tokens."""


@runtime_checkable
class VideoDenoiser(Protocol):
    """What the loss and the sampler ask of a model of captioned clips. TextToVideo is one; so is a class of your own
    that has these, and is called as `TextToVideo.forward` is.
    """

    @property
    def takes_mask(self) -> bool:
        """Whether the model takes the mask of condition frames: `mask_BT` of its call."""

    def __call__(
        self,
        latents_BCTHW: Tensor,
        t_BT: Tensor,
        text: Text,
        *,
        mask_BT: Tensor | None = None,
        fps_B: Tensor | None = None,
    ) -> Tensor: ...

    def tokenize(self, prompts: Sequence[str]) -> Text:
        """Captions as a call takes them, on the model's device."""

    def embed(
        self, prompts: Sequence[str], stored: Sequence[Tensor | None], sharing: WorkSharing
    ) -> Text:
        """`tokenize`, with stored embeddings in place of their prompts and by way of `sharing`."""

    def text_digest(self) -> str:
        """What stored embeddings are compared by."""


class TextToVideo(nn.Module):
    """`transformer` and, with `text.trainable`, `text_encoder`: sharded, averaged, saved as one.

    With `model.expert=both` there is a `transformer_2` too, which computes the noise levels below the boundary.
    """

    def __init__(
        self,
        model: ModelConfig,
        text: TextConfig,
        image: ImageConfig | None = None,
        *,
        seed: int = 0,
        empty: bool = False,
    ):
        """Every weight is drawn from `seed` and its own name. An `empty` model has no memory for the
        weights that are trained: whoever places them fills them with `initial_values`. Without `image` a
        model of `model.image_dim` is given embeddings of images that are known already.

        Raises:
            ConfigError: caption embeddings would have two widths, or those of images others than the model's.
        """
        super().__init__()
        if model.text_dim != text.d_model:
            raise ConfigError(
                f"model.text_dim is {model.text_dim} but text.d_model is {text.d_model}; "
                "captions have one width, so make them equal"
            )
        with torch.device("meta") if empty else nullcontext():
            self.transformer = VideoDiT(model)
            self.transformer_2 = VideoDiT(model) if model.expert == "both" else None
        with torch.device("meta") if empty and text.trainable else nullcontext():
            encoder = build_text_encoder(text)
        self.text_encoder = encoder if text.trainable else None
        # In a tuple it is no sub-module: a frozen encoder is neither sharded, averaged nor saved.
        self._frozen: tuple[TextEncoder, ...] = () if text.trainable else (encoder,)
        self._images: tuple[ImageEncoder, ...] = ()
        if image is not None and model.image_dim:
            self._images = (ImageEncoder(image, model),)
        # The frozen encoder's embedding of the empty caption, kept at its first use.
        self._null: tuple[Tensor, ...] = ()
        self.text_padding = text.padding
        self.stays = False
        """Whether the weights are whole here and stay as they are, so that what `know` returns may be kept."""
        if not empty:
            self.init_weights(seed)
        for frozen in self._frozen if empty else ():
            frozen.init_weights(seed)

    def forward(
        self,
        latents_BCTHW: Tensor,
        t_BT: Tensor,
        text: Text,
        *,
        mask_BT: Tensor | None = None,
        fps_B: Tensor | None = None,
        images_BIE: Tensor | None = None,
        expert: str = "",
    ) -> Tensor:
        """Velocity (B, C, T, H, W) in at least float32.

        Args:
            latents_BCTHW: noisy latents.
            t_BT: noise level of each latent frame in [0, 1].
            text: what `tokenize` or `know` returned; ids are encoded here, all else is taken as it is.
            mask_BT: 1 for condition frames; only for models with `mask_proj`.
            fps_B: frames a second of the clips; only models with `fps_proj` read it.
            images_BIE: what `embed_images` returned; only for models of `model.image_dim`.
            expert: `high` or `low`, for models of both: which one computes all clips of the batch.

        Raises:
            ValueError: ids without a trainable encoder, or a mask missing where it is needed.
        """
        captions, mask_BS = text
        if isinstance(captions, Tensor):
            captions = self._encoded(captions, mask_BS)
        if self.text_padding == "wan":
            mask_BS = None
        elif mask_BS is None:
            raise ValueError("text.padding is 'masked', so caption embeddings need their mask")
        if self.transformer.fps_proj is None:
            fps_B = None
        velocity: Tensor = self._expert(expert)(
            latents_BCTHW,
            t_BT,
            captions,
            mask_BS,
            mask_BT=mask_BT,
            fps_B=fps_B,
            images_BIE=images_BIE,
        )
        return velocity

    def know(self, text: Text, expert: str = "") -> Text:
        """`text` as `forward` takes it, with all done that does not depend on the latents: for many calls with the same
        captions. Not for weights that are sharded or change."""
        captions, mask_BS = text
        assert isinstance(captions, Tensor)
        known = self._expert(expert).know_captions(self._encoded(captions, mask_BS))
        return known, mask_BS

    def _expert(self, expert: str) -> VideoDiT:
        """The transformer that computes. Raises ValueError where there are two, and none is named."""
        if self.transformer_2 is None:
            return self.transformer
        if expert not in ("high", "low"):
            raise ValueError("a model of two experts is told which one computes: high or low")
        return self.transformer_2 if expert == "low" else self.transformer

    @property
    def takes_mask(self) -> bool:
        """Whether condition frames are marked by `mask_proj`."""
        return self.transformer.mask_proj is not None

    def tokenize(self, prompts: Sequence[str], sharing: WorkSharing = NO_SHARING) -> Text:
        """Captions as `forward` takes them, on the model's device.

        Byte ids for a trainable encoder, which runs inside `forward`; for a frozen one, whose
        result never changes, the embeddings themselves, by way of `sharing` where others help.
        """
        device = self.transformer.proj_out.weight.device
        if self.text_encoder is not None:
            ids_BS, mask_BS = self.text_encoder.tokenize(prompts)
            return to_device(ids_BS, device), to_device(mask_BS, device)
        with torch.no_grad():
            return self.frozen_encoder.to(device).encode(prompts, sharing)

    def embed(
        self,
        prompts: Sequence[str],
        stored: Sequence[Tensor | None],
        sharing: WorkSharing = NO_SHARING,
    ) -> Text:
        """`tokenize`, with embeddings (L, E) that are known already in place of their prompts.

        They are the frozen encoder's of the caption's own tokens; without a frozen encoder they are
        not looked at.
        """
        if self.text_encoder is not None or all(known is None for known in stored):
            return self.tokenize(prompts, sharing)
        encoder, device = self.frozen_encoder, self.transformer.proj_out.weight.device
        # Every batch drops some captions, and the null caption is always the same.
        stored = [
            self._null_embedding(device) if known is None and not prompt else known
            for prompt, known in zip(prompts, stored, strict=True)
        ]
        rest = [prompt for prompt, known in zip(prompts, stored, strict=True) if known is None]
        encoded: list[Tensor] = []
        if rest:
            captions_BSE, mask_BS = self.tokenize(rest, sharing)
            encoded = [
                own if mask_BS is None else own[mask_BS[row]]
                for row, own in enumerate(captions_BSE)
            ]
        begun = iter(encoded)
        rows = [next(begun) if known is None else to_device(known, device) for known in stored]
        if not rest:
            encoder.spare()
        return encoder.batched(rows)

    def keep_null_embedding(self, device: torch.device) -> None:
        """Embed the empty caption now, by a frozen encoder; steps that drop captions then do without it."""
        self._null_embedding(device)

    def _null_embedding(self, device: torch.device) -> Tensor:
        if not self._null:
            self._null = (self.frozen_encoder.to(device).embedding(""),)
        return self._null[0]

    def embed_images(self, pictures_BNHW3: np.ndarray, sharing: WorkSharing = NO_SHARING) -> Tensor:
        """Embeddings (B, I, E) of `model.images` pictures of each clip, as `forward` takes them."""
        encoder = self._images[0]
        return encoder.to(self.transformer.proj_out.weight.device).embed(pictures_BNHW3, sharing)

    @property
    def images(self) -> int:
        """Frames of a clip whose embeddings the model is given."""
        return self.transformer.cfg.images

    @property
    def frozen_encoder(self) -> TextEncoder:
        """The text encoder of `text.trainable=false`, outside the parameters of this model."""
        return self._frozen[0]

    def take_truncated(self) -> int:
        """Captions cut to `text.max_length` since it was asked last."""
        encoder = self.text_encoder or self.frozen_encoder
        cut, encoder.num_truncated = encoder.num_truncated, 0
        return cut

    def text_digest(self) -> str:
        """Digest of the text encoder; see TextEncoder.digest."""
        return (self.text_encoder or self.frozen_encoder).digest()

    def image_encoder(self) -> ImageEncoder | None:
        """The frozen encoder of images, outside the parameters of this model."""
        return self._images[0] if self._images else None

    def _encoded(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Embeddings of ids; embeddings are returned as they are."""
        if ids_BS.is_floating_point():
            return ids_BS
        if self.text_encoder is None:
            raise ValueError(
                "byte ids were given, but the text encoder is frozen and outside the model; "
                "embed them first"
            )
        if mask_BS is None:
            raise ValueError("byte ids need the mask that came with them")
        return self.text_encoder(ids_BS, mask_BS)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """First value of every parameter by its full name; see VideoDiT.initial_values."""
        for prefix, module in (
            ("transformer", self.transformer),
            ("transformer_2", self.transformer_2),
            ("text_encoder", self.text_encoder),
        ):
            if module is not None:
                for name, value in module.initial_values(seed):
                    yield f"{prefix}.{name}", value

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill the parameters in place with `initial_values`, and a frozen encoder's likewise."""
        params = dict(self.named_parameters())
        for name, value in self.initial_values(seed):
            params[name].copy_(value)
        self._null = ()
        for encoder in self._frozen:
            encoder.init_weights(seed)

    def flops(self, num_tokens: int, text_tokens: int, num_frames: int = 1) -> int:
        """Floating-point operations of one sample's forward pass; backward costs twice that.

        A trainable text encoder is included, a frozen one is not.
        """
        total = self.transformer.flops(num_tokens, text_tokens, num_frames)
        encoder = self.text_encoder
        return total if encoder is None else total + encoder.flops(text_tokens)

"""The networks: the diffusion transformer, the video VAE, the text encoder and the image encoder."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section

Attention = Literal[
    "auto", "sdpa", "flash", "cudnn", "math", "varlen", "flash2", "flash3", "flash4", "gemm"
]


class ModelConfig(Section):
    num_layers: int = Field(6, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(3, ge=1)
    """Attention heads; the model width is num_heads * head_dim."""
    head_dim: int = Field(64, ge=8)
    """Width of one head: even, and 128 where speed on GPUs matters."""
    ffn_dim: int = Field(768, ge=1)
    """Inner width of the feed-forward layers."""
    in_channels: int = Field(16, ge=1)
    """Latent channels; as many as the VAE has."""
    out_channels: int = Field(0, ge=0)
    """Channels of the predicted velocity; 0: `model.in_channels`. It is smaller where given latents and their mask are
    input channels too."""
    text_dim: int = Field(128, ge=1)
    """Width of the caption embeddings; that of the text encoder."""
    freq_dim: int = Field(256, ge=2)
    """Width of the sinusoid that encodes the noise level; even."""
    patch_size: Annotated[tuple[int, int, int], Field(strict=False)] = (1, 2, 2)
    """Latent frames, rows and columns in one token. The first is 1: every latent frame has its own noise level."""
    qk_norm: bool = True
    """RMS-normalise queries and keys over the full width (Wan's form)."""
    eps: float = Field(1e-6, gt=0)
    """Epsilon of all norms."""
    rope_max_length: int = Field(1024, ge=1)
    """Most latent frames, rows or columns of tokens; a longer clip is refused. The open Wan weights have 1024."""
    attention: Attention = "auto"
    """Attention kernel: PyTorch's `sdpa`, or one of its kernels (`flash`, `cudnn`, `math`, `varlen`); a package of
    flash-attention (`flash2`, `flash3`, `flash4`); on CPUs, a backward pass of matrix products (`gemm`). `auto`: flash4
    on a GPU that has it; for bfloat16 on a CPU the fastest of those that it has, measured when the run begins; else
    sdpa. A kernel that is not available is an error."""
    compile: Literal["auto", "off", "dynamic", "static"] = "auto"
    """torch.compile of every block: `dynamic` compiles once for all clip sizes, `static` once for each size; `auto`:
    dynamic on a GPU, off on a CPU."""
    float8: Literal["off", "rowwise"] = "off"
    """Matrix products of the blocks in float8 with one scale a row, by torchao, for GPUs of compute capability 8.9 or
    more; the rest stays in `parallel.param_dtype`, which is bfloat16 then."""
    mask_channel: bool = False
    """Add `mask_proj`, which tells the model which latent frames are given (image to video, extension, ...)."""
    fps_embed: bool = False
    """Add `fps_proj`, which tells the model the clip's frame rate."""
    expert: Literal["", "high", "low", "both"] = ""
    """Which of two experts is trained, each on its side of `model.boundary` (Wan 2.2's A14B models): that of `high`
    noise, that of `low` noise, or `both`, by turns of a step. Empty: one transformer computes all noise levels."""
    boundary: float = 0.875
    """Noise level, after the shift, at which two experts meet; it is the high-noise expert's itself (Wan 2.2 T2V-A14B:
    0.875, I2V-A14B: 0.9)."""
    image_dim: int = Field(0, ge=0)
    """Width of the embeddings of a clip's first frame, to which all tokens attend beside the caption (1280 in Wan 2.1's
    image-to-video models, from `image.path`); 0: the model sees none."""
    image_tokens: int = Field(257, ge=1)
    """Embeddings of one image."""
    image_pair: bool = False
    """Embed the last frame of a clip too, with learned positions of both (Wan 2.1's first-last-frame model)."""

    @property
    def dim(self) -> int:
        """Model width D."""
        return self.num_heads * self.head_dim

    @property
    def velocity_channels(self) -> int:
        """Latent channels of the prediction."""
        return self.out_channels or self.in_channels

    @property
    def images(self) -> int:
        """Frames of a clip whose embeddings the model is given."""
        return (2 if self.image_pair else 1) if self.image_dim else 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim is {self.head_dim}; rotary positions need an even width"
            )
        if not 0 < self.boundary < 1:
            raise ValueError(
                f"model.boundary is {self.boundary:g}; it is the noise level at which two experts meet, so it must lie "
                "between 0 and 1"
            )
        if self.freq_dim % 2:
            raise ValueError(
                f"model.freq_dim is {self.freq_dim}; it holds sine and cosine pairs, so make it "
                "even"
            )
        if self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ValueError(
                f"model.patch_size is {list(self.patch_size)}; the first number must be 1 and the "
                "others at least 1"
            )
        return self


class ImageConfig(Section):
    path: str = ""
    """The frozen encoder of `model.image_dim`: a folder of a CLIPVisionModel that transformers wrote, with its
    preprocessor_config.json in it or beside it in `image_processor`; a pipeline's folder; or a hub id such as
    Wan-AI/Wan2.1-I2V-14B-480P-Diffusers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the image encoder; its embeddings are float32 either way."""


class VaeConfig(Section):
    path: str = ""
    """A folder in the diffusers layout (config.json and safetensors), of AutoencoderKLWan,
    AutoencoderKLHunyuanVideo or AutoencoderKLCogVideoX, or a hub id such as
    Wan-AI/Wan2.1-T2V-1.3B-Diffusers; `shipped:NAME` takes weights inside the package; empty: random
    weights of the sizes in `vae.arch`."""
    arch: dict[str, Any] = {}
    """Arguments of diffusers' AutoencoderKLWan, used when `vae.path` is empty."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen VAE; its latents are float32 either way."""
    tile: int = Field(0, ge=0)
    """Side in pixels of the tiles in which frames are encoded and decoded, to save memory; a multiple of the spatial
    factor; 0: whole frames. AutoencoderKLWan is exact in tiles, the other classes blend their edges."""

    @model_validator(mode="after")
    def _one_source(self) -> "VaeConfig":
        if self.path and self.arch:
            raise ValueError(
                f"vae.path ({self.path}) and vae.arch are both given; a stored VAE brings its own "
                "sizes, so drop vae.arch"
            )
        return self


class TextConfig(Section):
    kind: Literal["umt5_bytes", "umt5", "t5", "clip"] = "umt5_bytes"
    """`umt5_bytes`: a small UMT5 encoder that reads UTF-8 bytes and needs no vocabulary file. `umt5`, `t5`, `clip`:
    published encoders, from `text.path`."""
    path: str = ""
    """Where a published encoder is: a folder that transformers wrote, with the tokenizer in it or beside it in
    `tokenizer`; a pipeline's folder; or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of a published encoder."""
    d_model: int = Field(128, ge=8)
    """Width of the caption embeddings."""
    num_layers: int = Field(2, ge=1)
    """Encoder layers."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    d_kv: int = Field(32, ge=1)
    """Width of one head."""
    d_ff: int = Field(256, ge=1)
    """Inner width of the feed-forward layers."""
    max_length: int = Field(128, ge=16)
    """Longest caption with its end mark, in bytes, or in tokens for a published encoder. Longer captions are cut and
    counted (`train/captions_cut`). A multiple of 16, except for `clip`, whose own limit is 77."""
    padding: Literal["wan", "masked"] = "masked"
    """`masked`: the model sees the caption's own tokens only. `wan`: it also attends to zeros up to `text.max_length`,
    as the open Wan weights were trained."""
    trainable: bool = True
    """Train the encoder with the transformer, as part of the model; false: it is frozen, and its embeddings can be
    cached."""

    @model_validator(mode="after")
    def _kind_fits(self) -> "TextConfig":
        stored = self.kind != "umt5_bytes"
        if stored and not self.path:
            raise ValueError(
                f"text.kind={self.kind} is a published encoder and text.path is empty; give its folder"
            )
        if self.path and not stored:
            raise ValueError(
                f"text.path is {self.path}, but text.kind=umt5_bytes is made from its sizes; choose "
                "umt5, t5 or clip"
            )
        if stored and self.trainable:
            raise ValueError(
                f"text.kind={self.kind} is used as it was published; set text.trainable=false"
            )
        if self.max_length % 16 and self.kind != "clip":
            raise ValueError(f"text.max_length is {self.max_length}; it must be a multiple of 16")
        return self

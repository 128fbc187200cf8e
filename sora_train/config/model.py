"""The three networks: the diffusion transformer, the video VAE and the text encoder."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sora_train.config.base import Section


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
    """Latent channels: must be those of the VAE."""
    text_dim: int = Field(128, ge=1)
    """Width of the caption embeddings: must be that of the text encoder."""
    freq_dim: int = Field(256, ge=2)
    """Width of the sinusoid that encodes the noise level; even."""
    patch_size: Annotated[tuple[int, int, int], Field(strict=False)] = (1, 2, 2)
    """Latent frames, rows and columns folded into one token. The first is 1: every latent frame has
    its own noise level."""
    qk_norm: bool = True
    """RMS-normalise queries and keys over the full width (Wan's form)."""
    eps: float = Field(1e-6, gt=0)
    """Epsilon of all norms."""
    attention: Literal["auto", "sdpa", "gemm"] = "auto"
    """Softmax core: PyTorch's fused `sdpa`, plain matrix products (`gemm`), or `auto` (gemm for
    bfloat16 on CPU, else sdpa)."""
    mask_channel: bool = False
    """Add `mask_proj`: tells the model which latent frames are given (image to video, extension,
    ...)."""
    fps_embed: bool = False
    """Add `fps_proj`: tells the model the clip's frame rate."""

    @property
    def dim(self) -> int:
        """Model width D."""
        return self.num_heads * self.head_dim

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim is {self.head_dim}; rotary positions need an even width"
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


class VaeConfig(Section):
    path: str = ""
    """A folder in the diffusers layout (config.json and safetensors); `shipped:NAME` takes weights
    inside the package;
    empty: random weights of the sizes in `vae.arch`."""
    arch: dict[str, Any] = {}
    """Arguments of diffusers' AutoencoderKLWan, used when `vae.path` is empty."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the frozen VAE computes; latents are float32 either way."""

    @model_validator(mode="after")
    def _one_source(self) -> "VaeConfig":
        if self.path and self.arch:
            raise ValueError(
                f"vae.path ({self.path}) and vae.arch are both given; a stored VAE brings its own "
                "sizes, so drop vae.arch"
            )
        return self


class TextConfig(Section):
    kind: Literal["umt5_bytes"] = "umt5_bytes"
    """A UMT5 encoder that reads UTF-8 bytes, so it needs no vocabulary file."""
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
    max_length: int = Field(128, ge=16, multiple_of=16)
    """Longest caption in bytes, its end mark included; longer ones are cut, counted and logged."""
    padding: Literal["wan", "masked"] = "masked"
    """`masked`: the model sees the caption's own tokens only. `wan`: it also attends to zeros up to
    max_length, as open Wan weights were trained."""
    trainable: bool = True
    """Train the encoder along with the transformer, as part of the model; false keeps it frozen and
    cacheable."""

"""The optimizer with its learning rate schedule, and the averages of the weights."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import FloatList


class OptimConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """`sgd` (without momentum) is for parity tests, since AdamW hides a wrong scale of gradients."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    text_lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate of a trainable text encoder."""
    lr_scales: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Factors on the learning rate by shell pattern of whole parameter names, as in
    'optim.lr_scales={transformer.blocks.*.attn2.*: 0.5}'; those of several patterns that a name matches are multiplied.
    LoRA+ (arXiv:2402.12354) is {*.lora_B.*: 16}. 0 is refused: to leave weights as they are, train an adapter."""
    betas: FloatList = (0.9, 0.99)
    """AdamW's decay of the first and the second moment."""
    eps: float = Field(1e-10, gt=0)
    """AdamW's epsilon. It is small because QK-norm and zero-initialised layers make gradients small."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay; it applies to matrices only, not to norms, biases and modulation tables."""
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate rises linearly from zero."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after warm-up; it ends at `optim.final_lr_fraction` of the peak."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of the run, as a share of the peak."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping."""


class EmaConfig(Section):
    decay: float = Field(0.999, ge=0, lt=1)
    """Decay per step of the average of the weights; early steps take min(decay, (1 + step) / (10 + step))."""
    more: FloatList = ()
    """Decays of further averages, each of which takes the memory of the weights. [0.99, 0.9999] are `ema_99` and
    `ema_9999` in checkpoints; `sora sample --ema 0.99` samples from one."""
    post_hoc: FloatList = ()
    """Widths sigma_rel of power-function averages, usually [0.05, 0.10]. After training, `sora ckpt average RUN
    --sigma-rel 0.12` makes the average of any other width from their snapshots (arXiv:2312.02696)."""
    snapshot_every: int = Field(0, ge=0)
    """Steps between snapshots of the `ema.post_hoc` averages; 0: as often as checkpoints. All snapshots are kept."""
    snapshot_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the snapshots."""

    @model_validator(mode="after")
    def _averages_differ(self) -> "EmaConfig":
        bad = [value for value in self.more if not 0 <= value < 1]
        if bad:
            raise ValueError(
                f"ema.more holds {bad[0]:g}; a decay is from 0 to below 1, such as 0.9999"
            )
        bad = [value for value in self.post_hoc if not 0.001 <= value <= 0.288]
        if bad:
            raise ValueError(
                f"ema.post_hoc holds {bad[0]:g}; a sigma_rel is from 0.001 to 0.288, such as 0.05"
            )
        for key, values in (("more", self.more), ("post_hoc", self.post_hoc)):
            if len(set(values)) < len(values):
                raise ValueError(f"ema.{key}={list(values)} holds a value twice; give each once")
        if self.decay in self.more:
            raise ValueError(
                f"ema.more holds {self.decay:g}, which is ema.decay and kept already; leave it out"
            )
        return self

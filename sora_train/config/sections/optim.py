"""The optimizer with its learning rate schedule, and the averages of the weights."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import FloatList


class OptimConfig(Section):
    name: Literal["adamw", "muon", "schedule_free", "sgd"] = "adamw"
    """`muon` equalises the singular values of each matrix's update and leaves the rest to AdamW; `schedule_free` is
    AdamW whose average of the weights replaces the decay of the learning rate; docs/optimizers.md says when. `sgd`
    (without momentum) is for parity tests, since AdamW hides a wrong scale of gradients."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    text_lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate of a trainable text encoder."""
    lr_scales: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Factors on the learning rate by shell pattern of whole parameter names, as in
    'optim.lr_scales={transformer.blocks.*.attn2.*: 0.5}'; those of several patterns that a name matches are multiplied.
    LoRA+ (arXiv:2402.12354) is {*.lora_B.*: 16}. 0 is refused: to leave weights as they are, train an adapter."""
    betas: FloatList = (0.9, 0.99)
    """AdamW's decay of the first and the second moment. Of `schedule_free` the first is how near its weights stay to
    their average."""
    state: Literal["float32", "int8", "fp8"] = "float32"
    """Precision of AdamW's moments of matrices: `int8` and `fp8` are a byte each with a scale for 256 of them. For full
    fine-tunes: an adapter's matrices are small, and those of fewer than 4,096 values stay in float32."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's momentum, for its matrices."""
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

    @model_validator(mode="after")
    def _fits(self) -> "OptimConfig":
        if self.state != "float32" and self.name != "adamw":
            raise ValueError(
                f"optim.state={self.state} is AdamW's, and optim.name={self.name}; set optim.state=float32, or "
                "optim.name=adamw"
            )
        if self.name == "schedule_free" and self.decay != "constant":
            raise ValueError(
                f"optim.decay={self.decay} and optim.name=schedule_free, whose average stands for a decay; set "
                "optim.decay=constant"
            )
        if self.name == "schedule_free" and not self.betas[0] > 0:
            raise ValueError(
                f"optim.betas={list(self.betas)} and optim.name=schedule_free, whose average is told from its weights "
                "by the first of them; set it above 0, usually 0.9"
            )
        return self


class EmaConfig(Section):
    decay: float = Field(0.999, ge=0, lt=1)
    """Decay per step of the average of the weights; early steps take min(decay, (1 + step) / (10 + step)). With
    optim.name=schedule_free this average is the optimizer's own, whatever the decay."""
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

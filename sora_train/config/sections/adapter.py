"""An adapter: a few low-rank matrices that are trained beside a frozen base."""

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import StrList


class AdapterConfig(Section):
    rank: int = Field(0, ge=0)
    """Rank of the adapter's matrices (LoRA, arXiv:2106.09685), often 8 to 64; 0: no adapter, the whole model is
    trained. The frozen base is the model of `init.run`."""
    alpha: float = Field(0.0, ge=0)
    """The adapter's product is multiplied by alpha / rank; 0: alpha is the rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732), so that a large rank learns as fast as a small
    one."""
    dora: bool = False
    """Train the length of each weight's rows apart from their direction (DoRA, arXiv:2402.09353): a little better at
    small ranks, and slower."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the channels that come into the adapter and are left out, drawn for each clip and each layer, and the
    same for all tokens of the clip."""
    targets: StrList = ("attention",)
    """Which linear layers get an adapter: `attention`, `attention+mlp`, `all_linear` (those, the caption's embedding
    and the last layer), or patterns of names in the transformer, such as `blocks.*.attn1.to_[qkv]`."""
    init: str = ""
    """An adapter to begin with: the folder of an adapter's run, FOLDER@STEP, or a .safetensors file."""
    trigger: str = ""
    """A word that captions call the new thing by. It is written into exported files, and a run whose captions all lack
    it is refused."""

    @property
    def on(self) -> bool:
        """Whether an adapter is trained."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """The factor of the adapter's product."""
        alpha = self.alpha or self.rank
        return alpha / self.rank**0.5 if self.rslora else alpha / self.rank

    @model_validator(mode="after")
    def _needs_a_rank(self) -> "AdapterConfig":
        asked = [name for name in self.model_fields_set - {"rank"} if getattr(self, name)]
        changed = [
            name for name in asked if getattr(self, name) != type(self).model_fields[name].default
        ]
        if not self.rank and changed:
            raise ValueError(
                f"adapter.{sorted(changed)[0]}={getattr(self, sorted(changed)[0])!r} and adapter.rank=0, which trains "
                "the whole model; set adapter.rank, such as 16"
            )
        return self

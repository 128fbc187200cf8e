"""The memory section: how a run with a frozen base fits the card that is there."""

from typing import Literal

from pydantic import Field, field_validator

from sora_train.config.sections.base import Section


class MemoryConfig(Section):
    base: Literal["compute", "fp8", "int8", "nf4"] = "compute"
    """How a run with an adapter keeps the matrices of its frozen blocks. `compute`: in the precision in which they
    multiply; `fp8` (e4m3) and `int8`: a byte a weight and one scale an output channel; `nf4`: half a byte and one scale
    for 64 weights. A layer widens its own when it computes; all other weights stay in the compute precision."""
    swap_blocks: int = Field(0, ge=0)
    """Blocks whose frozen matrices live in the host's memory, in a run with an adapter on one rank. They are copied to
    the device ahead of a block's forward and backward pass, so that two of them are there at a time; 0: none."""
    fit: Literal["as_set", "auto"] = "as_set"
    """`auto`: a run with an adapter takes the fastest options that `sora plan` finds to fit the card that is there, in
    the place of `memory.base`, `memory.swap_blocks` and the memory options of `parallel`, and prints them."""
    encode_first: bool = False
    """With `data.cache=latents`: embed all captions too before step 1, then move the VAE and the frozen text encoder to
    the host's memory before the transformer is placed. Samples bring them back for as long as they are made."""

    @field_validator("swap_blocks")
    @classmethod
    def _more_than_two(cls, swap_blocks: int) -> int:
        if swap_blocks in (1, 2):
            raise ValueError(
                f"memory.swap_blocks={swap_blocks} saves nothing, since two swapped blocks are on the device at a "
                "time; set 3 or more, or 0"
            )
        return swap_blocks

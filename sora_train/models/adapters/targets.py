"""Which linear layers of the transformer get an adapter.

The names are lists of our own: what peft calls "all-linear" would take the layers of the noise level too, which
compute in float32 on purpose.
"""

import fnmatch
from collections.abc import Sequence

from torch import nn

from sora_train.errors import ConfigError
from sora_train.models.transformer.layers import Linear

ATTENTION = (
    "blocks.*.attn[12].to_[qkv]",
    "blocks.*.attn[12].to_out.0",
    "blocks.*.attn2.add_[kv]_proj",
)
MLP = ("blocks.*.ffn.net.0.proj", "blocks.*.ffn.net.2")
ENDS = ("condition_embedder.text_embedder.linear_[12]", "proj_out")

PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": ATTENTION + MLP,
    "all_linear": ATTENTION + MLP + ENDS,
}


def target_modules(transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that `adapter.targets` means, in the model's order.

    Raises:
        ConfigError: there are no targets, or one of them matches nothing; it lists what can be matched.
    """
    linear = [name for name, layer in transformer.named_modules() if isinstance(layer, Linear)]
    if not targets:
        raise ConfigError(
            f"adapter.targets is empty, so nothing would be trained; choose among {', '.join(PRESETS)}"
        )
    chosen: set[str] = set()
    for target in targets:
        patterns = PRESETS.get(target, (target,))
        found = {name for pattern in patterns for name in fnmatch.filter(linear, pattern)}
        if not found:
            raise ConfigError(
                f"adapter.targets holds {target!r}, which is none of {', '.join(PRESETS)} and matches no linear layer; "
                f"their names are {', '.join(kinds_of(linear))}"
            )
        chosen |= found
    return [name for name in linear if name in chosen]


def kinds_of(names: Sequence[str]) -> list[str]:
    """Names with the number of the block left open, each once."""
    open_names = (
        ".".join(["blocks", "*", *name.split(".")[2:]]) if name.startswith("blocks.") else name
        for name in names
    )
    return list(dict.fromkeys(open_names))

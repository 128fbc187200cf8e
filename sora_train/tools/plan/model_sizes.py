"""The shipped models side by side: parameters and operations a token, from the sizes alone."""

from collections.abc import Sequence
from pathlib import Path

from sora_train.config.compose import compose
from sora_train.config.sections.model import ModelConfig
from sora_train.config.yaml_files import find_configs
from sora_train.models.flops import training_flops
from sora_train.models.memory import transformer_parameters

LENGTHS = (1_024, 8_192, 32_768, 75_600)
"""Tokens of a clip for which operations are listed; the last is 81 frames of 1280x720 in Wan. Latent frames count as
one: each further one adds less than a millionth."""
CAPTION = 512
"""Caption tokens attended to, as in open Wan weights."""
COLUMNS = (
    "model", "parameters", "blocks", "width", "heads", "feed-forward", "channels",
    *(f"GFLOP a token at {length:,}" for length in LENGTHS),
)  # fmt: skip


def short_count(number: float) -> str:
    """1234567 as `1.2 M`: two digits at least."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            value = number / unit
            return f"{value:.1f} {letter}" if value < 10 else f"{value:.0f} {letter}"
    return f"{number:.0f}"


def option_names(config_dir: Path | None) -> list[str]:
    """Options of the config group `model`, shipped ones and those of `config_dir`."""
    folders = [find_configs(), *([config_dir] if config_dir else [])]
    return sorted({path.stem for folder in folders for path in (folder / "model").glob("*.yaml")})


def rows(
    overrides: Sequence[str], config_dir: Path | None = None
) -> list[tuple[int, tuple[str, ...]]]:
    """(parameters, the columns) of every option of the group `model`, smallest first; `overrides` apply to all.

    Raises:
        ConfigError: an override is wrong.
    """
    sizes = []
    for name in option_names(config_dir):
        cfg: ModelConfig = compose(
            [f"model={name}", *overrides], config_dir=config_dir
        ).config.model
        count, _ = transformer_parameters(cfg)
        channels, velocity = cfg.in_channels, cfg.velocity_channels
        cells = (
            name,
            short_count(count),
            str(cfg.num_layers),
            str(cfg.dim),
            f"{cfg.num_heads} x {cfg.head_dim}",
            str(cfg.ffn_dim),
            str(channels) if channels == velocity else f"{channels} -> {velocity}",
            *(
                f"{training_flops(cfg, None, length, 1, CAPTION) / length / 1e9:.3g}"
                for length in LENGTHS
            ),
        )
        sizes.append((count, cells))
    return sorted(sizes)

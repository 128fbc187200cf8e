"""sora_train: trains Sora-style text-to-video diffusion transformers from raw clips to served videos."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sora_train.config import Config
    from sora_train.sampling.api import load
    from sora_train.training.recipe import Recipe
    from sora_train.training.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["Config", "Recipe", "Trainer", "__version__", "load"]

_HOMES = {
    "Config": "sora_train.config",
    "Recipe": "sora_train.training.recipe",
    "Trainer": "sora_train.training.trainer",
    "load": "sora_train.sampling.api",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `sora --help` and the decode processes never pay for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sora_train' has no attribute {name!r}")


class _MovedModules:
    """Says where a module of an earlier version is now; the last finder, so only an import that fails gets here."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.startswith("sora_train."):
            from sora_train.base.moved_modules import refuse_moved

            refuse_moved(name)


sys.meta_path.append(_MovedModules)

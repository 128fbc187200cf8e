"""A folder of safetensors as diffusers writes it: one file, or several and an index.

At most one file is open: that of the tensor asked for, and the one before is closed first.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sora_train.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class StoredWeights:
    """The tensors of a folder by name, read when they are asked for.

    Attributes:
        shapes: of every tensor, those of one file next to each other.
    """

    def __init__(self, folder: Path):
        """Raises UserError when a file is missing or damaged."""
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: tuple[Path, Any] | None = None
        for path in _files(folder):
            handle = self._handle(path)
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                self.files[name] = path
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
        self.close()

    def read(self, name: str) -> Tensor:
        """One tensor as it lies in its file, in the file's own memory: copy it to keep it."""
        tensor: Tensor = self._handle(self.files[name]).get_tensor(name)
        return tensor

    def close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def _handle(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self.close()
            try:
                self._open = (path, safe_open(path, framework="pt").__enter__())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}); copy it again") from error
        return self._open[1]


def _files(folder: Path) -> list[Path]:
    """The files of weights, by the index where there is one."""
    index = folder / INDEX
    if not index.is_file():
        names = [WEIGHTS]
        if not (folder / WEIGHTS).is_file():
            _require_other_form(folder)
    else:
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of weights ({error}); copy it again") from error
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; copy the folder again")
    return [folder / name for name in names]


def _require_other_form(folder: Path) -> None:
    """Raises UserError where the folder holds weights, but in a form that is not read."""
    others = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    variants = sorted(
        path.name
        for path in folder.glob(f"{WEIGHTS.removesuffix('.safetensors')}*.safetensors")
        if path.name != WEIGHTS
    )
    if variants:
        raise UserError(
            f"{folder} holds {variants[0]} and no {WEIGHTS}: it is a variant, or a part without its index; fetch the "
            "weights without a variant (`hf download REPO`), or rename a single file that is whole"
        )
    if others:
        raise UserError(
            f"{folder} holds {others[0]} and no {WEIGHTS}: a pickle, which could run code when it is read; save the "
            "weights as safetensors (`model.save_pretrained(FOLDER)` of a diffusers version of today does)"
        )

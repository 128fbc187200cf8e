"""Models of a hub (`owner/name`): which files a run takes of them, and the cache where those lie.

`sora fetch` fills the cache where there is a network; a job that is offline reads it alone.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.config import Config
from sora_train.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BESIDE = {"text_encoder": ("tokenizer",), "image_encoder": ("image_processor",)}
"""Parts of a pipeline that go with another."""
CONFIG = "config.json"
ROOT_FILES = (".json", ".safetensors", ".model", ".txt")
"""Endings of what is taken from a repository that is one model, not a pipeline of several in folders."""


@dataclass(frozen=True)
class Named:
    """Weights that a configuration names."""

    key: str
    path: str
    part: str
    """The folder that holds them where `path` is a pipeline."""

    @property
    def is_of_hub(self) -> bool:
        """A folder that is here comes first: `runs/vae` reads as a hub's name too."""
        return not Path(self.path).expanduser().exists() and bool(HUB_ID.fullmatch(self.path))


@dataclass(frozen=True)
class File:
    """A file of the hub that a run takes."""

    name: str
    size: int
    is_here: bool


def weights_named(cfg: Config) -> list[Named]:
    """Weights of the frozen models, in the order of the configuration; those inside the package are left out."""
    weights = [
        Named("vae.path", cfg.vae.path, "vae"),
        Named("text.path", cfg.text.path, "text_encoder"),
        Named("image.path", cfg.image.path, "image_encoder"),
    ]
    return [named for named in weights if named.path and not named.path.startswith("shipped:")]


def absent(named: Named) -> str:
    """What is missing of a model of the hub in the cache, or an empty string."""
    if not named.is_of_hub:
        return ""
    folder = cached(named)
    if folder is None:
        return f"its {named.part} is not in the cache of the hub"
    place = folder / named.part if (folder / named.part / CONFIG).is_file() else folder
    lost = [name for name in weight_files(place) if not (place / name).is_file()]
    return f"{lost[0]} of it is not in the cache of the hub" if lost else ""


def weight_files(place: Path) -> list[str]:
    """The files of weights that must be in a folder, one at least."""
    indices = sorted(place.glob("*.safetensors.index.json"))
    if indices:
        return sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    files = sorted(path.name for path in place.glob("*.safetensors"))
    return files or ["*.safetensors"]


def cached(named: Named) -> Path | None:
    """The model's folder in the hub's cache, None where this part of it was never fetched."""
    from huggingface_hub import try_to_load_from_cache

    for name in (f"{named.part}/{CONFIG}", CONFIG):
        file = try_to_load_from_cache(named.path, name)
        if isinstance(file, str):
            return Path(file).parents[name.count("/")]
    return None


def listed(named: Named) -> list[File]:
    """The files that a run takes, asked of the hub. Raises as `plain_errors`."""
    from huggingface_hub import HfApi, snapshot_download

    with plain_errors():
        # Its error names the reason; that of the listing does not.
        HfApi().model_info(named.path, timeout=10)
        answer: Any = snapshot_download(named.path, dry_run=True, etag_timeout=10)
    files = [File(info.filename, info.file_size, not info.will_download) for info in answer]
    folders = (f"{named.part}/", *(f"{other}/" for other in BESIDE.get(named.part, ())))
    inside = [file for file in files if file.name.startswith(folders)]
    if any(file.name.startswith(folders[0]) for file in inside):
        return without_copies(inside)
    return without_copies([file for file in files if "/" not in file.name])


def without_copies(files: list[File]) -> list[File]:
    """Without pictures, read-mes, and a second copy of the weights in another format."""
    return [file for file in files if file.name.endswith(ROOT_FILES)]


def fetch(named: Named, files: list[File]) -> Path:
    """Download them into the cache; returns the model's folder there. Raises as `plain_errors`."""
    from huggingface_hub import snapshot_download

    names = [file.name for file in files]
    with plain_errors():
        return Path(snapshot_download(named.path, allow_patterns=names, etag_timeout=10))


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors of the hub (HfHubHTTPError), OSError and ValueError pass; those of the HTTP library below, which is
    another in each generation of the hub's package, become ConnectionError."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, OSError, ValueError):
        raise
    except Exception as error:
        raise ConnectionError(str(error)) from error


def weights_folder(key: str, path: str, part: str) -> Path:
    """The folder that holds a model's config.json, or `path` itself where there is none.

    Args:
        key: the config's name of `path`, for errors.
        path: a folder, a folder whose sub-folder `part` is meant, or `owner/name` on the hub, of
            which `part` is fetched.

    Raises:
        UserError: no such folder, and the hub cannot be reached or has no such model.
    """
    folder = Path(path).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(path):
        folder = _fetched(key, path, part)
    if not (folder / "config.json").is_file() and (folder / part / "config.json").is_file():
        return folder / part
    return folder


def _fetched(key: str, name: str, part: str) -> Path:
    """The hub's files of one part of a model, in the hub's own cache."""
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    named = Named(key, name, part)
    folder = cached(named)
    if folder is not None and not absent(named):
        return folder
    sentence = f"{key}={name} is no folder here, and as a model of the hub"
    if is_offline_mode():
        raise UserError(
            f"{sentence} it must be in the cache while HF_HUB_OFFLINE is set, and {absent(named)}; run `sora fetch` "
            "with the run's arguments where there is a network, or give a folder"
        )
    try:
        files = listed(named)
        return fetch(named, files)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{sentence} it cannot be had ({reason}); run `sora fetch` where there is a network, or give a folder"
        ) from error

"""Where weights lie: a folder given by path, a part of a pipeline's folder, or a model of the hub."""

import re
from pathlib import Path

from sora_train.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
    if not folder.exists() and _HUB_ID.fullmatch(path):
        folder = _fetched(key, path, part)
    if not (folder / "config.json").is_file() and (folder / part / "config.json").is_file():
        return folder / part
    return folder


def _fetched(key: str, name: str, part: str) -> Path:
    """The hub's files of one part of a model, in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"{part}/*", "tokenizer/*"] if part == "text_encoder" else [f"{part}/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=10))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}={name} is no folder here, and as a model of the hub it cannot be had "
            f"({reason}); fetch it where there is a network and give the folder"
        ) from error

"""Where weights lie: a folder given by path, a part of a pipeline's folder, or a model of the hub."""

from pathlib import Path

from sora_train.errors import UserError
from sora_train.models import hub


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
    if not folder.exists() and hub.HUB_ID.fullmatch(path):
        folder = _fetched(key, path, part)
    if not (folder / "config.json").is_file() and (folder / part / "config.json").is_file():
        return folder / part
    return folder


def _fetched(key: str, name: str, part: str) -> Path:
    """The hub's files of one part of a model, in the hub's own cache."""
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    named = hub.Named(key, name, part)
    folder = hub.cached(named)
    if folder is not None and not hub.absent(named):
        return folder
    told = f"{key}={name} is no folder here, and as a model of the hub"
    if is_offline_mode():
        raise UserError(
            f"{told} it must be in the cache while HF_HUB_OFFLINE is set, and {hub.absent(named)}; run `sora fetch` "
            "with the run's arguments where there is a network, or give a folder"
        )
    try:
        files = hub.listed(named)
        return hub.fetch(named, files)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{told} it cannot be had ({reason}); run `sora fetch` where there is a network, or give a folder"
        ) from error

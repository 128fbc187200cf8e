"""A text file that is whole or not there."""

from pathlib import Path

from sora_train.errors import Fault


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Raises:
        Fault: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Fault(
            f"cannot write {path}: {error.strerror}; free space or choose another run.dir"
        ) from error

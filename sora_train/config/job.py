"""A job's configuration, composed and checked once, and read by every rank from one file.

The file's name carries a digest of its bytes: whoever reads another text under that name is told. A run of
stages has the configuration of each in it, so that nothing is composed again on the nodes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sora_train.base.files import write_atomically
from sora_train.config import Config
from sora_train.config.compose import load_yaml
from sora_train.config.messages import validated
from sora_train.errors import Fault

FOLDER = "launch"
"""Where frozen configurations lie in a run folder."""
DIGITS = 16


@dataclass(frozen=True)
class Frozen:
    """A run, and its stages if it has any."""

    config: Config
    stages: tuple[Config, ...] = ()


def freeze(frozen: Frozen) -> Path:
    """Write it into the run folder; the same configuration is the same file.

    Raises OSError where the folder cannot be written.
    """
    values: dict[str, Any] = {"config": frozen.config.model_dump(mode="json")}
    if frozen.stages:
        values["stages"] = [stage.model_dump(mode="json") for stage in frozen.stages]
    text = yaml.safe_dump(values, sort_keys=False)
    folder = Path(frozen.config.run.dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"config-{digest(text)}.yaml"
    write_atomically(path, text)
    return path


def thaw(path: Path, config_cls: type[Config] = Config) -> Frozen:
    """What `freeze` has written.

    Raises:
        Fault: the file is not there, or is not what its name says.
        ConfigError: this code takes another configuration than the one that froze it.
    """
    values = held(path)
    stages = tuple(validated(config_cls, stage) for stage in values.get("stages", []))
    return Frozen(validated(config_cls, values["config"]), stages)


def held(path: Path) -> dict[str, Any]:
    """The plain values of a frozen configuration, for whoever does not know its class. Raises Fault as `thaw`."""
    try:
        text = path.read_text()
    except OSError as error:
        raise Fault(
            f"the frozen configuration {path} cannot be read on this node: {error.strerror}; run.dir must lie on "
            "storage that all nodes see"
        ) from error
    expected = path.stem.removeprefix("config-")
    if digest(text) != expected:
        raise Fault(
            f"{path} has the digest {digest(text)}, and its name says {expected}: it was edited, or this node sees "
            "another file; launch the job again"
        )
    return load_yaml(path)


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=DIGITS // 2).hexdigest()

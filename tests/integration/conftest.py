"""The tiny experiment's clips, rendered once, and shards of latents made of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sora_train.monitoring.metrics import is_clocked

TINY = "experiment=parity_tiny"
FROZEN = "text.trainable=false"


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The clips as overrides that name them as sources."""
    from sora_train.config.compose import compose
    from sora_train.data.index.sources import open_sources

    folder = tmp_path_factory.mktemp("clips")
    found = open_sources(compose([TINY, f"run.dir={folder}"]).config, folder)
    return f"data.source={found.train.root}", f"data.val_source={found.val.root}"


@pytest.fixture(scope="session")
def encoded(clips: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of these clips: moments of the latents, and embeddings."""
    from sora_train.tools.data.command import encode_source

    folder = tmp_path_factory.mktemp("encoded")
    arguments = [TINY, f"run.dir={folder / 'run'}", FROZEN, clips[1], "data.latents=sample"]
    given = [*arguments, f"output={folder / 'out'}", clips[0].removeprefix("data.")]
    printed = encode_source(given, None)
    assert "24 clips = 24 usable + 0 dropped" in printed
    assert f"data.source={folder / 'out' / 'train'}" in printed
    return folder / "out"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, float]]]:
    """`trained(*overrides)`: the metrics of three steps of the tiny experiment, the same overrides trained once."""
    from sora_train.config.compose import compose
    from sora_train.training.trainer import Trainer

    known: dict[tuple[str, ...], list[dict[str, float]]] = {}

    def run(*overrides: str) -> list[dict[str, float]]:
        if overrides not in known:
            folder = tmp_path_factory.mktemp("run")
            trainer = Trainer(compose([TINY, f"run.dir={folder}", *overrides]).config)
            rows = [trainer.train_step() for _ in range(3)]
            rows[-1] |= trainer.validate()
            trainer.close()
            known[overrides] = [
                {key: value for key, value in row.items() if not is_clocked(key)} for row in rows
            ]
        return known[overrides]

    return run

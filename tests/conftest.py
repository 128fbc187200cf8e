"""What the tests share: a config of seconds, and the folder of real clips."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Idle OpenMP threads that spin take the cores from the decode processes beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def parity_config(tmp_path: Path) -> Callable:
    """`parity_config("optim.lr=1", ...)`: the parity_tiny experiment in a run folder of its own."""
    from sora_train.config.compose import compose

    def make(*overrides: str, name: str = "run"):
        return compose(["experiment=parity_tiny", f"run.dir={tmp_path / name}", *overrides]).config

    return make


@pytest.fixture(scope="session")
def real_videos() -> Path:
    folder = os.environ.get("SORA_TEST_VIDEOS")
    if not folder:
        pytest.skip("SORA_TEST_VIDEOS names no folder of real clips")
    return Path(folder)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of parity_tiny after its two steps, with a sample; copy it before changing it."""
    from sora_train.config.compose import compose
    from sora_train.trainer import Trainer

    folder = tmp_path_factory.mktemp("finished") / "run"
    steps = ["train.steps=2", "checkpoint.every=1", "validation.every=1", "sample.every=2"]
    Trainer(compose(["experiment=parity_tiny", f"run.dir={folder}", *steps]).config).train()
    return folder

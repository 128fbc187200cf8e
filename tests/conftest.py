"""What the tests share: a config of seconds, and the folder of real clips."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from sora_train.data.manifest import Manifest

# Idle OpenMP threads that spin take the cores from the decode processes beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A law holds on a busy machine too; what hangs is ended by pytest's own limit.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


@pytest.fixture(scope="session", autouse=True)
def shapes_are_rendered_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of this process that ask for the same rendered clips get copies: equal arguments give equal files."""
    from sora_train.data.index import sources as training_sources

    render, made = training_sources.prepare_shapes, tmp_path_factory.mktemp("shapes")

    def copied(dir: Path | str, **wanted: Any) -> "Manifest":
        source = render(made, **wanted).root
        if not (Path(dir) / source.name).exists():
            shutil.copytree(source, Path(dir) / source.name)
        return render(dir, **wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_sources, "prepare_shapes", copied)
        yield


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
    from sora_train.training.trainer import Trainer

    folder = tmp_path_factory.mktemp("finished") / "run"
    steps = ["train.steps=2", "checkpoint.every=1", "validation.every=1", "sample.every=2"]
    Trainer(compose(["experiment=parity_tiny", f"run.dir={folder}", *steps]).config).train()
    return folder

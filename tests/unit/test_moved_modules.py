"""A script of an earlier version is told, in one sentence, where what it imports is now."""

import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from sora_train import cli, objectives
from sora_train.base.moved_modules import MOVED, RENAMED_NAMES, MovedModuleError
from sora_train.errors import UserError

OLD = {
    "import sora_train.trainer": "sora_train.training.trainer",
    "import sora_train.api as api": "sora_train.sampling.api",
    "from sora_train import metrics": "sora_train.monitoring.metrics",
    "from sora_train.training_data import TrainingData": "sora_train.training.pipeline.data",
    "from sora_train.operations import Request": "SampleRequest",
    "from sora_train.sampling import sample_clips": "sora_train.sampling.pipeline",
    "from sora_train.models.vae import VideoVAE": "sora_train.models.vae.autoencoder",
    "from sora_train.objectives import Told": "SampleInfo",
    "from sora_train.shapes.world import Prompt": "sora_train.data.shapes",
    "import importlib; importlib.import_module('sora_train.data.plan')": "sora_train.data.tape.tape",
}


@pytest.mark.parametrize("statement", OLD)
def test_every_form_of_an_old_import_names_the_new_module(statement: str):
    with pytest.raises(MovedModuleError, match=OLD[statement].replace(".", r"\.")) as failure:
        exec(statement, {})
    assert isinstance(failure.value, ImportError) and isinstance(failure.value, UserError)


def test_every_new_name_is_there_and_no_old_one():
    for old, new in MOVED.items():
        assert find_spec(f"sora_train.{new}") is not None, new
        if not (Path(cli.REPOSITORY) / "sora_train" / Path(*old.split("."))).is_dir():
            with pytest.raises(MovedModuleError):
                find_spec(f"sora_train.{old}")


def test_a_renamed_name_is_an_absent_attribute_with_the_new_name_in_its_error():
    assert not hasattr(objectives, "Told") and not hasattr(objectives, "nothing")
    with pytest.raises(AttributeError, match="SampleInfo") as failure:
        _ = objectives.Told
    assert isinstance(failure.value, UserError)
    assert all(hasattr(objectives, new) for new in RENAMED_NAMES.values())


def test_other_imports_fail_as_ever():
    with pytest.raises(ModuleNotFoundError, match="sora_train.nothing"):
        importlib.import_module("sora_train.nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from sora_train.errors import nothing", {})
    # Nothing of it is loaded by those who need it not.
    code = "import sys, sora_train.config; sys.exit('sora_train.base.moved_modules' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sora_train_tells_it_to_the_owner_of_an_old_script(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text("from sora_train.trainer import Trainer\n")
    command = [sys.executable, "-m", "sora_train", "train", str(script), "train.steps=1"]
    done = subprocess.run(command, cwd=cli.REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "sora_train.training.trainer" in done.stderr
    assert len(done.stderr.splitlines()) == 1

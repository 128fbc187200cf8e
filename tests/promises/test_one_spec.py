"""Promise 4: schedule, prediction, latent normalisation and guidance are one object, stored in the checkpoint and used
by loss and sampler alike; nothing has defaults of its own."""

import dataclasses
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from sentences import refuses

import sora_train
from sora_train.config import Config
from sora_train.config.messages import validated
from sora_train.config.yaml_files import load_yaml
from sora_train.diffusion import flow, sampler
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.sampling import pipeline as sampling


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def rewrite_state(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change state.json of the newest checkpoint, and the manifest so that it is still whole."""
    folder = run / "checkpoints" / "step-000002"
    state = json.loads((folder / "state.json").read_text())
    change(state)
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def edit_config(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_sampler_follows_the_checkpoint_and_not_the_config(run: Path) -> None:
    before = sora_train.load(run)
    clip = before.sample(["red circle"], seed=5)[0]
    other = {
        "num_steps": 7,
        "guidance_scale": 1.0,
        "shift": 5.0,
        "solver": "heun",
        "time_law": "uniform",
    }
    edit_config(run, lambda config: config["objective"].update(other))
    after = sora_train.load(run)
    assert after.cfg.objective.num_steps == 7, "the edit reached the config"
    assert after.spec == before.spec and after.spec.num_steps == 2
    assert np.array_equal(after.sample(["red circle"], seed=5)[0], clip)


def test_each_sampler_key_of_the_spec_reaches_the_pixels(run: Path) -> None:
    """The comparison above could not fail if the sampler ignored its spec."""
    model = sora_train.load(run)
    clip = model.sample(["red circle"], seed=5)[0]
    changes: list[dict[str, Any]] = [{"num_steps": 5}, {"shift": 5.0}, {"solver": "heun"}]
    for change in changes:
        spec = model.spec.replace(**change)
        model.spec, kept = spec, model.spec
        assert not np.array_equal(model.sample(["red circle"], seed=5)[0], clip), change
        model.spec = kept


def test_training_and_load_sample_the_same_pixels(run: Path) -> None:
    """The clip written at the end of training is the one `load` makes of the checkpoint beside it."""
    folder = run / "samples" / "step-000002"
    note = json.loads((folder / "prompts.json").read_text())[0]
    model = sora_train.load(run)
    clips = model.sample([note["prompt"]], seed=note["seed"])
    again = model.save(clips, [note["prompt"]], run / "again", seed=note["seed"])[0]
    found = []
    for path in (folder / note["file"], again):
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            found.append(np.stack(frames))
    assert np.array_equal(*found)


def test_the_spec_says_what_the_config_said_when_training_began(run: Path) -> None:
    spec, objective = (
        sora_train.load(run).spec,
        validated(Config, load_yaml(run / "config.yaml")).objective,
    )
    shared = set(type(objective).model_fields) & {field.name for field in dataclasses.fields(spec)}
    assert {"shift", "time_law", "num_steps", "guidance_scale", "caption_dropout"} <= shared
    for name in shared - {"conditioning"}:
        assert getattr(spec, name) == getattr(objective, name), name
    assert spec.conditioning == objective.mix
    assert dict(spec.conditioning)["i2v"] == objective.conditioning.i2v


def test_unknown_and_missing_keys_of_the_spec_are_errors(run: Path) -> None:
    rewrite_state(run, lambda state: state["spec"].update(sigma_min=0.002))
    with refuses(UserError, "unknown", "sigma_min"):
        sora_train.load(run)
    rewrite_state(run, lambda state: [state["spec"].pop("sigma_min"), state["spec"].pop("shift")])
    with pytest.raises(UserError, match=r"missing keys \['shift'\]"):
        sora_train.load(run)


def test_another_vae_is_refused(run: Path, tmp_path: Path) -> None:
    """Even one whose weights are the same and whose latents are normalised otherwise."""
    vae = VideoVAE.from_config(validated(Config, load_yaml(run / "config.yaml")).vae)
    vae.save(tmp_path / "same")
    edit_config(run, lambda config: config["vae"].update(path=str(tmp_path / "same"), arch={}))
    assert vae.digest() == sora_train.load(run).spec.vae_digest
    vae.set_latent_stats([0.5] * vae.channels, [1.0] * vae.channels)
    vae.save(tmp_path / "other")
    edit_config(run, lambda config: config["vae"].update(path=str(tmp_path / "other")))
    with refuses(UserError, "another VAE", "vae.path", "restore"):
        sora_train.load(run)


def test_neither_loss_nor_sampler_has_a_schedule_of_its_own() -> None:
    assert all(
        field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for field in dataclasses.fields(DiffusionSpec)
    )
    scheduled = {"spec", "steps", "num_steps", "shift", "solver", "guidance_scale", "prediction"}
    for module in (sampler, flow, sampling):
        functions = [f for _, f in inspect.getmembers(module, inspect.isfunction)]
        for function in functions:
            for parameter in inspect.signature(function).parameters.values():
                if parameter.name in scheduled:
                    assert parameter.default is parameter.empty, (function.__name__, parameter)

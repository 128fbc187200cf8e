"""What a checkpoint says beside its tensors: strict both ways, and the format before is read as it was meant."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses

from sora_train.checkpoint.meta import CheckpointMeta, TrainState, read_meta
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.sampling.api import checkpoint_info

FORMAT_1 = Path(__file__).parent / "data" / "state_format_1.json"
"""The state.json of step 3 of `experiment=parity_tiny`, as the version of commit b5ed9c2 wrote it."""

counts = st.integers(0, 2**40)
states = st.builds(
    TrainState,
    step=counts,
    data_step=counts,
    samples_seen=counts,
    pending=st.lists(st.sampled_from(["validate", "log", "snapshot", "save", "sample"])),
    row=st.dictionaries(st.text(), st.floats(allow_nan=False)),
)


def meta_of(train: TrainState) -> CheckpointMeta:
    return CheckpointMeta(train, "text_to_video", {"seed": 3}, {"version": 2})


@given(states)
def test_what_was_written_is_read(train: TrainState):
    meta = meta_of(train)
    assert CheckpointMeta.from_dict(json.loads(json.dumps(meta.to_dict()))) == meta


@pytest.mark.parametrize("key", sorted(set(meta_of(TrainState()).to_dict()) - {"format"}))
def test_every_key_is_needed(key: str):
    values = meta_of(TrainState()).to_dict()
    del values[key]
    with pytest.raises(UserError, match=rf"here/state\.json holds no {key}\b.*init\.run"):
        CheckpointMeta.from_dict(values, "here/state.json")


def test_a_key_that_nobody_knows_is_refused():
    values = meta_of(TrainState()).to_dict() | {"colour": "red"}
    with pytest.raises(UserError, match="holds colour"):
        CheckpointMeta.from_dict(values)


def test_a_format_of_the_future_is_refused():
    values = meta_of(TrainState()).to_dict() | {"format": 99}
    with pytest.raises(UserError, match="format 99.*update sora_train"):
        CheckpointMeta.from_dict(values)


def test_the_format_before_is_read_under_todays_names():
    old = json.loads(FORMAT_1.read_text())
    meta = CheckpointMeta.from_dict(old)
    train = meta.train
    assert (train.step, train.data_step, train.samples_seen) == (3, 3, 20)
    assert train.spikes == old["judge"] and train.row == old["row"] and train.pending == []
    assert meta.snapshots == old["stocks"] and meta.plan == old["plan"]
    assert "loss_health" not in meta.config and "spike_detection" in meta.config
    assert CheckpointMeta.from_dict(meta.to_dict()) == meta


def test_what_was_pending_keeps_its_order_under_todays_names():
    old = json.loads(FORMAT_1.read_text())
    old["owed"] = ["validation", "row", "snapshot", "save", "samples"]
    pending = CheckpointMeta.from_dict(old).train.pending
    assert pending == ["validate", "log", "snapshot", "save", "sample"]


def test_imported_weights_of_the_format_before_have_no_training_to_go_on_with():
    old = json.loads(FORMAT_1.read_text())
    kept = ("task", "config", "spec", "sample_shape", "manifest_digest", "stocks", "quarantine")
    imported = {key: old[key] for key in kept} | {
        "step": 0,
        "samples_seen": 0,
        "dropped": 0,
        "imported_from": "Wan2.1",
        "averaged": {"factors": [0.5, 0.5]},
    }
    meta = CheckpointMeta.from_dict(imported)
    assert meta.imported_from == "Wan2.1" and meta.train == replace(TrainState(), pending=[])
    assert meta.notes == {"averaged": {"factors": [0.5, 0.5]}}


def test_a_checkpoint_that_training_cannot_go_on_from_can_be_sampled_from(tmp_path: Path):
    """Sampling reads three keys of state.json, under any format that has them."""
    old = json.loads(FORMAT_1.read_text())
    folder = tmp_path / "checkpoints" / "step-000003"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text('{"files": {}}')
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old["config"]))
    kept = {key: old[key] for key in ("task", "spec", "sample_shape")}
    (folder / "state.json").write_text(json.dumps(kept))
    info = checkpoint_info(tmp_path)
    assert info.spec == DiffusionSpec.from_dict(old["spec"]) and info.checkpoint.step == 3
    assert info.shape.frames == old["sample_shape"]["frames"]
    with refuses(UserError, "state.json", "init.run"):
        read_meta(info.checkpoint)
    for key in kept:
        (folder / "state.json").write_text(json.dumps({k: v for k, v in kept.items() if k != key}))
        with refuses(UserError, "state.json", key):
            checkpoint_info(tmp_path)

"""Promise 3: kill it anywhere; the resumed run is bit for bit the uninterrupted one."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentences import refuses, says

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.meta import read_meta
from sora_train.config import Config, resumption
from sora_train.config.compose import compose
from sora_train.config.schema import keys
from sora_train.data.sample import Failure
from sora_train.errors import ConfigError, Fault, Preempted, UserError
from sora_train.monitoring.metrics import is_clocked, read_metrics
from sora_train.parallel.shards import full
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.training.resilience import resume
from sora_train.training.trainer import Trainer

ADAMW = ("optim=adamw", "optim.warmup_steps=2", "optim.decay=linear")


@pytest.fixture
def again(parity_config: Callable, finished_run: Path, tmp_path: Path) -> Callable:
    """A config in a copy of a run that has trained two steps."""
    begun = ("checkpoint.every=1", "validation.every=1", "sample.every=2")

    def make(*overrides: str, name: str = "run"):
        if not (tmp_path / name).exists():
            shutil.copytree(finished_run, tmp_path / name)
            if name != "run":
                shutil.rmtree(tmp_path / name / "checkpoints")
        return parity_config(*begun, *overrides, name=name)

    return make


class Killed(Exception):
    """Stands for the end of a process, at a step of our choice."""


class DyingTrainer(Trainer):
    dies_after = 4

    def callbacks(self):
        def die(trainer: Trainer, row: dict[str, float]) -> None:
            if trainer.step == self.dies_after:
                raise Killed

        return [die]


def rows(run_dir: Path) -> list[dict[str, float]]:
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not is_clocked(key)} for row in found]


def tensors(cfg) -> dict[str, torch.Tensor]:
    trainer = Trainer(cfg)
    copies = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in
              trainer.parts.tensors().items()}  # fmt: skip
    copies = {name: tensor.clone() for name, tensor in copies.items()}
    trainer.close()
    return copies


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory):
    """Metrics and tensors of the uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    cfg = compose(["experiment=parity_tiny", f"run.dir={run_dir}", *ADAMW]).config
    Trainer(cfg).train()
    return rows(run_dir), tensors(cfg)


@pytest.mark.parametrize("dies_after", [3, 4])
def test_resumed_run_is_the_straight_run(
    straight, parity_config: Callable, dies_after: int
) -> None:
    """Killed right after a checkpoint (step 3) and one step behind it."""
    broken = parity_config(*ADAMW, name="broken")
    DyingTrainer.dies_after = dies_after
    with pytest.raises(Killed):
        DyingTrainer(broken).train()
    Trainer(broken).train()

    expected_rows, expected = straight
    assert rows(Path(broken.run.dir)) == expected_rows
    found = tensors(broken)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class LeavingTrainer(Trainer):
    """One that has to leave while it does what a step asked for."""

    leaves_in: str

    def leave(self, action: str) -> None:
        if self.step == 3 and self.leaves_in == action:
            self.leaves_in = ""
            raise Preempted("SIGTERM")

    def validate(self) -> dict[str, float]:
        self.leave("validate")
        return super().validate()

    def log(self) -> None:
        self.leave("log")
        super().log()
        self.leave("logged")

    def save(self) -> None:
        self.leave("save")
        super().save()


@pytest.mark.parametrize(
    ("action", "pending"),
    [
        pytest.param("validate", ["validate", "log"], marks=pytest.mark.slow),
        pytest.param("log", ["log"], marks=pytest.mark.slow),
        ("logged", ["log"]),
        ("save", []),
    ],
)
def test_what_a_step_still_asks_for_is_done_after_a_resume(
    straight, parity_config: Callable, action: str, pending: list[str]
) -> None:
    """Step 3 asks for a validation, its row and a checkpoint; the run leaves before each of them is done, and where
    the row is written and not yet struck off."""
    broken = parity_config(*ADAMW, name="left")
    LeavingTrainer.leaves_in = action
    with pytest.raises(Preempted):
        LeavingTrainer(broken).train()
    found = checkpoints.find(Path(broken.run.dir))
    assert found.step == 3 and read_meta(found).train.pending == pending
    Trainer(broken).train()
    expected_rows, expected = straight
    assert rows(Path(broken.run.dir)) == expected_rows
    assert all(torch.equal(value, expected[name]) for name, value in tensors(broken).items())


@pytest.mark.parametrize(
    "optimizer",
    [
        ("optim.name=muon",),
        ("optim.name=schedule_free", "optim.decay=constant"),
        ("optim.state=int8",),
    ],
    ids=str,
)
def test_other_optimizers_go_on_as_if_never_stopped(
    parity_config: Callable, optimizer: tuple[str, ...]
) -> None:
    """Killed one step behind a checkpoint; the average of schedule-free is its own, told from its state."""
    one, other = (parity_config(*ADAMW, *optimizer, name=name) for name in ("one", "other"))
    Trainer(one).train()
    DyingTrainer.dies_after = 4
    with pytest.raises(Killed):
        DyingTrainer(other).train()
    Trainer(other).train()
    assert rows(Path(one.run.dir)) == rows(Path(other.run.dir))
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name, ahead in found.items():
        if name.endswith(".ahead"):
            parameter = name.removeprefix("optim.").removesuffix(".ahead")
            average = found[f"model.{parameter}"] - ahead * (1 - 0.9) / 0.9
            torch.testing.assert_close(found[f"ema.{parameter}"], average, rtol=1e-6, atol=1e-7)


def test_everything_that_trains_is_in_the_checkpoint(parity_config: Callable) -> None:
    cfg = parity_config(*ADAMW, "train.steps=1")
    Trainer(cfg).train()
    found = checkpoints.find(Path(cfg.run.dir))
    stored = {name.split(".")[0] for name in tensors(cfg)}
    assert stored == {"model", "optim", "ema"}
    state = found.state()
    assert (
        state["step"] == 1
        and state["samples_seen"] > 0
        and state["spec"]["prediction"] == "velocity"
    )


def test_the_quarantine_is_in_the_checkpoint(parity_config: Callable) -> None:
    cfg = parity_config("train.steps=2", "data.max_drop_fraction=0.1")
    trainer = Trainer(cfg)
    trainer.data.loader.quarantine.add(0, Failure(1, "decode_timeout", "no answer"), key="k")
    trainer.save()
    trainer.close()
    file = trainer.folder.path / "quarantine.jsonl"
    written = file.read_bytes()
    file.unlink()
    again = Trainer(cfg)
    assert again.data.loader.quarantine.counts() == {"decode_timeout": 1}
    assert file.read_bytes() == written
    again.close()


def test_a_torn_save_is_never_chosen(parity_config: Callable) -> None:
    cfg = parity_config(*ADAMW)
    Trainer(cfg).train()
    folder = Path(cfg.run.dir) / "checkpoints"
    newest = checkpoints.list_checkpoints(folder)[-1]
    assert newest.step == 6
    (newest.path / "MANIFEST.json").unlink()
    assert [found.step for found in checkpoints.list_checkpoints(folder)] == [3]
    before = checkpoints.list_checkpoints(folder)[-1]
    with (before.path / "state.json").open("a") as file:
        file.write(" ")
    assert checkpoints.list_checkpoints(folder) == []


def test_checkpoint_of_another_model_is_refused(parity_config: Callable) -> None:
    """At its config, before that of the folder is written over; and at the tensors, where the config does not tell."""
    cfg = parity_config("train.steps=1")
    Trainer(cfg).train()
    written = (Path(cfg.run.dir) / "config.yaml").read_bytes()
    with refuses(ConfigError, "model.num_layers", "2", "3"):
        Trainer(parity_config("train.steps=1", "model.num_layers=3"))
    assert (Path(cfg.run.dir) / "config.yaml").read_bytes() == written
    found = checkpoints.find(Path(cfg.run.dir))
    state = found.state()
    state["config"]["model"]["num_layers"] = 3
    rewritten(found.path, "state.json", json.dumps(state).encode())
    with refuses(UserError, "another model"):
        Trainer(parity_config("train.steps=1", "model.num_layers=3"))


def rewritten(checkpoint: Path, name: str, data: bytes) -> None:
    """Put other bytes into a checkpoint, its manifest made to agree."""
    (checkpoint / name).write_bytes(data)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest").write_text("step-999999")
    newest = tmp_path / "checkpoints" / "step-000002"
    shards = sorted(newest.glob("*.distcp"))[0]
    data = shards.read_bytes()
    match damage:
        case "truncated":
            shards.write_bytes(data[:-1])
        case "flipped":
            shards.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        case "deleted":
            shards.unlink()
        case "manifest":
            (newest / "MANIFEST.json").write_text("{")
    control = ControlPlane(World(0, 1, 0, 1, torch.device("cpu")))
    found = resume.choose(tmp_path / "checkpoints", control)
    assert found is not None and found.step == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "passed over: " in said and "step-000002" in said


def test_what_changed_since_takes_effect_and_is_written_down(
    finished_run: Path, again: Callable
) -> None:
    cfg = again("train.steps=3", "optim.lr=0.5", "sample.every=7", "data.num_workers=2")
    Trainer(cfg).train()
    run_dir = Path(cfg.run.dir)
    lines = [json.loads(line) for line in (run_dir / "changes.jsonl").read_text().splitlines()]
    assert {(row["step"], row["key"], row["is"]) for row in lines} == {
        (2, "train.steps", 3), (2, "optim.lr", 0.5)
    }  # fmt: skip
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["train/lr"] == 0.5


def test_draws_of_an_earlier_generator_are_told_of(
    again: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints that do not say which one they were trained by had torch's; the probe's noise was its own too."""
    cfg = again("train.steps=3")
    found = checkpoints.find(Path(cfg.run.dir))
    state = found.state()
    assert state["versions"].pop("draws") == "pcg64"
    state["probe"]["loss"] *= 2
    rewritten(found.path, "state.json", json.dumps(state).encode())
    Trainer(cfg).train()
    says(capsys.readouterr().out, "changed from step 2 on", "draws", "mt19937", "pcg64")
    lines = (Path(cfg.run.dir) / "changes.jsonl").read_text().splitlines()
    assert {"step": 2, "key": "draws", "was": "mt19937", "is": "pcg64"} in map(json.loads, lines)
    assert checkpoints.find(Path(cfg.run.dir)).state()["versions"]["draws"] == "pcg64"


def test_every_key_has_a_class_of_its_own() -> None:
    unknown = [key for key in keys(Config) if resumption.resume_class(key) is None]
    assert unknown == []
    for named in resumption.CLASSES:
        inside = [
            key
            for key in keys(Config)
            if key == named or key.startswith((f"{named}.", f"{named}[]"))
        ]
        assert inside, f"{named} names no key"


def test_a_fork_is_the_run_it_came_from(
    finished_run: Path, again: Callable, parity_config: Callable
) -> None:
    """Its third step is that of the run itself."""
    straight = again("train.steps=3")
    Trainer(straight).train()
    begun = ("train.steps=3", "checkpoint.every=1", "validation.every=1", "sample.every=0")
    forked = parity_config(*begun, f"resume.run={straight.run.dir}@2", name="fork")
    Trainer(forked).train()
    assert rows(Path(forked.run.dir)) == rows(Path(straight.run.dir))
    expected, found = tensors(straight), tensors(forked)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((Path(forked.run.dir) / "run.json").read_text())["forked_from"].endswith("@2")
    with refuses(UserError, "forked", "@2"):
        Trainer(parity_config(*begun, f"resume.run={straight.run.dir}@1", name="fork"))
    with refuses(UserError, "step 9", "2, 3"):
        Trainer(parity_config(*begun, f"resume.run={straight.run.dir}@9", name="other"))


def test_weights_that_are_not_those_that_were_saved_are_noticed(again: Callable) -> None:
    """Files as their digests say, and yet another model: here the note of its probe was changed."""
    cfg = again("train.steps=3")
    found = checkpoints.find(Path(cfg.run.dir))
    state = found.state()
    state["probe"]["loss"] *= 1 + 1e-7
    rewritten(found.path, "state.json", json.dumps(state).encode())
    with refuses(Fault, "probe", "weights", "VAE"):
        Trainer(cfg)
    # Where the layout is another, so may be the last digits.
    state["probe"]["ranks"] = 2
    rewritten(found.path, "state.json", json.dumps(state).encode())
    Trainer(cfg).close()
    state["probe"]["loss"] *= 1.1
    rewritten(found.path, "state.json", json.dumps(state).encode())
    with refuses(Fault, "ranks"):
        Trainer(cfg)


def test_a_state_without_one_of_its_items_is_refused(again: Callable) -> None:
    cfg = again("train.steps=3")
    found = checkpoints.find(Path(cfg.run.dir))
    state = found.state()
    del state["data_step"]
    rewritten(found.path, "state.json", json.dumps(state).encode())
    with refuses(UserError, "state.json", "data_step", "init.run"):
        Trainer(cfg)


def test_a_checkpoint_of_the_format_before_is_gone_on_from(
    straight, parity_config: Callable
) -> None:
    """The run ends with the numbers and the weights of one that never stopped."""
    broken = parity_config(*ADAMW, name="format 1")
    DyingTrainer.dies_after = 5
    with pytest.raises(Killed):
        DyingTrainer(broken).train()
    found = checkpoints.find(Path(broken.run.dir))
    rewritten(found.path, "state.json", json.dumps(as_format_1(found.state())).encode())
    Trainer(broken).train()
    expected_rows, expected = straight
    assert rows(Path(broken.run.dir)) == expected_rows
    assert all(torch.equal(value, expected[name]) for name, value in tensors(broken).items())


def as_format_1(state: dict) -> dict:
    """What the same checkpoint said before formats were numbered."""
    state = {key: value for key, value in state.items() if key not in ("format", "notes")}
    assert not state.pop("imported_from")
    names = {"validate": "validation", "log": "row", "sample": "samples"}
    state["owed"] = [names.get(action, action) for action in state.pop("pending")]
    state |= {"judge": state.pop("spikes"), "stocks": state.pop("snapshots")}
    state["config"]["loss_health"] = state["config"].pop("spike_detection")
    return state


def test_another_vae_or_text_encoder_is_refused(again: Callable) -> None:
    """Its path may be the same."""
    cfg = again("train.steps=3")
    found = checkpoints.find(Path(cfg.run.dir))
    state = found.state()
    state["spec"]["vae_digest"] = "0" * 16
    rewritten(found.path, "state.json", json.dumps(state).encode())
    with refuses(ConfigError, "spec.vae_digest", "another diffusion spec"):
        Trainer(cfg)


def test_tensors_may_be_missing_only_where_that_is_allowed(again: Callable, monkeypatch) -> None:
    cfg = again("train.steps=3")
    with refuses(ConfigError, "resume.allow_missing", "emma.*", "no tensor"):
        Trainer(again("train.steps=3", "resume.allow_missing=[emma.*]"))
    written = checkpoints.canonical
    monkeypatch.setattr(
        checkpoints, "canonical", lambda model, optimizer, ema: written(model, optimizer, {})
    )
    trainer = Trainer(again("train.steps=3", "checkpoint.resume=never", name="bare"))
    begun = {name: full(value).clone() for name, value in trainer.engine.model_state().items()}
    trainer.train_step()
    trainer.state.step = 2
    trainer.save()
    trainer.close()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"tensors missing \(ema\."):
        Trainer(again("train.steps=3", name="bare"))
    trainer = Trainer(again("train.steps=3", "resume.allow_missing=[ema.*]", name="bare"))
    weights = {name: full(value) for name, value in trainer.engine.model_state().items()}
    assert any(not torch.equal(value, begun[name]) for name, value in weights.items())
    for name, value in weights.items():
        assert torch.equal(full(trainer.ema.shadow[name]), value), name
    trainer.close()
    assert cfg.resume.allow_missing == ()


def test_a_changed_source_is_refused(parity_config: Callable) -> None:
    cfg = parity_config("train.steps=1")
    Trainer(cfg).train()
    with pytest.raises(UserError, match="manifest changed"):
        Trainer(parity_config("train.steps=2", "data.shapes_clips=20"))


def test_a_live_run_folder_is_locked(parity_config: Callable) -> None:
    cfg = parity_config("train.steps=1")
    trainer = Trainer(cfg)
    with refuses(UserError, "in use"):
        Trainer(cfg)
    trainer.close()


@pytest.mark.parametrize("rehearse", [True, False])
def test_a_full_disk_leaves_no_checkpoint_behind(
    parity_config: Callable, monkeypatch, rehearse: bool
) -> None:
    """The disk fills while the manifest is written: nothing may lie under the final name."""
    cfg = parity_config("train.steps=1", f"checkpoint.rehearse={rehearse}")

    def no_space(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sora_train.checkpoint.commit.write_synced", no_space)
    with refuses(Exception, "checkpoint", "No space left"):
        Trainer(cfg).train()
    folder = Path(cfg.run.dir) / "checkpoints"
    assert checkpoints.list_checkpoints(folder) == []
    assert not [path for path in folder.iterdir() if not path.name.endswith(".tmp")]


def test_metrics_are_whole_numbers_of_json(parity_config: Callable) -> None:
    cfg = parity_config("train.steps=2")
    Trainer(cfg).train()
    lines = (Path(cfg.run.dir) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    assert [row["step"] for row in parsed] == [1, 2]
    assert all("train/loss" in row for row in parsed)

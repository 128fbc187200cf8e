"""`sora ckpt ls | inspect | verify | diff | average | prune` on runs that were really trained."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentences import refuses, says

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.cli import run
from sora_train.errors import UserError, run_command
from sora_train.monitoring.run_folder import take_lock
from sora_train.tools.checkpoints.diff import difference, tensor_differences
from sora_train.tools.checkpoints.inspect import entries, statistics, superfluous
from sora_train.training.optim.ema_profiles import gamma_of
from sora_train.training.optim.ema_snapshots import remove_after
from sora_train.training.trainer import Trainer


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """A run of two steps with checkpoints of both, to be changed at will."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def tracked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps with a checkpoint of each, which is all weights there were, and snapshots of two averages."""
    from sora_train.config.compose import compose

    folder = tmp_path_factory.mktemp("tracked") / "run"
    overrides = [
        "train.steps=5",
        "checkpoint.every=1",
        "checkpoint.keep_last=9",
        "validation.every=0",
    ]
    overrides += ["ema.more=[0.5]", "ema.post_hoc=[0.05,0.15]", "ema.snapshot_dtype=float32"]
    Trainer(compose(["experiment=parity_tiny", f"run.dir={folder}", *overrides]).config).train()
    return folder


def sora(*arguments: object) -> int:
    return run_command(lambda: run([str(argument) for argument in arguments]))


def stored(run_dir: Path, step: int | None = None) -> StoredTensors:
    return StoredTensors(checkpoints.find(run_dir, step))


def every(source: StoredTensors) -> dict[str, torch.Tensor]:
    return source.read(*source.shapes)


def shard(run_dir: Path, step: int) -> Path:
    return next((run_dir / "checkpoints" / f"step-{step:06d}").glob("*.distcp"))


# --- ls, inspect ---


def test_ls_tells_of_each_checkpoint_and_what_is_wrong_with_it(copied: Path, capsys):
    assert sora("ckpt", "ls", copied) == 0
    told = capsys.readouterr().out
    rows = json.loads((copied / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{rows['val/loss']:.5f}" in told and "complete, the newest" in told
    assert "2 complete" in told and "incomplete" not in told
    with shard(copied, 2).open("ab") as file:
        file.write(b"x")
    (copied / "checkpoints" / "step-000003.tmp").mkdir()
    assert sora("ckpt", "ls", copied) == 0
    told = capsys.readouterr().out
    says(told, "cut off")
    assert "__0_0.distcp has" in told
    assert "1 complete" in told and "2 incomplete" in told


def test_inspect_shows_state_and_tensors(copied: Path, capsys):
    assert sora("ckpt", "inspect", f"{copied}@1") == 0
    told = capsys.readouterr().out
    state = checkpoints.find(copied, 1).state()
    for value in (
        state["spec"]["vae_digest"],
        state["manifest_digest"],
        "optim.lr",
        "text_to_video",
    ):
        assert value in told
    count = sum(name.startswith("model.") for name in stored(copied).shapes)
    assert [line.split()[:2] for line in told.splitlines()[-2:]] == [
        ["model", str(count)],
        ["ema", str(count)],
    ]
    assert sora("ckpt", "inspect", copied, "--tensors", "model.*patch_embedding.bias") == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    tensor = stored(copied).read("model.transformer.patch_embedding.bias").popitem()[1]
    assert f"{tensor.double().mean():.4g}" in told[1]
    assert sora("ckpt", "inspect", copied, "--tensors", "nothing") == 2
    assert "matches no tensor" in capsys.readouterr().err


def test_statistics_are_those_of_the_finite_values(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sora_train.checkpoint.tensors.CHUNK", 7)
    values = torch.linspace(-3, 5, 40).reshape(5, 8)
    expected = values.double()
    found = statistics(values)
    assert found["mean"] == pytest.approx(float(expected.mean()))
    assert found["std"] == pytest.approx(float(expected.std(correction=0)))
    assert (found["min"], found["max"], found["not_finite"]) == (-3, 5, 0)
    holed = torch.cat([values.flatten(), torch.tensor([math.nan, math.inf, -math.inf])])
    assert statistics(holed) == found | {"not_finite": 3}


# --- verify ---


def test_verify_names_the_damaged_file(copied: Path, capsys):
    assert sora("ckpt", "verify", copied) == 0
    says(capsys.readouterr().out, "digests")
    file = shard(copied, 1)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert sora("ckpt", "verify", copied) == 1
    says(capsys.readouterr().err, str(file), "digest")
    assert sora("ckpt", "verify", f"{copied}@2") == 0
    shard(copied, 2).unlink()
    assert sora("ckpt", "verify", f"{copied}@2") == 1
    assert "__0_0.distcp is missing" in capsys.readouterr().err


# --- diff ---


def test_diff_of_two_steps(copied: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    read, sizes = StoredTensors.read, []

    def counted(self: StoredTensors, *names: str) -> dict[str, torch.Tensor]:
        sizes.append(len(names))
        return read(self, *names)

    monkeypatch.setattr(StoredTensors, "read", counted)
    assert sora("ckpt", "diff", f"{copied}@1", copied, "--tensors", "model.", "--limit", 3) == 0
    told = capsys.readouterr().out
    assert set(sizes) == {1}
    ours, theirs = stored(copied, 1), stored(copied, 2)
    rows = tensor_differences(ours, theirs, "model.")
    assert [row.relative for row in rows] == sorted((row.relative for row in rows), reverse=True)
    one, other = (s.read(rows[0].name)[rows[0].name].double() for s in (ours, theirs))
    assert rows[0].relative == pytest.approx(float((one - other).norm() / one.norm()))
    assert rows[0].largest == pytest.approx(float((one - other).abs().max()))
    for row in rows[:3]:
        assert row.name in told and f"{row.relative:.3e}" in told
    assert rows[3].name not in told and "samples_seen" in told
    assert sora("ckpt", "diff", copied, copied) == 0
    told = capsys.readouterr().out
    same = f"{len(stored(copied).shapes)} of them the same bit for bit"
    assert same in told and "samples_seen" not in told


def test_difference_of_values_that_are_not_finite():
    one, other = torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, math.nan, 4.0])
    row = difference("x", one, other)
    assert (row.largest, row.moved) == (2.0, pytest.approx(1 / 3))
    assert difference("x", torch.ones(2), torch.tensor([1.0, math.nan])).largest == math.inf
    assert difference("x", torch.zeros(2), torch.zeros(2)).relative == 0


def test_diff_of_two_models_names_what_only_one_has(copied: Path, tmp_path: Path, capsys):
    other = another_model(copied, tmp_path / "other")
    assert sora("ckpt", "diff", copied, other) == 0
    told = capsys.readouterr().out
    assert f"1 tensors only in {other}: model.extra" in told
    says(told, "patch_embedding.bias", "[64]", "[65]")


def another_model(like: Path, folder: Path) -> Path:
    """A run with one tensor more and one of another shape."""
    shapes = dict(stored(like).shapes)
    shapes |= {"model.extra": (3,), "model.transformer.patch_embedding.bias": (65,)}
    state = checkpoints.find(like).state()
    checkpoints.save_streamed(
        folder / "checkpoints", 2, shapes, lambda name: torch.zeros(shapes[name]), state
    )
    shutil.copy(like / "config.yaml", folder)
    return folder


# --- average ---


def test_the_mean_of_checkpoints_samples_and_starts_a_run(
    copied: Path, tmp_path: Path, parity_config: Callable, capsys, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "mean"
    monkeypatch.setattr("sora_train.tools.checkpoints.averaging.GROUP", 10_000)
    assert sora("ckpt", "average", f"{copied}@1", copied, "--weights", "3,1", "--out", out) == 0
    assert "0.7500 x" in capsys.readouterr().out
    mean, one, other = stored(out), stored(copied, 1), stored(copied, 2)
    assert set(mean.shapes) == {name for name in one.shapes if name.startswith(("model.", "ema."))}
    made, first, second = (every(source) for source in (mean, one, other))
    for name, value in made.items():
        expected = 0.75 * first[name].double() + 0.25 * second[name].double()
        assert torch.equal(value, expected.float()), name
    assert (
        sora("sample", "--ckpt", out, "--prompt", "x", "--steps", 1, "--out", tmp_path / "s") == 0
    )
    assert (tmp_path / "s" / "000.mp4").is_file()
    trainer = Trainer(parity_config(f"init.run={out}", name="next"))
    trainer.close()
    for name, parameter in trainer.engine.model.named_parameters():
        assert torch.equal(parameter, made[f"ema.{name}"])
    with refuses(UserError, "nothing of training"):
        Trainer(parity_config(name="mean"))


def test_averages_that_cannot_be_made(copied: Path, tmp_path: Path, capsys):
    other, out = another_model(copied, tmp_path / "other"), tmp_path / "out"
    for arguments, told in {
        (copied,): "averaging one checkpoint changes nothing",
        (copied, other): "holds another model than",
        (copied, f"{copied}@7"): "has no checkpoint of step 7; it has 1, 2",
        (copied, copied, "--weights", "1"): "--weights has 1 numbers (1) for 2 checkpoints",
        (copied, copied, "--weights", "1,x"): "--weights is '1,x'",
        (copied, "--sigma-rel", 0.1): "has no averages for post-hoc EMA",
        (copied, "--sigma-rel", 0.3): "--sigma-rel 0.3 is no width",
        (copied, copied, "--sigma-rel", 0.1): "give one RUN[@STEP]",
    }.items():
        assert sora("ckpt", "average", *arguments, "--out", out) == 2
        assert told in capsys.readouterr().err
        assert not out.exists()
    assert sora("ckpt", "average", copied, other, "--out", out) == 2
    told = capsys.readouterr().err
    says(told, "model.extra", "patch_embedding.bias", "[64]", "[65]")
    out.mkdir()
    (out / "mine").touch()
    assert sora("ckpt", "average", copied, copied, "--out", out) == 2
    assert "is not empty" in capsys.readouterr().err and [p.name for p in out.iterdir()] == ["mine"]


def test_post_hoc_average_is_the_average_of_all_weights(tracked_run: Path, tmp_path: Path):
    """Against the weights of every step, averaged by the profile's definition in float64 (arXiv:2312.02696, eq. 2)."""
    out, sigma_rel = tmp_path / "wider", 0.12
    assert sora("ckpt", "average", tracked_run, "--sigma-rel", sigma_rel, "--out", out) == 0
    gamma = gamma_of(sigma_rel)
    shares = np.diff(np.arange(6.0) ** (gamma + 1)) / 5 ** (gamma + 1)
    steps = [every(stored(tracked_run, step)) for step in range(1, 6)]
    made, last = every(stored(out)), steps[-1]
    for name in stored(out).names("ema."):
        live = f"model.{name}"
        weights = [one[live].double() for one in steps]
        expected = sum(float(share) * value for share, value in zip(shares, weights, strict=True))
        found = made[f"ema.{name}"].double()
        travelled = max(float((value - weights[0]).abs().max()) for value in weights)
        # float32 averages, in units of the weights; and a hundredth of how far training has moved them.
        bound = 3e-7 * float(weights[0].abs().max()) + 1e-2 * travelled
        assert float((found - expected).abs().max()) <= bound, name
        assert torch.equal(made[live], last[live])


def test_other_averages_are_chosen_by_tag(tracked_run: Path, tmp_path: Path, capsys):
    one = stored(tracked_run)
    assert [one.prefix(tag) for tag in ("ema", "live", "0.5", "5", "ema_5", "0.15", "s15")] == [
        "ema.", "model.", "ema_5.", "ema_5.", "ema_5.", "ema_s15.", "ema_s15.",
    ]  # fmt: skip
    out = ("--prompt", "x", "--steps", 1, "--out", tmp_path / "s")
    assert sora("sample", "--ckpt", tracked_run, "--ema", "0.7", *out) == 2
    says(capsys.readouterr().err, "live, ema, ema_5, ema_s05, ema_s15")
    from sora_train import load

    model = load(tracked_run, weights="0.5").model
    held = every(one)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, held[f"ema_5.{name}"])


def test_a_run_that_goes_back_forgets_later_snapshots(tracked_run: Path, tmp_path: Path):
    shutil.copytree(tracked_run / "ema_snapshots", tmp_path / "snapshots")
    kept = [one.step for one in checkpoints.list_checkpoints(tmp_path / "snapshots")]
    assert kept == [1, 2, 3, 4]
    remove_after(tmp_path / "snapshots", 2)
    assert [one.step for one in checkpoints.list_checkpoints(tmp_path / "snapshots")] == [1, 2]


# --- prune ---


def test_prune_says_what_it_removes_and_removes_it(copied: Path, capsys):
    torn = copied / "checkpoints" / "step-000003.tmp"
    torn.mkdir()
    (torn / "file").write_bytes(b"123")
    assert sora("ckpt", "prune", copied, "--keep-last", 1, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "would remove step-000001" in told and "step-000003.tmp (3 B" in told
    assert len(entries(copied)) == 3
    assert sora("ckpt", "prune", copied, "--keep-last", 1) == 0
    assert "kept: 2" in capsys.readouterr().out
    assert [entry.path.name for entry in entries(copied)] == ["step-000002"]
    assert sora("ckpt", "verify", copied) == 0


def test_prune_keeps_by_step_and_never_removes_the_newest(tracked_run: Path):
    found = entries(tracked_run)
    assert [entry.step for entry in superfluous(found, 1, 0)] == [1, 2, 3, 4]
    assert [entry.step for entry in superfluous(found, 2, 3)] == [1, 2]
    assert superfluous(found, 9, 0) == []
    assert sora("ckpt", "prune", tracked_run, "--keep-last", 0) == 2


def test_prune_refuses_a_live_run(copied: Path, capsys):
    with take_lock(copied):
        assert sora("ckpt", "prune", copied, "--keep-last", 1) == 2
    says(capsys.readouterr().err, "in use")
    assert len(entries(copied)) == 2


def test_prune_without_a_whole_checkpoint_removes_nothing(copied: Path):
    for step in (1, 2):
        shard(copied, step).unlink()
    assert superfluous(entries(copied), 1, 0) == []


# --- bad input ---


@pytest.mark.parametrize(
    "arguments",
    [("ls",), ("inspect",), ("verify",), ("diff", "runs/b"), ("prune", "--keep-last", "1"),
     ("average", "runs/b", "--out", "c")],
)  # fmt: skip
def test_a_folder_that_is_no_run(arguments: tuple[str, ...], tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *rest = arguments
    assert sora("ckpt", name, tmp_path, *rest) == 2
    told = capsys.readouterr().err
    says(told, "sora train")
    assert str(tmp_path) in told


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_a_step_that_is_not_there(name: str, copied: Path, capsys):
    assert sora("ckpt", name, f"{copied}@500") == 2
    says(capsys.readouterr().err, "step 500", "1, 2")

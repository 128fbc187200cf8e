"""`sora replay`: any step of a run again, number for number, and in a sentence where that cannot be."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sentences import refuses, says

from sora_train.cli import run as cli_run
from sora_train.config.compose import compose
from sora_train.config.sections.settings import TraceSettings
from sora_train.errors import UserError
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.run_folder import Part, parts_of
from sora_train.objectives import LossTerm
from sora_train.tools.data.trace import Trace
from sora_train.tools.doctor.replay.replay import ReplayRequest, facts, look, replay
from sora_train.training.resilience.spike_detector import StepVerdict
from sora_train.training.resilience.spike_report import ComputedStep, record_spike
from sora_train.training.trainer import Trainer

TINY = "experiment=parity_tiny"
SHORT = ["sample.every=0", "validation.every=0", "checkpoint.every=1", "checkpoint.keep_last=9"]


def trained(folder: Path, clips: tuple[str, str], *overrides: str) -> Path:
    """A run folder after four steps, a checkpoint each."""
    arguments = [TINY, f"run.dir={folder}", *SHORT, *clips, "train.steps=4", *overrides]
    Trainer(compose(arguments).config).train()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clips: tuple[str, str]) -> Path:
    return trained(tmp_path_factory.mktemp("replayed") / "run", clips)


def losses(run: Path) -> dict[int, float]:
    return {int(row["step"]): row["train/loss"] for row in read_metrics(run / "metrics.jsonl")}


def replayed(run: Path, step: int, out: Path, **options: Any) -> dict[str, Any]:
    replay(ReplayRequest(run, step, out=out, **options))
    return facts(out)


def assert_exact(run: Path, out: Path, *steps: int) -> None:
    for step in steps:
        found = replayed(run, step, out)
        logged = losses(run)[step]
        assert found["checkpoint"] == step - 1 and found["steps_before"] == 0
        assert found["loss"] == pytest.approx(logged, abs=1e-6)
        assert sum(sample["share"] for sample in found["samples"]) == pytest.approx(
            logged, abs=1e-6
        )


def test_a_step_has_its_logged_loss_again(run: Path, tmp_path: Path):
    assert_exact(run, tmp_path, 1, 4)


@pytest.mark.slow
def test_every_other_step_too(run: Path, tmp_path: Path):
    assert_exact(run, tmp_path, 2, 3)


def test_it_shows_the_clips_that_the_tape_names(run: Path, clips: tuple[str, str], tmp_path: Path):
    cfg = compose([TINY, f"run.dir={tmp_path}/trace", *clips]).config
    rows = list(Trace.open(cfg).rows(TraceSettings(steps="1:2")))
    found = replayed(run, 2, tmp_path / "out", loss=False)["samples"]
    assert [sample["row"] for sample in found] == [
        row for entry in rows for row in entry["samples"]
    ]
    assert all(sample["loss"] is None and 0 < sample["t"] < 1 for sample in found)
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.height > 100 * len(found), "one row a clip"


def test_ranks_share_what_one_process_trains(run: Path, tmp_path: Path):
    whole = replayed(run, 3, tmp_path / "all", ranks=2)["samples"]
    assert {sample["rank"] for sample in whole} == {0, 1}
    alone = replayed(run, 3, tmp_path / "one", rank=1, ranks=2)["samples"]
    kept = ("rank", "slot", "row", "epoch", "t", "kind", "prompt")
    mine = [sample for sample in whole if sample["rank"] == 1]
    assert [[s[key] for key in kept] for s in alone] == [[s[key] for key in kept] for s in mine]
    assert [s["loss"] for s in alone] == pytest.approx([s["loss"] for s in mine], abs=1e-6)


def test_ranks_that_shared_their_clips_are_replayed_with_them(run: Path, tmp_path: Path):
    shared = tmp_path / "shared"
    shutil.copytree(run, shared)
    for path in [shared / "config.yaml", *(shared / "configs").glob("*.yaml")]:
        path.write_text(path.read_text().replace("  ring: 1\n", "  ring: 2\n"))
    wholly, halves = (
        [replayed(folder, 3, tmp_path / "out", rank=rank, ranks=of, loss=False)["samples"] for rank in range(of)]
        for folder, of in ((run, 2), (shared, 4))
    )  # fmt: skip
    rows = [[sample["row"] for sample in samples] for samples in halves]
    assert rows[0] == rows[1] == [sample["row"] for sample in wholly[0]]
    assert rows[2] == rows[3] == [sample["row"] for sample in wholly[1]]
    assert {sample["rank"] for samples in halves for sample in samples} == {0, 2}
    with refuses(UserError, "--of 3", "2 ranks", "multiple of 2"):
        replay(ReplayRequest(shared, 3, rank=0, ranks=3))


def test_other_weights_are_said_to_be_other(run: Path, tmp_path: Path):
    said = replay(ReplayRequest(run, 4, out=tmp_path, checkpoint=1))
    found = facts(tmp_path)
    assert found["checkpoint"] == 1 and found["steps_before"] == 2
    assert "checkpoint 1, 2 steps older" in said
    assert abs(found["loss"] - losses(run)[4]) > 1e-5


def test_the_run_is_left_as_it_is(run: Path, clips: tuple[str, str], tmp_path: Path):
    def snapshot() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    before = snapshot()
    # By default the replay lies in the run, also while that is live: its lock is not asked for.
    with (run / "lock").open() as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli_run(["replay", str(run), "--step", "2", "--no-loss"]) == 0
    after = snapshot()
    assert {path: after[path] for path in before} == before
    new = after.keys() - before.keys()
    assert {Path(path).relative_to(run).as_posix() for path in new} == {
        "replay/step-000002/replay.json",
        "replay/step-000002/contact_sheet.png",
    }
    shutil.rmtree(run / "replay")


def test_tokens_that_count_and_stored_latents_too(clips: tuple[str, str], tmp_path: Path):
    mixed = ["loss.reduce=per_token", "objective.conditioning.i2v=0.6", "data.cache=auto"]
    run = trained(tmp_path / "run", clips, "train.steps=1", *mixed)
    assert_exact(run, tmp_path / "out", 1)
    assert (tmp_path / "out" / "contact_sheet.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["objective.conditioning.i2v=0", "objective.conditioning.connect=0.8"], ["task=vae"]],
    ids=["pixels", "vae"],
)
def test_other_objectives_too(overrides: list[str], clips: tuple[str, str], tmp_path: Path):
    run = trained(tmp_path / "run", clips, "train.steps=2", *overrides)
    assert_exact(run, tmp_path / "out", 1, 2)


def test_a_run_that_was_changed_on_the_way_replays_each_part_by_its_own_config(
    clips: tuple[str, str], tmp_path: Path
):
    run = trained(tmp_path / "run", clips, "train.steps=1")
    trained(run, clips, "train.steps=2", "data.micro_batch=2")
    assert [(part.step, part.ranks) for part in parts_of(run)] == [(0, 1), (1, 1)]
    assert_exact(run, tmp_path / "out", 1, 2)


def test_going_back_voids_the_parts_after(tmp_path: Path, parity_config: Callable):
    from sora_train.monitoring.run_folder import RunFolder

    cfg = parity_config()
    folder = RunFolder(cfg, is_main=True)
    folder.record(cfg, 1)
    for step, ranks in ((0, 4), (10, 4), (20, 2), (15, 3)):
        folder.record_part(cfg, step, ranks)
    folder.close()
    again = RunFolder(cfg, is_main=True)
    again.record(cfg, 1)
    again.close()
    assert parts_of(again.path) == [
        Part(0, 4, "configs/step-000000.yaml"),
        Part(10, 4, "configs/step-000000.yaml"),
        Part(15, 3, "configs/step-000000.yaml"),
    ]


def test_clips_that_were_skipped_after_a_roll_back_are_not_shown(run: Path, tmp_path: Path):
    ahead = tmp_path / "run"
    ahead.mkdir()
    shutil.copy(run / "config.yaml", ahead)

    def tape_step(step: int, *logged: int) -> int:
        """That of a run whose steps from 2 on were two further on the tape, and of which these were logged."""
        rows = [{"step": n, "train/data_step": float(n + 2 * (n >= 2))} for n in logged]
        (ahead / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return look(ReplayRequest(ahead, step, loss=False)).tape_step

    assert [tape_step(step, 1, 2, 3, 4) for step in (1, 2, 3, 4)] == [0, 3, 4, 5]
    assert tape_step(3, 1, 2, 4) == 4
    with refuses(UserError, "skipped", "1", "4"):
        tape_step(2, 1, 4)


WRONG = {
    "not reached": ({"step": 9}, "--step 9: .* the steps 1 to 4"),
    "before the first": ({"step": 0}, "--step 0"),
    "no such rank": ({"step": 2, "rank": 1}, "--rank 1: step 2 was trained on 1 rank"),
    "no such rank of others": ({"step": 2, "rank": 4, "ranks": 4}, "--rank 4"),
    "no such checkpoint": ({"step": 2, "checkpoint": 77}, "no checkpoint of step 77"),
    "no such device": ({"step": 2, "device": "cuda"}, "GPU"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_request_is_a_sentence(wrong: str, run: Path, tmp_path: Path):
    import torch

    if wrong == "no such device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options, said = WRONG[wrong]
    with pytest.raises(UserError, match=said):
        replay(ReplayRequest(run, out=tmp_path, **options))


def test_a_run_that_lacks_something_is_told_of(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="config.yaml"):
        replay(ReplayRequest(tmp_path, 1))
    bare = tmp_path / "run"
    shutil.copytree(run, bare)
    for step in (1, 2):
        shutil.rmtree(bare / "checkpoints" / f"step-{step:06d}")
    with refuses(UserError, "removed", "3", "--checkpoint 3"):
        replay(ReplayRequest(bare, 2, out=tmp_path / "out"))
    later = look(ReplayRequest(bare, 2, checkpoint=3)).weights
    assert later is not None and later.step == 3
    assert look(ReplayRequest(bare, 2, checkpoint=0)).weights is None
    assert look(ReplayRequest(bare, 1)).weights is None, "exactly those of step 0"
    known = json.loads((bare / "run.json").read_text())
    (bare / "run.json").write_text(json.dumps({**known, "parts": []}))
    with pytest.raises(UserError, match="add --of RANKS"):
        replay(ReplayRequest(bare, 4, rank=0))
    (bare / "run.json").write_text("{")
    with refuses(UserError, "run.json", "damaged"):
        replay(ReplayRequest(bare, 4))


def test_a_step_of_other_draws_is_not_replayed(run: Path, tmp_path: Path):
    """Its noise cannot be made again: torch's generator drew it for checkpoints that do not say."""
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    state = json.loads((folder / "state.json").read_text())
    del state["versions"]["draws"]
    text = json.dumps(state).encode()
    (folder / "state.json").write_bytes(text)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    digest = hashlib.sha256(text).hexdigest()
    manifest["files"]["state.json"] = {"size": len(text), "sha256": digest}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with refuses(UserError, "--step 3", "mt19937", "pcg64", "the sora_train that trained it"):
        look(ReplayRequest(tmp_path / "run", 3))
    assert look(ReplayRequest(tmp_path / "run", 4)).weights is not None


@pytest.fixture
def moved(run: Path, clips: tuple[str, str], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run, and the only shard of the copy of its clips."""
    source = Path(clips[0].removeprefix("data.source="))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.copytree(source, tmp_path / "clips")
    for path in (copy / "config.yaml", *(copy / "configs").iterdir()):
        path.write_text(path.read_text().replace(str(source), str(tmp_path / "clips")))
    (shard,) = (tmp_path / "clips").glob("*.tar")
    return copy, shard


def test_clips_that_changed_are_told_of(moved: tuple[Path, Path], tmp_path: Path):
    run, shard = moved
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"x264 - core", b"x264 - CORE"))  # still clips
    with refuses(UserError, shard.name, "changed"):
        replay(ReplayRequest(run, 1, out=tmp_path / "out", loss=False))
    shard.write_bytes(bytes(byte ^ 1 for byte in whole))
    with refuses(UserError, shard.name, "unreadable"):
        replay(ReplayRequest(run, 1, out=tmp_path / "out", loss=False))
    assert not (run / "quarantine.jsonl").exists(), "a replay is no part of the run"


def test_a_source_that_is_gone_or_another_is_told_of(
    moved: tuple[Path, Path], clips: tuple[str, str], tmp_path: Path
):
    run, shard = moved
    held_out = Path(clips[1].removeprefix("data.val_source="))
    for name in (shard.name, "manifest.parquet"):
        shutil.copy(held_out / name, shard.with_name(name))
    with refuses(UserError, "data.source", "trained"):
        replay(ReplayRequest(run, 1, out=tmp_path / "out", loss=False))
    shutil.rmtree(shard.parent)
    with pytest.raises(UserError, match="clips"):
        replay(ReplayRequest(run, 1, out=tmp_path / "out", loss=False))


def test_a_live_trainer_draws_what_it_has_at_hand(
    clips: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cfg = compose([TINY, f"run.dir={tmp_path / 'run'}", *SHORT, *clips]).config
    trainer = Trainer(cfg)
    try:
        batches = trainer.data.step(0)
        terms = [trainer.objective.terms(trainer.engine.model, batch) for batch in batches]
        totals = {"velocity": sum(batch.weight for batch in batches)}
        verdict = StepVerdict(9.0, 1.0, 2.0, math.inf, "loss_spike")
        spikes = trainer.folder.path / "spikes"

        def recorded(terms: list[dict[str, LossTerm]]) -> list[dict[str, Any]]:
            state = trainer.state
            computed = ComputedStep(batches, terms, totals)
            record_spike(trainer.run, trainer.parts, state, trainer.spikes, verdict, computed)
            record = json.loads((spikes / f"step-{state.step + 1:06d}.json").read_text())
            assert record["loss"] == 9.0 and record["grad_norm_limit"] == "inf"
            (rank,) = record["ranks"]
            return [clip for batch in rank["micro_batches"] for clip in batch["clips"]]

        clips = recorded(terms)
        loss = sum(float(term["velocity"].sum.detach()) for term in terms) / totals["velocity"]
        assert sum(clip["share"] for clip in clips) == pytest.approx(loss, rel=1e-6)
        assert all(0 <= clip["t"] <= 1 and clip["kind"] and clip["source"] for clip in clips)
        with Image.open(spikes / "step-000001" / "rank-0.png") as image:
            assert np.asarray(image).std() > 10
        # As after a roll-back, and of a loss that is none.
        trainer.state.data_step = 7
        bad = [
            {"velocity": LossTerm(p["velocity"].sum, 1.0, p["velocity"].per_sample / 0)}
            for p in terms
        ]
        assert {clip["loss"] for clip in recorded(bad)} == {"inf"}
        assert (spikes / "step-000001-tape-000008" / "rank-0.png").is_file()
        # What cannot be drawn is recorded all the same.
        trainer.state.step = 7
        (spikes / "step-000008").write_text("in the way")
        assert len(recorded(terms)) == len(clips)
        says(capsys.readouterr().err, "step-000008", "drawn")
    finally:
        trainer.close()

"""The parts a Trainer is made of, each against a slow reference or a law."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses
from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train.config import Config, OptimConfig
from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.errors import ConfigError, Fault, UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.monitoring.metrics import MetricsFile, read_metrics
from sora_train.monitoring.run_folder import RunFolder
from sora_train.objectives import FlowBatch, SampleDraws, TextToVideoObjective, VaeObjective
from sora_train.objectives.sample_draws import draw_samples
from sora_train.objectives.spec import build_spec
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.training import card
from sora_train.training.optim.ema import Ema
from sora_train.training.optim.optim import decays, lr_at, parameter_groups
from sora_train.training.resilience.resume import allowed_changes
from sora_train.training.trainer import Trainer, due_actions

CPU = torch.device("cpu")
ALONE = ControlPlane(World(0, 1, 0, 1, CPU))


@pytest.fixture(scope="module")
def cfg() -> Config:
    return compose(["experiment=parity_tiny"]).config


@pytest.fixture(scope="module")
def model(cfg: Config) -> TextToVideo:
    """In float64, every weight away from the zeros it may start from."""
    made = TextToVideo(cfg.model, cfg.text, seed=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise)
    return made


# --- learning rate ---


@given(
    st.integers(0, 20), st.integers(1, 60), st.sampled_from(["constant", "linear", "cosine"]),
    st.floats(0, 1), st.floats(1e-6, 1),
)  # fmt: skip
def test_learning_rate_rises_to_its_peak_and_falls_no_lower_than_asked(
    warmup: int, after: int, decay: str, final: float, lr: float
) -> None:
    cfg = OptimConfig(lr=lr, warmup_steps=warmup, decay=decay, final_lr_fraction=final)  # type: ignore[arg-type]
    steps = warmup + after
    rates = [lr_at(step, steps, cfg) for step in range(steps)]
    for step in range(warmup):
        assert rates[step] == pytest.approx(lr * (step + 1) / warmup)
    assert rates[warmup] == pytest.approx(lr)
    falling = rates[warmup:]
    assert all(a >= b - 1e-12 for a, b in zip(falling, falling[1:], strict=False))
    assert min(falling) >= lr * (1 if decay == "constant" else final) - 1e-12


def test_learning_rate_by_hand() -> None:
    def rates(decay: str) -> list[float]:
        cfg = OptimConfig(lr=1.0, warmup_steps=0, decay=decay, final_lr_fraction=0.2)  # type: ignore[arg-type]
        return [lr_at(step, 4, cfg) for step in range(4)]

    assert rates("linear") == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert rates("cosine") == pytest.approx(
        [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    )
    assert rates("constant") == [1.0] * 4


# --- parameter groups ---


def test_only_matrices_and_kernels_are_decayed(model: TextToVideo) -> None:
    vae = VideoVAE.from_config(compose(["experiment=tiny_vae"]).config.vae, trainable=True, seed=0)
    named = [*model.named_parameters(), *vae.named_parameters()]
    groups = {name: decays(name, parameter) for name, parameter in named}
    for name, parameter in named:
        leaf = name.split(".")[-1]
        if leaf in ("bias", "gamma", "scale_shift_table") or "norm" in name:
            assert not groups[name], name
        elif leaf == "weight" and "shared" not in name and "relative" not in name:
            assert groups[name] and parameter.ndim >= 2, name
    tables = [name for name in groups if "shared" in name or "relative_attention_bias" in name]
    gains = [
        name
        for name, parameter in named
        if name.endswith("gamma") and parameter.squeeze().ndim == 1
    ]
    assert tables and gains and not any(groups[name] for name in [*tables, *gains])


def test_groups_hold_every_parameter_once_with_its_own_rates(model: TextToVideo) -> None:
    cfg = OptimConfig(weight_decay=0.1, text_lr_scale=0.5)
    parameters = dict(model.named_parameters())
    groups = parameter_groups(parameters, cfg)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(parameters)
    for name, parameter in parameters.items():
        group = found[id(parameter)]
        assert group["lr_scale"] == (0.5 if name.startswith("text_encoder.") else 1.0)
        assert group["weight_decay"] == (0.1 if decays(name, parameter) else 0.0)


# --- the average of the weights ---


def test_the_average_follows_a_float64_reference() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    ema = Ema(layer, decay=0.9)
    expected = {name: value.detach().double() for name, value in layer.named_parameters()}
    for step in range(30):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in layer.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
    for name, value in ema.state().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_average_is_swapped_in_and_out_even_by_an_exception() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    ema = Ema(layer, decay=0.5)
    with torch.no_grad():
        layer.weight.add_(1.0)
    own, average = layer.weight.detach().clone(), ema.state()["weight"].clone()
    place = layer.weight.data_ptr()
    with ema.swapped_in(layer):
        assert torch.equal(layer.weight, average) and layer.weight.data_ptr() == place
    assert torch.equal(layer.weight, own) and torch.equal(ema.state()["weight"], average)
    with pytest.raises(RuntimeError, match="sampling broke"), ema.swapped_in(layer):
        raise RuntimeError("sampling broke")
    assert torch.equal(layer.weight, own) and torch.equal(ema.state()["weight"], average)


# --- the small exchange between ranks ---


def test_alone_the_exchange_changes_nothing_and_raises_what_was_raised() -> None:
    assert ALONE.sum([1, 2.5, 0]) == [1.0, 2.5, 0.0]
    assert ALONE.broadcast("kept") == "kept"
    ALONE.barrier()
    ALONE.raise_together(None)
    with pytest.raises(Fault, match="disk"):
        ALONE.raise_together(Fault("disk"))


# --- metrics.jsonl ---


def test_a_resumed_file_loses_later_rows_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=0)
    for step in range(1, 6):
        file.write(step, {"train/loss": 1 / 3 + step})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 6, "train/lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]

    file = MetricsFile(path, resume_step=3)
    file.write(4, {"train/loss": 0.25})
    file.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["train/loss"] == 1 / 3 + 1 and rows[3]["train/loss"] == 0.25
    assert all("time" in row for row in rows)
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_torn_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(json.JSONDecodeError):
        read_metrics(path)


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    file.write(1, {"train/loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    file.close()


# --- checkpoints ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        tensors = {"model.w": torch.full((4,), float(step)), "ema.w": torch.zeros(4)}
        checkpoints.save(tmp_path, step, tensors, {"step": step}, ALONE)
    return tmp_path


def test_prune_keeps_the_newest_complete_ones(saved: Path) -> None:
    (saved / "step-000009.tmp").mkdir()
    checkpoints.prune(saved, 2)
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-000002", "step-000003"]
    assert (saved / "latest").read_text() == "step-000003"
    checkpoints.prune(saved, 5)
    assert [found.step for found in checkpoints.list_checkpoints(saved)] == [2, 3]


def test_a_torn_checkpoint_does_not_push_out_a_whole_one(saved: Path) -> None:
    (saved / "step-000003" / checkpoints.MANIFEST).unlink()
    checkpoints.prune(saved, 2)
    assert [found.step for found in checkpoints.list_checkpoints(saved)] == [1, 2]


def test_loading_is_strict_both_ways_and_in_shape(saved: Path) -> None:
    newest = checkpoints.list_checkpoints(saved)[-1]
    into = {"model.w": torch.zeros(4), "ema.w": torch.ones(4)}
    checkpoints.load(newest, into, None)
    assert torch.equal(into["model.w"], torch.full((4,), 3.0))
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"model.w": torch.zeros(4)}, r"1 left over \(ema\.w"),
        ({**into, "model.b": torch.zeros(4)}, r"1 tensors missing \(model\.b"),
        ({**into, "model.w": torch.zeros(5)}, r"model\.w is \(4,\), the model's is \(5,\)"),
    ]
    for tensors, message in wrong:
        with pytest.raises(UserError, match=message):
            checkpoints.load(newest, tensors, None)


# --- the run folder ---


def run_config(tmp_path: Path, *overrides: str) -> Config:
    return compose(["experiment=parity_tiny", f"run.dir={tmp_path / 'run'}", *overrides]).config


def test_a_run_folder_has_one_live_run_at_a_time(tmp_path: Path) -> None:
    first = RunFolder(run_config(tmp_path), is_main=True)
    with refuses(UserError, "run.dir", f"process {os.getpid()}", "another run.dir"):
        RunFolder(run_config(tmp_path), is_main=True)
    RunFolder(run_config(tmp_path), is_main=False).close()
    first.close()
    RunFolder(run_config(tmp_path), is_main=True).close()


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code = (
        "import fcntl, os, sys, time\n"
        f"file = open({str(tmp_path / 'run' / 'lock')!r}, 'a+')\n"
        "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with refuses(UserError, "in use"):
            RunFolder(run_config(tmp_path), is_main=True)
        holder.kill()
    RunFolder(run_config(tmp_path), is_main=True).close()


def test_another_experiment_is_refused(tmp_path: Path) -> None:
    saved = run_config(tmp_path, "seed=1").model_dump(mode="json")
    with refuses(ConfigError, "seed", "1", "2", "another run.dir"):
        allowed_changes(run_config(tmp_path, "seed=2"), saved)
    found = allowed_changes(run_config(tmp_path, "seed=1", "train.steps=99", "name=x"), saved)
    assert [key for key, _, _ in found] == ["train.steps"]


# --- the card ---


def test_the_cards_mean_step_is_that_of_the_epoch(parity_config: Callable) -> None:
    trainer = Trainer(parity_config("data.micro_batch=3", "train.micro_batches=3"))
    try:
        tape, tokens_of = trainer.data.part(0), trainer.data.tokens_of
        entries = [tape[index] for index in range(tape.per_epoch)]
        assert {entry.epoch for entry in entries} == {0} and tape[tape.per_epoch].epoch == 1
        clips = sum(len(entry.rows) for entry in entries)
        tokens = sum(len(entry.rows) * tokens_of(entry.bucket) for entry in entries)
        steps = len(entries) / 3
        model, text = trainer.engine.model, trainer.cfg.text.max_length
        # Forward and backward; a clip of 1 + 4 n frames has 1 + n latent ones.
        flops = sum(
            3 * len(entry.rows) * model.flops(tokens_of(entry.bucket), text, frames)
            for entry in entries
            for frames in [1 + (entry.bucket.frames - 1) // 4]
        )
        expected = (clips / steps, tokens / steps, flops / steps)
        assert card.mean_step(trainer.data, 0) == pytest.approx(expected)
        found = trainer.data.account()
        assert found == {"used": 24, "dropped": 0, "failed": 0, "total": 24} and clips == 24
        counts = trainer.data.assignment.clips_per_bucket(trainer.data.table)
        assert sum(counts.values()) == 24
    finally:
        trainer.close()


# --- the objective ---


def batch_of(
    model: TextToVideo, times: list[float], prompts: list[str], given: list[int]
) -> FlowBatch:
    generator = torch.Generator().manual_seed(3)
    shape = (len(times), 16, 3, 4, 4)
    mask_BT = torch.stack([(torch.arange(3) < count).double() for count in given])
    return FlowBatch(
        x=torch.randn(shape, generator=generator, dtype=torch.float64),
        noise=torch.randn(shape, generator=generator, dtype=torch.float64),
        t_B=torch.tensor(times, dtype=torch.float64),
        mask_BT=mask_BT,
        prompts=prompts,
        fps_B=torch.full((len(times),), 8.0),
    )


def one_of(batch: FlowBatch, i: int) -> FlowBatch:
    row = slice(i, i + 1)
    return FlowBatch(
        batch.x[row], batch.noise[row], batch.t_B[row], batch.mask_BT[row], batch.prompts[row], batch.fps_B[row]
    )  # fmt: skip


def test_the_flow_loss_is_the_slow_reference(model: TextToVideo) -> None:
    """Clip by clip and frame by frame: z = (1 - t) x + t noise; the error of noise - x where nothing is given."""
    batch = batch_of(model, [0.2, 0.9], ["red", "a blue ring grows"], [0, 1])
    expected = 0.0
    with torch.no_grad():
        for i in range(2):
            z, times, given_frames = batch.x[i].clone(), torch.zeros(3).double(), batch.mask_BT[i]
            for frame in range(3):
                t = 0.0 if given_frames[frame] else float(batch.t_B[i])
                times[frame] = t
                z[:, frame] = (1 - t) * batch.x[i][:, frame] + t * batch.noise[i][:, frame]
            v = model(
                z[None], times[None], model.tokenize([batch.prompts[i]]),
                mask_BT=given_frames[None], fps_B=batch.fps_B[i : i + 1],
            )[0]  # fmt: skip
            errors = [
                float(((v - (batch.noise[i] - batch.x[i]))[:, frame] ** 2).mean())
                for frame in range(3)
                if not given_frames[frame]
            ]
            expected += sum(errors) / len(errors)
        assert float(batch.loss_sum(model)) == pytest.approx(expected, rel=1e-6)


def gradients(model: TextToVideo, batches: list[FlowBatch]) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        batch.loss_sum(model).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_two_clips_in_a_batch_give_the_gradients_of_two_batches(model: TextToVideo) -> None:
    batch = batch_of(model, [0.3, 0.7], ["red", "a much longer caption of a blue ring"], [0, 1])
    together = gradients(model, [batch])
    apart = gradients(model, [one_of(batch, 0), one_of(batch, 1)])
    assert together.keys() == apart.keys() == dict(model.named_parameters()).keys()
    for name, grad in together.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, apart[name], rtol=1e-5, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def objective(cfg: Config) -> TextToVideoObjective:
    vae = VideoVAE.from_config(cfg.vae)
    spec = build_spec(cfg, vae, TextToVideo(cfg.model, cfg.text, seed=0))
    assert spec is not None
    return TextToVideoObjective(cfg, spec, vae, CPU)


def draws_of(
    objective: TextToVideoObjective, keys: list[tuple[int, int]], num_frames: int
) -> SampleDraws:
    captions, latent_size = ["said"] * len(keys), (num_frames, 4, 4)
    return draw_samples(objective.spec, objective.cfg.seed, keys, captions, latent_size)


def test_captions_are_dropped_in_their_share_by_key(objective: TextToVideoObjective) -> None:
    keys = [(epoch, row) for epoch in range(4) for row in range(1000)]

    def prompts(keys: list[tuple[int, int]]) -> list[str]:
        return draws_of(objective, keys, 3).prompts

    kept = prompts(keys)
    assert set(kept) == {"", "said"}
    assert abs(kept.count("") / len(keys) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(keys))
    assert [prompts([key])[0] for key in keys[:50]] == kept[:50]
    epochs = [kept[start : start + 1000] for start in (0, 1000)]
    assert epochs[0] != epochs[1], "a caption is not dropped in every epoch or in none"


def test_first_frames_are_given_in_their_share(objective: TextToVideoObjective) -> None:
    mask = draws_of(objective, [(0, row) for row in range(4000)], 3).mask_BT
    share = float(mask[:, 0].mean())
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert not mask[:, 1:].any()
    images = draws_of(objective, [(0, row) for row in range(50)], 1)
    assert not images.mask_BT.any(), "an image is all"


def clip_batch(rows: list[int], weight: float) -> ClipBatch:
    bucket = Bucket(5, 32, 32)
    rng = np.random.default_rng(0)
    clips = [
        Clip(row, 0, rng.integers(0, 256, (5, 32, 32, 3), np.uint8), None, 8.0, "red", "")
        for row in rows
    ]
    return ClipBatch(MicroBatch(0, bucket, 0, tuple(rows), (0,) * len(rows)), clips, [], weight)


def test_a_slot_without_clips_runs_and_weighs_nothing(
    cfg: Config, objective: TextToVideoObjective
) -> None:
    """Its ranks must meet the others in every collective, so every parameter gets a gradient: zero."""
    model = TextToVideo(cfg.model, cfg.text, seed=0)
    vae = VideoVAE.from_config(cfg.vae, trainable=True, seed=0)
    parts: list[tuple[object, nn.Module]] = [(objective, model), (VaeObjective(cfg, CPU), vae)]
    for goal, net in parts:
        assert isinstance(goal, TextToVideoObjective | VaeObjective)
        terms = goal.terms(net, clip_batch([], 0.0))
        assert terms.keys() == goal.weights(clip_batch([], 0.0)).keys()
        assert all(term.weight == 0 and float(term.sum.detach()) == 0 for term in terms.values())
        torch.stack([term.sum for term in terms.values()]).sum().backward()
        used = [p for p in net.parameters() if p.grad is not None]
        assert used and not any(p.grad.any() for p in used if p.grad is not None)


def test_a_clips_loss_does_not_depend_on_its_neighbours(
    cfg: Config, objective: TextToVideoObjective
) -> None:
    model = TextToVideo(cfg.model, cfg.text, seed=0)
    with torch.no_grad():
        both = objective.terms(model, clip_batch([3, 4], 2.0))["velocity"]
        batch = clip_batch([3, 4], 2.0)
        single = [
            objective.terms(model, ClipBatch(batch.micro_batch, [clip], [], 1.0))["velocity"]
            for clip in batch.clips
        ]
    assert both.weight == 2.0 == sum(term.weight for term in single)
    assert float(both.sum) == pytest.approx(sum(float(term.sum) for term in single), rel=1e-5)


# --- what the Trainer decides by itself ---


@settings(max_examples=30)
@given(st.integers(0, 7), st.integers(1, 40), st.integers(1, 40))
def test_what_is_due_leaves_the_last_step_to_the_end(every: int, step: int, steps: int) -> None:
    cfg = Config.model_validate({"train": {"steps": steps}, "checkpoint": {"every": every}})
    expected = every > 0 and step in range(every, steps, every)
    assert ("save" in due_actions(cfg, step)) == expected


def test_a_loss_that_is_never_finite_stops_the_run_before_the_weights(
    parity_config: Callable,
) -> None:
    """After a good step, so that an average that moved would show."""

    class Exploding(TextToVideoObjective):
        factor = 1.0

        def terms(self, model, batch):  # type: ignore[no-untyped-def]
            found = super().terms(model, batch)
            return {
                name: type(term)(term.sum * self.factor, term.weight)
                for name, term in found.items()
            }

    class Project(Trainer):
        def build_objective(self) -> Exploding:
            assert self.spec is not None
            return Exploding(self.cfg, self.spec, self.vae, self.world.device)

    trainer = Project(parity_config("optim=adamw"))
    try:
        trainer.train_step()
        before = {name: value.clone() for name, value in trainer.parts.tensors().items()}
        seen = trainer.state.samples_seen
        assert not torch.equal(
            before["ema.transformer.proj_out.weight"], before["model.transformer.proj_out.weight"]
        )
        Exploding.factor = math.nan
        assert trainer.train_step()["train/skipped"] == 1
        for name, value in trainer.parts.tensors().items():
            assert torch.equal(value, before[name]), name
        assert (trainer.step, trainer.data_step, trainer.state.samples_seen) == (2, 2, seen)
        with refuses(Fault, "2 to 4", "loss nan", "no checkpoint", "optim.lr"):
            trainer.train()
    finally:
        trainer.close()

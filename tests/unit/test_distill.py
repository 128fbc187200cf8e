"""`sora distill`: what comes of it says so, is sampled so, goes on bit for bit, and what cannot be is one sentence."""

import json
from pathlib import Path

import pytest
import torch

import sora_train
from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.cli import run
from sora_train.errors import UserError

SHORT = [
    "train.steps=2",
    "checkpoint.every=1",
    "checkpoint.rehearse=false",
    "validation.every=0",
    "sample.every=0",
    "sample.max_prompts=1",
]


@pytest.fixture(scope="module")
def distilled(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / "run"
    assert run(["distill", str(finished_run), f"run.dir={folder}", *SHORT]) == 0
    return folder


def test_the_spec_says_what_it_is_and_samples_follow(distilled):
    model = sora_train.load(distilled)
    spec = model.spec
    assert (spec.num_steps, spec.guidance_scale, spec.folded_guidance) == (4, 1.0, 4.0)
    calls = []
    block = model.model.transformer.blocks[0]
    block.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    model.sample(["red circle"])
    assert calls == [1, 1, 1, 1]


def test_the_student_begins_as_its_teacher_and_moves(finished_run, distilled):
    def weights(folder: Path, prefix: str) -> torch.Tensor:
        stored = StoredTensors(checkpoints.find(folder))
        name = f"{prefix}transformer.blocks.0.ffn.net.2.weight"
        return stored.read(name)[name]

    teacher, student = weights(finished_run, "ema."), weights(distilled, "model.")
    assert not torch.equal(teacher, student)
    assert float((teacher - student).norm() / teacher.norm()) < 0.05


def test_it_goes_on_bit_for_bit(finished_run, distilled, tmp_path):
    asked = ["distill", str(finished_run), f"run.dir={tmp_path / 'again'}", *SHORT]
    assert run([*asked, f"resume.run={distilled}@1"]) == 0
    one, other = (checkpoints.find(folder, 2) for folder in (distilled, tmp_path / "again"))
    stored = StoredTensors(one), StoredTensors(other)
    names = sorted(stored[0].shapes)
    assert names == sorted(stored[1].shapes)
    whole = [each.read(*names) for each in stored]
    assert all(torch.equal(whole[0][name], whole[1][name]) for name in names)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"guidance_scale": 4.0}, "guidance_scale is 4, and this model was distilled"),
        ({"guidance_from": 0.5}, "guidance_from is 0.5, and this model was distilled"),
        ({"condition_scale": 2.0}, "condition_scale is 2, and this model was distilled"),
    ],
)
def test_guidance_of_a_distilled_model_is_refused(distilled, settings, said):
    with pytest.raises(UserError, match=said):
        sora_train.load(distilled).sample(["red circle"], **settings)


def test_a_negative_prompt_is_refused_and_guidance_of_1_is_none(distilled, tmp_path):
    asked = ["sample", "--ckpt", str(distilled), "--prompt", "red", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="a negative prompt needs guidance, and this model was"):
        run([*asked, "--negative-prompt", "blue"])
    assert run([*asked, "--guidance-scale", "1", "--steps", "1"]) == 0


def with_state(source: Path, target: Path, **changes) -> str:
    """A run folder whose checkpoint says other things; what is refused before weights are read needs no more."""
    checkpoint = target / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    state = checkpoints.find(source).state() | changes
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "MANIFEST.json").write_text('{"files": {}}')
    return str(target)


def test_what_cannot_be_distilled_is_one_sentence(finished_run, distilled, tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        run(["distill", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="is distilled already .guidance 4 is in its weights."):
        run(["distill", str(distilled)])
    state = checkpoints.find(finished_run).state()
    adapter = {**state["config"], "adapter": {"rank": 4}}
    cases = {
        "trained a vae": {"task": "vae", "spec": None},
        "trained an adapter": {"config": adapter},
        "holds two experts": {"spec": {**state["spec"], "expert": "high", "boundary": 0.9}},
        "guides by given frames too": {"spec": {**state["spec"], "condition_scale": 2.0}},
    }
    for number, (said, changes) in enumerate(cases.items()):
        with pytest.raises(UserError, match=said):
            run(["distill", with_state(finished_run, tmp_path / str(number), **changes)])

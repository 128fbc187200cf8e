"""`sora eval` at toy size: every command of docs/evaluation.md, the loss that training measured, and bad input."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from sentences import refuses

from sora_train.cli import run
from sora_train.data.decode.video_io import encode_h264
from sora_train.data.shapes.world import eval_prompts
from sora_train.errors import UserError
from sora_train.monitoring.metrics import read_metrics

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "evaluation.md"
SHORT = ["--num", "2", "--tiers", "a", "--steps", "1"]


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sora eval")]


@pytest.fixture(scope="module")
def place(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page's commands name."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("runs/quickstart", "runs/other"):
        shutil.copytree(finished_run, folder / name)
    (folder / "prompts.txt").write_text("a red circle moves left\n" + "b" * 10_000 + "\n")
    for name in ("samples", "real"):
        (folder / name).mkdir()
        for number in range(2):
            frames = np.random.default_rng(number).integers(0, 256, (5, 32, 32, 3), np.uint8)
            encode_h264(frames, 8, folder / name / f"{number}.mp4")
    return folder


def test_the_page_is_true(place: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(place)
    walked = [words for words in commands() if words[1] != "vbench" and "--i3d" not in words]
    assert len(walked) >= 4
    for words in walked:
        run([*words, *SHORT])
        assert "Traceback" not in capsys.readouterr().err
    result = json.loads((place / "runs/quickstart/eval/step-000002/eval.json").read_text())
    assert {row["group"] for row in result["summary"]} >= {"t2v", "edit", "all"}
    page = (place / "runs/quickstart/eval/step-000002/eval.html").read_text()
    assert "data:image/jpeg" in page and "flicker" in page
    for row in result["clips"]:
        assert (place / "runs/quickstart/eval/step-000002" / row["file"]).is_file()
    assert (place / "samples/eval/eval.html").is_file()
    assert (place / "eval/comparison.html").is_file()


def test_the_loss_is_that_of_training_and_a_run_is_its_own_equal(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(place)
    run(["eval", "runs/quickstart", "runs/other", "--num", "2", "--tiers", "a", "--out", "twice"])
    logged = read_metrics(place / "runs/quickstart/metrics.jsonl")[-1]
    found = json.loads((place / "twice/1/eval.json").read_text())
    assert found["val"] == {k: v for k, v in logged.items() if k.startswith("val/loss")}
    compared = json.loads((place / "twice/comparison.json").read_text())["metrics"]
    assert compared and all(row["difference"] == 0 for row in compared)
    assert {row["better"] for row in compared} <= {"no difference told", "one number each"}
    for one in ("t2v", "edit"):
        first, second = (sorted((place / "twice" / n / one).glob("*.mp4")) for n in "12")
        assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["no/such"], ("there is no folder no/such",)),
        (["runs"], ("runs holds no clips",)),
        (["samples", "--i3d", "none.pt"], ("--i3d none.pt", "does not exist")),
        (["samples", "--tiers", "x"], ("--tiers is 'x'",)),
        (["a", "b", "c"], ("3 targets",)),
        (["samples", "--prompts", "none.txt"], ("--prompts none.txt",)),
        (["vbench", "samples"], ("--python",)),
        (["samples", "--python", "python3"], ("sora eval vbench",)),
        (["runs/quickstart", "--frames", "4"], ("4",)),
        (["runs/quickstart@7"], ("7",)),
    ],
)
def test_a_wrong_request_is_a_sentence(
    words: list[str], told: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(place)
    with refuses(UserError, *told):
        run(["eval", *words])


def test_training_judges_the_clips_that_it_samples_as_eval_does(
    parity_config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from sora_train.training.trainer import Trainer

    steps = ["train.steps=1", "validation.every=1", "sample.every=0", "validation.clips=2"]
    cfg = parity_config(*steps)
    Trainer(cfg).train()
    row = read_metrics(Path(cfg.run.dir) / "metrics.jsonl")[-1]
    (tmp_path / "prompts.txt").write_text(
        "\n".join(prompt.text for prompt in eval_prompts(2, held_out=False))
    )
    out = str(tmp_path / "out")
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    run(["eval", cfg.run.dir, "--tiers", "a", "--out", out, *prompts])
    summary = json.loads((tmp_path / "out/eval.json").read_text())["summary"]
    found = {one["metric"]: one["value"] for one in summary if one["group"] == "t2v"}
    for name, value in found.items():
        if not name.startswith("drift_"):
            assert row[f"val/clips/{name}"] == pytest.approx(value), name
    assert row.keys() >= {f"val/clips/{name}" for name in found}

"""Real files (AV1, HEVC, 10-bit, 4K, rotated, one damaged): shards, training, samples, report, sampling again."""

import contextlib
import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
from sentences import says

import sora_train
from sora_train import cli
from sora_train.data.manifest import FILE_NAME, Manifest
from sora_train.monitoring.metrics import read_metrics

PROMPT = 'a, "quoted" [prompt]'
SHORT = [
    "train",
    "experiment=real_tiny",
    "run.threads=1",
    "data.micro_batch=2",
    "train.steps=3",
    "checkpoint.every=0",
    "validation.every=0",
    "objective.num_steps=2",
    "sample.max_prompts=2",
    "tracker=none",
]
CORRUPT = "corrupted.mp4"


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sora(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints."""
    capsys.readouterr()
    assert cli.run(arguments) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, real_videos: Path) -> Path:
    output = tmp_path_factory.mktemp("shards") / "real"
    captions = real_videos / "captions.jsonl"
    cli.run(["prep", "shards", f"input={real_videos}", f"captions={captions}", f"output={output}"])
    return output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> tuple[Path, str]:
    """A finished run on the shards, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("run") / "real", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.run([*SHORT, f"data.source={shards}", f"run.dir={folder}"]) == 0
    return folder, printed.getvalue()


def test_every_file_is_in_the_shards_or_dropped_with_its_reason(
    shards: Path, real_videos: Path
) -> None:
    manifest = Manifest.load(shards / FILE_NAME, root=shards)
    files = [path for path in real_videos.iterdir() if path.suffix in (".mp4", ".mkv", ".mov")]
    assert len(manifest) == len(files)
    assert manifest.dropped() == {"unreadable": 1}
    row = int(np.flatnonzero(manifest.drop_reason != "")[0])
    assert manifest.key[row] == CORRUPT and "decoding fails after" in manifest.drop_detail[row]
    rotated = int(np.flatnonzero([key.startswith("rotated") for key in manifest.key])[0])
    assert manifest.height[rotated] > manifest.width[rotated]
    assert set(manifest.codec[manifest.drop_reason == ""]) == {"h264", "hevc", "av1"}


def test_the_dropped_clip_is_counted_on_the_card_and_in_the_summary(run: tuple[Path, str]) -> None:
    folder, printed = run
    told = " ".join(printed.replace("│", " ").split())
    says(told, "8 used", "1 dropped", "0 failed", "9")
    assert "dropped: 1 clips (unreadable)" in told and f"{CORRUPT}: decoding fails after" in told
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["clips"] == {"used": 8, "dropped": 1, "failed": 0, "total": 9}
    assert summary["dropped"] == {"unreadable": 1}
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
    assert np.isfinite(summary["final_loss"]) and summary["steps"] == 3


def test_samples_and_report_are_there_and_play(run: tuple[Path, str]) -> None:
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["samples"]) == 2
    state = json.loads((folder / "checkpoints" / "step-000003" / "state.json").read_text())
    shape = state["sample_shape"]
    for step in (0, 3):
        clips = sorted((folder / "samples" / f"step-{step:06d}").glob("*.mp4"))
        assert len(clips) == 2
        for clip in clips:
            assert frames_of(clip).shape == (shape["frames"], shape["height"], shape["width"], 3)
    html = (folder / "report.html").read_text()
    assert "<html" in html and "data:video/mp4;base64," in html and "unreadable" in html


def test_sampling_again_gives_the_same_pixels_by_command_and_from_python(
    run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = run[0], tmp_path / "out"
    arguments = ["--prompt", PROMPT, "--num", "2", "--seed", "3", "--steps", "2"]
    printed = sora("sample", "--ckpt", str(folder), *arguments, "--out", str(out), capsys=capsys)
    assert printed.split() == [str(out / "000.mp4"), str(out / "001.mp4")]
    assert sorted(path.name for path in out.iterdir()) == [
        "000.mp4",
        "001.mp4",
        "contact_sheet.png",
        "prompts.json",
    ]
    notes = json.loads((out / "prompts.json").read_text())
    assert [(note["prompt"], note["seed"]) for note in notes] == [(PROMPT, 3)] * 2

    model = sora_train.load(folder)
    clips = model.sample([PROMPT], num=2, seed=3, steps=2)
    model.save(clips, [PROMPT] * 2, tmp_path / "python", seed=3)
    for name, clip in zip(("000.mp4", "001.mp4"), clips, strict=True):
        decoded = frames_of(out / name)
        assert decoded.shape == clip.shape
        assert np.array_equal(decoded, frames_of(tmp_path / "python" / name))
    assert not np.array_equal(clips[0], clips[1]), "each clip of a prompt has noise of its own"
    assert not np.array_equal(model.sample([PROMPT], seed=4, steps=2)[0], clips[0])


@pytest.mark.slow
def test_the_folder_itself_is_a_source_too(
    real_videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [f"data.source={real_videos}", f"run.dir={tmp_path / 'run'}"]
    printed = sora(*SHORT, *where, "dry_run=true", capsys=capsys)
    told = " ".join(printed.replace("│", " ").split())
    says(told, "8 used", "1 dropped", "0 failed", "9")
    assert CORRUPT in told
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

"""The stage `score`: one pass over each clip, null for what does not apply or is off, told early what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.footage import Shot, footage, write_footage
from data_prep.scores.passing import LATER_SECONDS, sample_times, small_size
from data_prep.stages.score import SCORES, STAGE, ScoreConfig, check
from sora_train.errors import UserError
from tests.prep.scored import only, row_of, scored
from tests.sentences import refuses

OF_VIDEO = {
    "motion", "object_motion", "motion_smoothness", "camera", "camera_strength",
    "black", "frozen", "duplicate_frames", "overlay_area",
}  # fmt: skip
OF_MODELS = {"aesthetic", "clip_similarity"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    shot = Shot(seed=6, seconds=2, camera="pan_left", text="Evening news")
    return write_footage(footage([shot]), tmp_path_factory.mktemp("clip") / "a.mp4")


def values(found: dict) -> dict:
    return {name: found[name] for name in SCORES.names}


def test_every_score_of_a_clip_has_a_value(clip):
    found = scored(clip, ScoreConfig())
    missing = {name for name, value in values(found).items() if value is None}
    assert missing == OF_MODELS and found["drop_reason"] == ""
    assert found["camera"] == "pan_left" and found["text"] == "Evening news"


def test_an_image_has_the_scores_of_a_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = scored(tmp_path / "a.png", ScoreConfig(), kind="image")
    missing = {name for name, value in values(found).items() if value is None}
    assert missing == OF_VIDEO | OF_MODELS
    assert found["exposure"] == pytest.approx(0.5, abs=0.05) and found["blur"] < 0.4


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("stillness", {"black", "frozen", "duplicate_frames"}),
        ("colour", {"exposure", "colourfulness", "saturation"}),
        ("blur", {"blur"}),
        ("brisque", {"brisque"}),
        ("motion", {"motion", "object_motion", "motion_smoothness", "camera", "camera_strength"}),
    ],
)
def test_what_is_off_is_null(clip, name, columns):
    found = values(scored(clip, only(name)))
    assert {column for column, value in found.items() if value is not None} == columns


def test_all_off_needs_no_frame_to_be_looked_at(clip):
    assert set(values(scored(clip, only())).values()) == {None}


def test_a_clip_of_one_frame_has_no_motion_but_a_picture(tmp_path):
    path = write_footage(footage([Shot(seed=1, seconds=1 / 24)]), tmp_path / "a.mp4")
    found = scored(path, only("motion", "stillness", "colour", "blur", "overlay"))
    assert found["motion"] is None and found["camera"] is None and found["overlay_area"] is None
    assert found["duplicate_frames"] == 0 and found["blur"] is not None


ELSEWHERE = """
import json, sys
from pathlib import Path
from data_prep.stages.score import ScoreConfig
from tests.prep.scored import scored
print(json.dumps(scored(Path(sys.argv[1]), ScoreConfig())))
"""


def test_another_process_gives_the_same_numbers_and_says_nothing(clip):
    command = [sys.executable, "-c", ELSEWHERE, str(clip)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == scored(clip, ScoreConfig())
    assert done.stderr == ""


@pytest.mark.parametrize("duration", [0.04, 1.0, 5.0, 60.0])
def test_pictures_are_taken_in_pairs_over_the_whole_clip(duration):
    times = sample_times(duration)
    assert times == sorted(times) and times[0] >= 0 and times[-1] < duration
    assert np.diff(times)[::2].max() <= LATER_SECONDS + 1e-9
    assert times[0] < duration / 4 and times[-1] > duration * 3 / 4


@pytest.mark.parametrize(
    ("size", "small"),
    [((180, 320), (144, 256)), ((1920, 1080), (256, 144)), ((100, 2000), (144, 576))],
)
def test_small_frames_have_one_short_side(size, small):
    assert small_size(*size) == small


def test_what_is_missing_is_told_before_any_work(tmp_path, monkeypatch):
    check(ScoreConfig())
    with refuses(UserError, "score.clip=/no/such", "config.json"):
        check(ScoreConfig(clip="/no/such"))
    with refuses(UserError, "score.aesthetic", "score.clip"):
        check(ScoreConfig(aesthetic="/no/head.pth"))
    with refuses(UserError, "score.face_model=/no/yunet.onnx", "does not exist"):
        check(ScoreConfig(face_model="/no/yunet.onnx"))
    (tmp_path / "config.json").write_text("{}")
    with refuses(UserError, "score.aesthetic=/no/head.pth", "does not exist"):
        check(ScoreConfig(clip=str(tmp_path), aesthetic="/no/head.pth"))
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "rapidocr" else object()
    )
    with refuses(UserError, "rapidocr", "pip install 'sora_train[prep]'", "score.text=false"):
        check(ScoreConfig())
    check(ScoreConfig(text=False))


def test_a_deadline_grows_with_the_clip(clip):
    row = row_of(clip)
    long = row | {"frames": row["frames"] * 100}
    large = row | {"width": 3840, "height": 2160}
    assert STAGE.seconds(row, ScoreConfig()) >= 60
    assert STAGE.seconds(long, ScoreConfig()) > 5 * STAGE.seconds(row, ScoreConfig())
    assert STAGE.seconds(large, ScoreConfig()) > STAGE.seconds(row, ScoreConfig())


PEAK = """
import resource, sys
from pathlib import Path
from tests.prep.scored import only, scored
scored(Path(sys.argv[1]), only("motion", "stillness", "overlay", "colour", "blur"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip(tmp_path):
    peaks = []
    for seconds in (2, 60):
        shot = Shot(seed=1, seconds=seconds, camera="pan_left")
        path = write_footage(footage([shot], fps=60.0), tmp_path / f"{seconds}.mp4")
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    print(f"peak memory: {peaks[0]:.0f} MiB of 2 s, {peaks[1]:.0f} MiB of 60 s at 60 fps")
    # The small frames alone would take 530 MiB more.
    assert peaks[1] < peaks[0] + 80


def test_real_footage_without_faces_has_none(real_videos):
    for name in ("hiker.mp4", "press.mp4"):
        path = real_videos / name
        found = scored(path, only("faces"))
        assert (found["faces"], found["face_area"]) == (0, 0), name

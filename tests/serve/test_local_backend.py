"""Our sampler as a backend: what `sora sample` makes, whole lengths, parts that go on, and what it refuses."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from sentences import refuses

import sora_train
from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import UserError
from sora_train.sampling.operations import SampleRequest
from sora_train.serving.backends.base import BadRequest, Cancelled, Retry
from sora_train.serving.backends.local import LocalBackend
from sora_train.serving.jobs.job import Asked, Job, Upload

FPS = 8.0


@pytest.fixture(scope="module")
def backend(finished_run: Path) -> LocalBackend:
    return LocalBackend(str(finished_run), names=["sora-2"], adapters={"other": "nowhere"})


def asked(prompt: str = "a red ring", **values) -> Asked:
    made = Asked("create", prompt, "sora-2", 0.5, (32, 32), seed=3)
    return replace(made, **({"steps": 2} | values))


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def make(
    backend: LocalBackend,
    folder: Path,
    wanted: Asked,
    *inputs: Path,
    progress: Callable[[int], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    backend.check(wanted)
    folder.mkdir(exist_ok=True, parents=True)
    job = Job("video_" + 24 * "0", "o", wanted, "in_progress", 0, 0)
    return frames_of(backend.make(job, list(inputs), folder, progress, cancelled))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "00.png"
    Image.fromarray(np.full((32, 32, 3), (200, 40, 40), np.uint8)).save(path)
    return path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A grey that grows lighter, of 9 frames."""
    ramp = np.arange(9, dtype=np.uint8)[:, None, None, None] * 20
    path = tmp_path / "01.mp4"
    encode_h264(np.broadcast_to(ramp, (9, 32, 32, 3)).copy(), FPS, path)
    return path


IMAGE, VIDEO = Upload("inputs/a/00.png", "image"), Upload("inputs/a/01.mp4", "video")


def same_file(frames: np.ndarray, clip: np.ndarray, folder: Path) -> bool:
    """Whether the video is that of this clip."""
    encode_h264(clip, FPS, folder / "expected.mp4")
    return np.array_equal(frames, frames_of(folder / "expected.mp4"))


def test_a_clip_is_that_of_sora_sample(backend, finished_run: Path, tmp_path: Path) -> None:
    told = []
    frames = make(backend, tmp_path / "w", asked(frames=5), progress=told.append)
    model = sora_train.load(finished_run)
    (clip,) = model.sample(["a red ring"], size=(32, 32), frames=5, seed=3, steps=2)
    assert same_file(frames, clip, tmp_path)
    assert told == [0, 50, 100]
    assert backend.models() == ["sora-2", finished_run.name]


def test_another_job_has_another_seed(backend, tmp_path: Path) -> None:
    one = asked(seed=None, frames=5)
    backend.check(one)
    jobs = [Job(f"video_{i:024d}", "o", one, "in_progress", 0, 0) for i in (1, 1, 2)]
    made = []
    for number, job in enumerate(jobs):
        folder = tmp_path / str(number)
        folder.mkdir()
        made.append(frames_of(backend.make(job, [], folder, lambda _: None, lambda: False)))
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


@pytest.mark.parametrize("seconds", [0.25, 0.5, 0.625, 1.0, 2.5])
def test_a_video_has_the_seconds_that_were_asked_for(backend, tmp_path, seconds) -> None:
    frames = make(backend, tmp_path / "w", asked(seconds=seconds))
    assert len(frames) == round(seconds * FPS)


def test_an_image_leads_in_short_and_long_videos(backend, tmp_path: Path, image: Path) -> None:
    for seconds in (0.5, 2.0):
        wanted = asked(sampling_op="i2v", uploads=(IMAGE,), seconds=seconds)
        frames = make(backend, tmp_path / str(seconds), wanted, image)
        assert len(frames) == round(seconds * FPS)


@pytest.mark.parametrize(
    ("names", "first", "last"),
    [
        (["image"], 0, None),
        (["last_image"], None, 0),
        (["image", "last_image"], 0, 1),
        (["last_image", "image"], 1, 0),
        (["input_reference"], 0, None),
    ],
)
def test_the_last_image_is_where_its_name_says(backend, tmp_path, names, first, last) -> None:
    """A clip is that of `sora sample --image FIRST --last-image LAST`."""
    paths = []
    for number in range(len(names)):
        paths.append(tmp_path / f"{number:02d}.png")
        colour = np.full((32, 32, 3), (40 + 120 * number, 200, 10), np.uint8)
        Image.fromarray(colour).save(paths[-1])
    uploads = tuple(Upload(f"inputs/a/{name}.png", "image") for name in names)
    wanted = asked(sampling_op="i2v", uploads=uploads, frames=5)
    ends = tuple(None if place is None else paths[place] for place in (first, last))
    assert backend._images(wanted, paths) == ends
    if len(names) == 1:  # two leave nothing to make in a clip of this model
        frames = make(backend, tmp_path / "w", wanted, *paths)
        model = sora_train.load(backend.ckpt)
        prepared = model.prepare(SampleRequest("i2v", *ends), size=(32, 32), frames=5)
        (clip,) = model.sample(["a red ring"], prepared=prepared, seed=3, steps=2)
        assert same_file(frames, clip, tmp_path)


def test_what_the_sampler_refuses_is_told_about_fields(backend, tmp_path, image: Path) -> None:
    two = Upload("inputs/a/image.png", "image"), Upload("inputs/a/last_image.png", "image")
    with refuses(UserError, "op i2v", "frames 9") as refused:
        make(backend, tmp_path, asked(sampling_op="i2v", uploads=two, frames=5), image, image)
    assert "--" not in str(refused.value)


def test_characters_lead_in_and_are_left_off(backend, tmp_path: Path, video: Path) -> None:
    wanted = asked(character=("char_1",))
    assert len(make(backend, tmp_path / "w", wanted, video)) == 4
    with refuses(BadRequest, "0.625") as refused:
        backend.check(replace(wanted, seconds=2.0))
    assert refused.value.param == "characters"


@pytest.mark.parametrize("op", ["extend", "extend-back"])
def test_an_extension_keeps_the_video_and_adds_whole_seconds(
    backend, tmp_path: Path, video: Path, op: str
) -> None:
    source = frames_of(video)
    wanted = asked(op="extend", sampling_op=op, uploads=(VIDEO,), seconds=1.5)
    frames = make(backend, tmp_path / "w", wanted, video)
    assert len(frames) == 9 + 12
    kept = frames[:9] if op == "extend" else frames[-9:]
    # Its own pixels, encoded once more.
    assert np.abs(kept.astype(int) - source).mean() < 2


def test_an_extension_goes_on_where_it_was_stopped(backend, tmp_path: Path, video: Path) -> None:
    wanted = asked(op="extend", sampling_op="extend", source="video_1", seconds=1.5)
    whole = make(backend, tmp_path / "whole", wanted, video)
    steps = []

    def stop() -> bool:
        steps.append(1)
        return len(steps) == 6

    with pytest.raises(Cancelled):
        make(backend, tmp_path / "w", wanted, video, cancelled=stop)
    assert len(list((tmp_path / "w").glob("extend-*.npy"))) == 2
    told: list[int] = []
    again = make(backend, tmp_path / "w", wanted, video, progress=told.append)
    assert np.array_equal(again, whole) and min(told[1:]) > 60


def test_an_edit_is_of_the_whole_video(backend, tmp_path: Path, video: Path) -> None:
    wanted = asked(op="edit", sampling_op="edit", source="video_1", strength=0.1)
    little = make(backend, tmp_path / "a", wanted, video)
    much = make(backend, tmp_path / "b", replace(wanted, strength=1.0), video)
    source = frames_of(video).astype(int)
    assert len(little) == len(much) == 9
    assert np.abs(little - source).mean() < np.abs(much - source).mean()


def test_a_remix_is_the_same_request_with_another_prompt(backend, tmp_path, video: Path) -> None:
    first = make(backend, tmp_path / "a", asked(frames=5))
    same = make(backend, tmp_path / "b", asked(op="remix", source="video_1", frames=5), video)
    assert np.array_equal(first, same)


def test_operations_on_files(backend, tmp_path: Path, image: Path, video: Path) -> None:
    second = tmp_path / "02.mp4"
    shutil.copy(video, second)
    two = (VIDEO, Upload("inputs/a/02.mp4", "video"))
    loop = asked(sampling_op="loop", uploads=(VIDEO,), frames=13, frames_given=1)
    connect = asked(sampling_op="connect", uploads=two, frames=13)
    infill = asked(sampling_op="infill", uploads=(VIDEO,), frames=9)
    upscale = asked(sampling_op="upscale", uploads=(VIDEO,), size=(64, 64))
    for name, wanted, inputs in (
        ("loop", loop, [video]),
        ("connect", connect, [video, second]),
        ("infill", infill, [video]),
        ("upscale", upscale, [video]),
    ):
        assert len(make(backend, tmp_path / name, wanted, *inputs)) >= 9, name
    assert frames_of(tmp_path / "upscale" / "video.mp4").shape[1:] == (64, 64, 3)


def test_a_storyboard_shows_its_files_at_their_times(backend, tmp_path: Path, image: Path) -> None:
    cues = [
        {"at": 0.0, "prompt": "a red ring"},
        {"at": 1.0, "prompt": "a blue square", "image": "inputs/a/00.png"},
    ]
    wanted = asked(storyboard=cues, uploads=(IMAGE,), seconds=2.0)
    assert len(make(backend, tmp_path / "w", wanted, image)) == 16
    lost = replace(wanted, storyboard=[cues[0], {"at": 1.0, "image": "b.png"}])
    with refuses(UserError, "cues[1]", "b.png"):
        make(backend, tmp_path / "v", lost, image)


@pytest.mark.parametrize(
    ("values", "param", "fact"),
    [
        ({"model": "sora-9"}, "model", "sora-2"),
        ({"adapters": ("a",)}, "adapters", "other"),
        ({"prompt": "a\x07b"}, "prompt", "U+0007"),
        ({"size": (33, 32)}, "size", "multiples"),
        ({"frames": 4}, "frames", "5"),
        ({"fps": -1.0}, "fps", "-1"),
        ({"negative_prompt": "x", "guidance_scale": 1.0}, "negative_prompt", "guidance"),
        ({"sampling_op": "dance"}, "op", "dance"),
        ({"sampling_op": "i2v"}, "input_reference", "0 images"),
        ({"uploads": (VIDEO,)}, "input_reference", "1 videos"),
        ({"storyboard": [{"at": 0.0}]}, "storyboard", "prompt"),
        ({"storyboard": [{"at": 9.0, "prompt": "x"}]}, "storyboard", "ends"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_a_job(backend, values, param, fact) -> None:
    with refuses(BadRequest, fact) as refused:
        backend.check(asked(**values))
    assert refused.value.param == param and "--" not in str(refused.value)


def test_files_of_the_servers_own_that_are_missing_are_no_fault_of_the_job(
    backend: LocalBackend, tmp_path: Path
) -> None:
    with pytest.raises(Retry):
        make(backend, tmp_path / "job", asked(adapters=("other",)))

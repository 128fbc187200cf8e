"""Storyboards and references: given frames lie on whole latent frames, and what cannot be is told in a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sentences import refuses, says

from sora_train.cli import run
from sora_train.data.decode.video_io import encode_h264
from sora_train.diffusion.condition_frames import encode_condition_frames, pixel_mask
from sora_train.diffusion.condition_masks import KINDS, STILL_KINDS, ends_mask, frame_mask
from sora_train.errors import UserError
from sora_train.models.vae.geometry import Geometry
from sora_train.sampling import api
from sora_train.sampling.given_files import GivenFile
from sora_train.sampling.operations import SampleRequest, prepare
from sora_train.sampling.pipeline import ClipShape
from sora_train.sampling.prompts.placing import (
    kind_of,
    on_latent_frames,
    with_given,
    with_references,
)
from sora_train.sampling.prompts.storyboard import Storyboard

GEOMETRY = Geometry(channels=16, temporal_factor=4, spatial_factor=8)
SHAPE = ClipShape(frames=17, height=32, width=32, fps=8.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A wide and a square image, a video of 25 frames at 8 a second, one at 4, and one of 3 frames."""
    folder = tmp_path_factory.mktemp("board")
    Image.new("RGB", (64, 32), (200, 40, 40)).save(folder / "wide.png")
    Image.new("RGB", (48, 48), (40, 40, 200)).save(folder / "square.png")
    grey = np.arange(25, dtype=np.uint8)[:, None, None, None] * 4 + 60
    clip = np.ascontiguousarray(np.broadcast_to(grey, (25, 32, 32, 3)))
    encode_h264(clip, 8, folder / "clip.mp4")
    encode_h264(clip, 4, folder / "slow.mp4")
    encode_h264(clip[:3], 8, folder / "short.mp4")
    (folder / "torn.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:200])
    return folder


def board(folder: Path, cues: str, head: str = "seconds: 2.1\nfps: 8") -> Storyboard:
    path = folder / "board.yaml"
    path.write_text(f"{head}\ncues:\n{cues}")
    return Storyboard.read(path)


def script_of(one: Storyboard, shape: ClipShape = SHAPE):
    return one.script(
        shape, GEOMETRY, {n: text.text("") for n, text in one.prompts.items()}, "black"
    )


# -- places --


@given(st.integers(0, 200), st.integers(1, 40), st.booleans(), st.sampled_from([1, 2, 4, 8]))
def test_given_frames_fill_latent_frames_near_their_place(at, count, is_still, factor):
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    first, given_frames = on_latent_frames(frames, at, factor, is_still=is_still)
    end = first + len(given_frames)
    assert first == 0 or (first - 1) % factor == 0, "it begins with a latent frame"
    assert end == first or (end - 1) % factor == 0, "it ends with one"
    shown = end - 1 if is_still else first
    assert abs(shown - at) <= max(1, factor / 2)
    kept = given_frames[:, 0, 0, 0].tolist()
    assert kept == ([0] * len(kept) if is_still else list(range(len(kept))))
    if not is_still:
        assert count - len(kept) < factor, "no more is left off than fills no latent frame"


@pytest.mark.parametrize("num_frames", [3, 4, 6])
def test_a_mask_of_training_is_taken_for_a_kind_that_draws_it(num_frames):
    draws = np.linspace(0, 1, 60, endpoint=False)
    masks = {
        kind: {tuple(frame_mask(kind, num_frames, u).tolist()) for u in draws} for kind in KINDS
    }
    for kind in KINDS:
        for mask in masks[kind] - {(0.0,) * num_frames}:
            known = kind_of(torch.tensor(mask), stills=kind in STILL_KINDS)
            assert known == "random" or mask in masks[known]
            assert (known in STILL_KINDS) == (kind in STILL_KINDS)


def test_an_image_held_for_a_latent_frame_is_encoded_as_a_single_one():
    pixels = torch.from_numpy(np.random.default_rng(0).random((1, 3, 17, 2, 2))).float()

    def encode(clip):
        later = [clip[:, :, i : i + 4].mean(2, keepdim=True) for i in range(1, clip.shape[2], 4)]
        return torch.cat([clip[:, :, :1], *later], dim=2)

    held = torch.cat([pixels[:, :, :13], pixels[:, :, -1:].repeat(1, 1, 4, 1, 1)], dim=2)
    mask_T = ends_mask(5, 1, 1)
    for kind, frames in (("i2v_both", pixels), ("connect", held)):
        got = encode_condition_frames(encode, frames, pixel_mask(kind, mask_T, 4), 4, 4)
        torch.testing.assert_close(got[:, :, -1:], pixels[:, :, -1:])


# -- storyboards --


def test_cues_are_shown_at_their_times(files):
    one = board(
        files,
        "  - {at: 0, prompt: a cat, image: square.png}\n"
        "  - {at: 0.625, video: clip.mp4, seconds: 0.5}\n"
        "  - {at: 1.5, prompt: {subject: a dog, action: it runs}}\n"
        "  - {at: 2, image: wide.png}",
    )
    script = script_of(one)
    assert script.prompt_at(1.49) == "a cat" and script.prompt_at(1.5) == "a dog. it runs."
    shown = script.given(8.0, 17)
    assert [(first, len(frames)) for first, frames in shown] == [(0, 1), (5, 4), (13, 4)]
    assert np.abs(shown[0][1].mean((0, 1, 2)) - [40, 40, 200]).max() < 3
    assert np.abs(shown[1][1].mean((1, 2, 3)) - [60, 64, 68, 72]).max() < 3
    assert np.abs(shown[2][1].mean((0, 1, 2)) - [200, 40, 40]).max() < 3
    says(one.told[0], "wide.png is 64x32 and the clip 32x32", "cropped")
    prepared = with_given(shown, SHAPE, GEOMETRY)
    assert prepared.kind == "random"
    clip = np.zeros((17, 32, 32, 3), np.uint8)
    own = prepared.finish(clip)
    assert own[5:9].any() and not own[:5].any() and not own[9:].any(), "a video keeps its pixels"


def test_frames_between_latent_frames_move_to_them_and_it_is_told(files):
    one = board(
        files, "  - {at: 0.25, prompt: a, image: square.png}\n  - {at: 1.2, video: clip.mp4}"
    )
    shown = script_of(one).given(8.0, 17)
    assert [(first, len(frames)) for first, frames in shown] == [(0, 1), (9, 8)]
    says(one.told[0], "cues[0]", "square.png is seen at 0 s, not at 0.25 s", "holds 4 frames")
    says(one.told[1], "cues[1]", "clip.mp4 is seen at 1.12 s")
    says(one.told[2], "clip.mp4", "8 of its 25 frames")


@pytest.mark.parametrize(
    ("cues", "facts"),
    [
        ("  - {at: 1, prompt: a}\n  - {at: 0.5, prompt: b}", ("cues[1]", "0.5 s", "order of time")),
        ("  - {at: 1, prompt: a}\n  - {at: 1, prompt: b}", ("cues[1]", "one moment in one cue")),
        ("  - {at: 3, prompt: a}", ("cues[0]", "3 s", "ends at 2.1 s", "raise seconds")),
        ("  - {at: -1, prompt: a}", ("'cues[0].at'", "-1")),
        ("  - {at: .nan, prompt: a}", ("'cues[0].at'", "nan")),
        ("  - {at: 0}", ("cues[0]", "prompt, an image or a video")),
        ("  - {at: 0, image: square.png}", ("no prompt",)),
        ("  - {at: 0, prompt: a, image: no.png}", ("cues[0]", "no file", "no.png")),
        ("  - {at: 0, prompt: a, video: torn.mp4}", ("cues[0]", "torn.mp4", "cannot be read")),
        ("  - {at: 0, prompt: a, image: torn.mp4}", ("cues[0]", "torn.mp4", "as an image")),
        ("  - {at: 0, prompt: a, image: square.png, video: clip.mp4}", ("leave one out",)),
        ("  - {at: 0, prompt: a, seconds: 1}", ("how much of a video",)),
        ("  - {at: 0, prompt: a, imge: square.png}", ("'cues[0].imge'", "image")),
        ("  - {at: 0, prompt: {subjct: a}}", ("cues[0]", "'subjct'", "subject")),
        ("  - {at: 0, prompt: {subject: a, negative: b}}", ("cues[0]", "`negative` once")),
        ('  - {at: 0, prompt: "a\\u0007"}', ("cues[0]", "U+0007")),
        ("  - {at: 0, prompt: a, at: 1}", ("stands twice",)),
        ("", ("cues",)),
    ],
)
def test_what_is_no_storyboard_is_told_before_anything_is_loaded(files, cues, facts):
    with refuses(UserError, "--storyboard", "board.yaml", *facts) as caught:
        board(files, cues)
    assert "config" not in str(caught.value)


@pytest.mark.parametrize(
    ("cues", "facts"),
    [
        (
            "  - {at: 0, prompt: a, video: clip.mp4}\n  - {at: 1, image: square.png}",
            ("cues[0]", "until 2.12 s", "cues[1]", "seconds"),
        ),
        (
            "  - {at: 1, prompt: a, image: wide.png}\n  - {at: 1.1, image: square.png}",
            ("cues[0]", "cues[1]", "move one"),
        ),
        ("  - {at: 0, prompt: a, video: slow.mp4}", ("slow.mp4 has 4 frames a second", "fps: 4")),
        ("  - {at: 1, prompt: a, video: short.mp4}", ("short.mp4 shows 3 frames", "4 of a latent")),
    ],
)
def test_given_frames_that_do_not_fit_are_told(files, cues, facts):
    one = board(files, cues)
    with refuses(UserError, "board.yaml", *facts):
        script_of(one)


# -- references --


def test_references_lead_in_and_are_left_off(files):
    opened = [
        GivenFile.open(files / name, kind, "--reference")
        for name, kind in (("square.png", "image"), ("clip.mp4", "video"))
    ]
    prepared = with_references(opened, SHAPE, GEOMETRY, "black")
    assert prepared.kind == "extend"
    assert prepared.condition_frames.mask_T.tolist() == [1, 1, 0, 0, 0]
    clip = np.broadcast_to(np.arange(17, dtype=np.uint8)[:, None, None, None], (17, 32, 32, 3))
    assert prepared.finish(clip)[:, 0, 0, 0].tolist() == list(range(5, 17))
    says(" ".join(prepared.told), "first 5 frames", "12 frames are made")
    alone = with_references(opened[:1], SHAPE, GEOMETRY, "black")
    by_operation = prepare(SampleRequest("i2v", files / "square.png"), SHAPE, GEOMETRY)
    assert alone.kind == by_operation.kind == "i2v"
    first = alone.condition_frames.pixels[0], by_operation.condition_frames.pixels[0]
    assert np.array_equal(*first)


def test_references_that_fill_the_clip_are_told(files):
    opened = [GivenFile.open(files / "square.png", "image", "--reference")] * 5
    with refuses(UserError, "5 references", "5 latent frames", "17 frames", "--frames 25"):
        with_references(opened, SHAPE, GEOMETRY, "black")


# -- the command --


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--prompt", "a"], ("--storyboard", "leave out --prompt")),
        (["--op", "i2v"], ("leave out --op",)),
        (["--frames", "5"], ("leave out --frames",)),
        (["--reference", "square.png"], ("leave out --reference",)),
        (["--size", "33x32"], ("--size 33x32",)),
    ],
)
def test_flags_beside_a_storyboard(finished_run, files, flags, facts, monkeypatch, tmp_path):
    monkeypatch.chdir(files)
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    board(files, "  - {at: 0, prompt: a}")
    asked = ["sample", "--ckpt", str(finished_run), "--storyboard", "board.yaml", *flags]
    with refuses(UserError, *facts):
        run([*asked, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_storyboard_is_made_as_its_operation_makes_it(finished_run, files, tmp_path, capsys):
    board(
        files,
        "  - {at: 0, prompt: a cat, image: square.png}",
        "seconds: 0.6\nseed: 5\nnegative: dull",
    )
    asked = ["sample", "--ckpt", str(finished_run), "--steps", "1", "--guidance-scale", "2"]
    by_board = ["--storyboard", str(files / "board.yaml"), "--out", str(tmp_path / "a")]
    assert run([*asked, *by_board]) == 0
    by_flags = [
        "--prompt",
        "a cat",
        "--op",
        "i2v",
        "--image",
        str(files / "square.png"),
        "--seed",
        "5",
    ]
    by_flags += ["--negative-prompt", "dull", "--frames", "5", "--out", str(tmp_path / "b")]
    assert run([*asked, *by_flags]) == 0
    assert (tmp_path / "a/000.mp4").read_bytes() == (tmp_path / "b/000.mp4").read_bytes()
    assert (tmp_path / "a/prompts.json").read_text() == (tmp_path / "b/prompts.json").read_text()


def test_a_long_storyboard_shows_what_is_given_where_it_is_given(
    finished_run, files, tmp_path, capsys
):
    """Windows of 9 frames or so; the image's latents and the video's pixels come back in theirs."""
    board(
        files,
        "  - {at: 0, prompt: a cat}\n"
        "  - {at: 1.625, video: clip.mp4, seconds: 1}\n"
        "  - {at: 3, prompt: a dog}",
        "seconds: 4\nfps: 8\nsize: 32x32",
    )
    asked = ["sample", "--ckpt", str(finished_run), "--steps", "1", "--storyboard"]
    assert run([*asked, str(files / "board.yaml"), "--out", str(tmp_path)]) == 0
    says(capsys.readouterr().err, "not trained on frames given anywhere", "random")
    made = GivenFile.open(tmp_path / "000.mp4", "video", "made")
    assert made.probe.frames == 32 and made.probe.fps == 8
    video = GivenFile.open(files / "clip.mp4", "video", "--video").frames(SHAPE, "black")
    frames = made.frames(SHAPE, "black").astype(int)
    apart = np.abs(frames[13:21] - video[:8].astype(int)).mean(axis=(1, 2, 3))
    others = np.abs(frames[[5, 28]] - video[0].astype(int)).mean(axis=(1, 2, 3))
    assert apart.max() < 8 < others.min(), (apart, others)
    rows = json.loads((tmp_path / "prompts.json").read_text())
    assert rows[0]["prompts"] == [{"at": 0.0, "prompt": "a cat"}, {"at": 3.0, "prompt": "a dog"}]
    with refuses(UserError, "--storyboard says how long", "leave out --seconds"):
        run([*asked, str(files / "board.yaml"), "--out", str(tmp_path), "--seconds", "3"])

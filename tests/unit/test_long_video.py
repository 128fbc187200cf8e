"""Passes over a long video: what each window is shown, decoding in pieces, and going on after a kill."""

import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sentences import refuses

from sora_train.config.compose import compose
from sora_train.errors import Fault, UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.pixels import from_uint8, to_uint8
from sora_train.objectives.spec import build_spec
from sora_train.sampling.long.passes import Coarse, Maker, resized
from sora_train.sampling.long.store import Store
from sora_train.sampling.long.video import LongRequest, levels, stacked, write_videos
from sora_train.sampling.pipeline import ClipShape

REQUEST = LongRequest(2.0, ClipShape(9, 16, 16, 8.0), 1.0, smooth_fps=12.0)
PROMPTS = ["a red circle", "a blue square", "a ring"]


@functools.cache
def parts():
    overrides = ["model.fps_embed=true", "model.mask_channel=true", "objective.history_frames=5"]
    cfg = compose(["experiment=parity_tiny", *overrides]).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text, seed=0)
    # A model that was not trained puts out zeros.
    torch.nn.init.normal_(
        model.transformer.proj_out.weight, std=0.5, generator=torch.Generator().manual_seed(0)
    )
    spec = build_spec(cfg, vae, model)
    assert spec is not None
    return model.eval(), vae, spec


def maker(folder: Path, on_step=lambda: None, batch: int = 2) -> Maker:
    model, vae, spec = parts()
    store = Store(folder, {"test": 1})
    return Maker(
        model, vae, spec, store, 3, range(len(PROMPTS)), [""] * len(PROMPTS), batch, on_step
    )


def frames_of(folder: Path, on_step=lambda: None, request: LongRequest = REQUEST) -> np.ndarray:
    """All videos, (N, F, H, W, 3)."""
    spec, step = parts()[2], parts()[1].frame_step
    asked = levels(request, spec.history_frames, step, anchored=True)
    made = stacked(asked, maker(folder, on_step), lambda at: PROMPTS)
    return np.concatenate(list(made), axis=1)


@functools.cache
def whole() -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        return frames_of(Path(folder))


def test_a_video_has_its_length_and_moves() -> None:
    assert whole().shape == (3, 24, 16, 16, 3) and whole().dtype == np.uint8
    # The frames of a latent frame are alike with this VAE: 9 of them are 3 pictures. Behind the first window's what is
    # left of the step at the border fades from each to the next.
    assert all(len(np.unique(one[:9], axis=0)) == 3 for one in whole())
    assert all(len(np.unique(one, axis=0)) == 3 + 15 for one in whole())


@pytest.mark.parametrize("kill_at", [1, 6, 23])
def test_a_killed_job_goes_on_from_its_last_window(tmp_path: Path, kill_at: int) -> None:
    """Bit for bit what it would have been, and no window is made twice."""
    taken = itertools.count(1)

    def kill() -> None:
        if next(taken) == kill_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frames_of(tmp_path, kill)
    kept = Store(tmp_path, {"test": 1}).finished()
    again = itertools.count()
    assert np.array_equal(frames_of(tmp_path, lambda: next(again)), whole())
    per_window = 2 * parts()[2].num_steps
    spec, step = parts()[2], parts()[1].frame_step
    total = sum(
        len(one.windows) for one in levels(REQUEST, spec.history_frames, step, anchored=True)
    )
    assert kept == (kill_at - 1) // per_window
    assert next(again) == (total - kept) * per_window


def test_a_video_is_refined_at_another_size(tmp_path: Path) -> None:
    """At a strength of almost nothing what comes is the resized video as the VAE tells it, whatever the windows and the
    parts of the picture; at a strength of its own it is another one of that size."""
    plain = dataclasses.replace(REQUEST, smooth_fps=0.0)
    refined = dataclasses.replace(plain, refined_size=(40, 32), refined_strength=1e-4)
    before = frames_of(tmp_path / "plain", request=plain)
    vae = parts()[1]
    made = frames_of(tmp_path / "same", request=refined)
    assert made.shape == (3, 16, 32, 40, 3) and vae.tile == 0
    wanted = resized(before, ClipShape(9, 32, 40, 8.0))
    # The VAE's own loss, for windows whose frames it sees alike.
    decoded = vae.decode(vae.encode(from_uint8(wanted[:, :9])))
    coded = np.stack([to_uint8(one) for one in decoded])
    assert abs(made[:, :9].astype(int) - coded.astype(int)).mean() < 1
    anew = dataclasses.replace(refined, refined_strength=0.5)
    other = frames_of(tmp_path / "anew", request=anew)
    assert abs(other.astype(int) - made.astype(int)).mean() > 2


def test_another_request_does_not_meet_these_windows(tmp_path: Path) -> None:
    assert Store(tmp_path, {"seed": 0}).folder != Store(tmp_path, {"seed": 1}).folder


def test_decoding_in_pieces_is_decoding_at_once(tmp_path: Path) -> None:
    """The first window's frames are those of its latents decoded whole, bit for bit."""
    request = LongRequest(1.0, REQUEST.shape)
    made = frames_of(tmp_path, request=request)
    latents = torch.from_numpy(np.load(Store(tmp_path, {"test": 1}).folder / "video-0000.npy"))
    with torch.no_grad():
        pixels = parts()[1].decode(latents)
    assert np.array_equal(made, np.stack([to_uint8(one) for one in pixels])[:, :8])


def test_each_window_is_shown_the_end_of_the_one_before(tmp_path: Path) -> None:
    """History comes back in the window's latents as it was encoded, from the frames that were made."""
    request = LongRequest(2.0, REQUEST.shape)
    made = frames_of(tmp_path, request=request)
    folder = Store(tmp_path, {"test": 1}).folder
    second = torch.from_numpy(np.load(folder / "video-0001.npy"))
    vae = parts()[1]
    for row in range(3):
        shown = torch.from_numpy(made[row : row + 1, 4:9]).permute(0, 4, 1, 2, 3) / 127.5 - 1
        with torch.no_grad():
            head = vae.encode(shown.float())
        torch.testing.assert_close(second[row : row + 1, :, :2], head)


def test_a_coarse_pass_is_held_no_longer_than_it_is_needed() -> None:
    clip = np.arange(40, dtype=np.uint8).reshape(1, 40, 1, 1, 1).repeat(3, -1)
    pieces = iter(np.split(clip, [7, 9, 20, 33], axis=1))
    coarse = Coarse(pieces, 2.0, 0.5)
    for start in (0.0, 1.25, 4.0, 9.5, 18.0):
        first, frames = coarse.between(start, start + 3.0)
        assert first == int(start * 2)
        last = min(int(np.ceil((start + 3) * 2)), 39)
        assert frames[0, :, 0, 0, 0].tolist() == list(range(first, last + 1))
        assert coarse._held is not None and coarse._first == first


def test_windows_begun_from_noise_alone_differ_from_those_of_anchors(tmp_path: Path) -> None:
    """At strength 1 anchors say nothing; below they do."""
    alone = dataclasses.replace(REQUEST, anchor_fps=0.0, smooth_fps=0.0)
    without = frames_of(tmp_path / "a", request=alone)
    silent = dataclasses.replace(alone, anchor_fps=1.0, anchor_strength=1.0)
    heard = dataclasses.replace(silent, anchor_strength=0.5)
    assert np.array_equal(frames_of(tmp_path / "b", request=silent), without)
    assert not np.array_equal(frames_of(tmp_path / "c", request=heard), without)


def test_on_a_full_disk_files_are_whole_or_not_there_and_finished_windows_are_kept(tmp_path: Path):
    frames, paths = np.zeros((2, 5, 16, 16, 3), np.uint8), [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    store = Store(tmp_path / "kept", {"test": 1})
    store.latents("video-0000", lambda: torch.zeros(1))

    def torn():
        yield frames
        raise OSError(28, "No space left on device")

    with refuses(Fault, "No space left on device", "1 finished windows", str(store.folder)):
        write_videos(torn(), paths, 8.0, store)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "kept"]
    assert store.latents("video-0000", lambda: torch.ones(1)).item() == 0
    # A writer that was killed leaves its file; the next one of the same video takes it away.
    left = tmp_path / f".{paths[0].name}.0123.tmp"
    left.touch()
    write_videos(iter([frames, frames]), paths, 8.0, store)
    assert sorted(tmp_path.glob("*.mp4")) == paths and not left.exists()


@pytest.mark.parametrize(
    ("request_", "facts"),
    [
        (LongRequest(0.0, REQUEST.shape), ("--seconds", "0")),
        (LongRequest(float("inf"), REQUEST.shape), ("--seconds", "inf")),
        (LongRequest(5.0, REQUEST.shape, smooth_fps=8.0), ("--smooth-fps 8", "no more than")),
        (LongRequest(5.0, REQUEST.shape, refined_size=(32, 8)), ("--refine 32x8", "16x16")),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(request_, facts) -> None:
    with refuses(UserError, *facts):
        request_.check()

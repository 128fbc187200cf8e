"""Images and videos reach the model in their places, come back unchanged, and what does not fit is told first."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentences import says

from sora_train.cli import run
from sora_train.config.compose import compose
from sora_train.data.decode.video_io import encode_h264
from sora_train.diffusion.draws import draw_noise
from sora_train.diffusion.flow import interpolate
from sora_train.diffusion.guidance import guide_both, rescale
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.geometry import Geometry
from sora_train.objectives.spec import build_spec
from sora_train.sampling import api
from sora_train.sampling.operations import OPERATIONS, SampleRequest, prepare
from sora_train.sampling.pipeline import (
    ClipShape,
    GuidedVelocity,
    encode_conditions,
    sample_latents,
)

GEOMETRY = Geometry(channels=16, temporal_factor=4, spatial_factor=8)
SHAPE = ClipShape(frames=17, height=32, width=32, fps=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two videos of 25 frames, one of 3, and two images; each frame's grey says which it is."""
    folder = tmp_path_factory.mktemp("media")
    for name, count, base in (("a", 25, 20), ("b", 25, 130), ("short", 3, 20)):
        grey = base + 4 * np.arange(count, dtype=np.uint8)
        clip = np.broadcast_to(grey[:, None, None, None], (count, 32, 48, 3))
        encode_h264(np.ascontiguousarray(clip), 8, folder / f"{name}.mp4")
    for name, value in (("first", 40), ("last", 200)):
        Image.new("RGB", (64, 48), (value,) * 3).save(folder / f"{name}.png")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def parts():
    """A small VAE, a small model whose output is not zero, and their spec."""
    cfg = compose(["experiment=parity_tiny"]).config
    vae, model = VideoVAE.from_config(cfg.vae), TextToVideo(cfg.model, cfg.text).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return vae, model, build_spec(cfg, vae, model)


def greys(clip):
    return clip[:, 16, 16, 0].astype(int)


def test_an_image_is_read_as_training_reads_it(tmp_path):
    """What lies under alpha is the run's background, and of several pictures the first counts."""
    rgba = np.full((48, 64, 4), (255, 0, 255, 0), np.uint8)
    rgba[:, 32:] = (20, 160, 20, 255)
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    asked = SampleRequest(op="i2v", image=tmp_path / "clear.png")
    first = prepare(asked, SHAPE, GEOMETRY, "#204060").condition_frames.pixels[0]
    assert (first[:, :12] == (0x20, 0x40, 0x60)).all() and (first[:, 20:] == (20, 160, 20)).all()
    one, two = (Image.new("RGB", (64, 48), (value,) * 3) for value in (40, 200))
    one.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[two])
    asked = SampleRequest(op="i2v", image=tmp_path / "phone.jpg")
    assert np.abs(prepare(asked, SHAPE, GEOMETRY).condition_frames.pixels[0] - 40.0).max() <= 2


def request(files, op, *names, **settings):
    keys = {"first.png": "image", "last.png": "last_image"}
    images = {keys[name]: files / name for name in names if name in keys}
    videos = tuple(files / name for name in names if name not in keys)
    return SampleRequest(op=op, videos=videos, **images, **settings)


A, B = 20 + 4 * np.arange(25), 130 + 4 * np.arange(25)


@pytest.mark.parametrize(
    ("op", "names", "settings", "mask", "known"),
    [
        ("i2v", ["first.png"], {}, [1, 0, 0, 0, 0], {0: 40}),
        ("i2v", ["last.png"], {}, [0, 0, 0, 0, 1], {16: 200}),
        ("i2v", ["first.png", "last.png"], {}, [1, 0, 0, 0, 1], {0: 40, 16: 200}),
        ("loop", ["first.png"], {}, [1, 0, 0, 0, 1], {0: 40, 16: 40}),
        ("extend", ["a.mp4"], {"frames_given": 5}, [1, 1, 0, 0, 0], dict(enumerate(A[-5:]))),
        ("extend-back", ["a.mp4"], {"frames_given": 4}, [0, 0, 0, 0, 1],
         dict(zip(range(13, 17), A[:4], strict=True))),
        ("infill", ["a.mp4"], {"gap": (5, 13)}, [1, 1, 0, 0, 1],
         {i: A[i] for i in (*range(5), *range(13, 17))}),
        ("connect", ["a.mp4", "b.mp4"], {"frames_given": 5}, [1, 1, 0, 1, 1],
         dict(enumerate(A[-5:])) | dict(zip(range(9, 17), B[:8], strict=True))),
        ("loop", ["a.mp4"], {"frames_given": 1}, [1, 0, 0, 0, 1],
         {0: A[-1]} | dict(zip(range(13, 17), A[:4], strict=True))),
    ],
)  # fmt: skip
def test_every_frame_given_has_its_place(files, op, names, settings, mask, known):
    prepared = prepare(request(files, op, *names, **settings), SHAPE, GEOMETRY)
    assert prepared.condition_frames.mask_T.tolist() == mask
    frames = greys(prepared.condition_frames.pixels)
    for place, grey in known.items():
        assert abs(frames[place] - grey) <= 2, place
    if prepared.known_F is not None:
        assert torch.nonzero(prepared.known_F).flatten().tolist() == sorted(known)


@pytest.mark.parametrize(
    ("op", "names", "expected"),
    [
        ("extend", ["a.mp4"], [*A, *[7] * 12]),
        ("extend-back", ["a.mp4"], [*[7] * 9, *A]),
        ("infill", ["a.mp4"], [A[0], *[7] * 12, *A[13:]]),
        ("connect", ["a.mp4", "b.mp4"], [*A, *[7] * 12, *B]),
        ("loop", ["a.mp4"], [*A, *[7] * 12]),
        ("loop", ["first.png"], [7] * 16),
    ],
)
def test_the_output_keeps_the_own_pixels_of_given_video_frames(files, op, names, expected):
    """And those of the rest of the video; only what was made comes from the model."""
    settings = {}
    if op in ("connect", "loop", "extend") and names[0] == "a.mp4":
        settings = {"frames_given": 1 if op != "extend" else 5}
    if op == "infill":
        settings = {"gap": (1, 13)}
    prepared = prepare(request(files, op, *names, **settings), SHAPE, GEOMETRY)
    made = np.full((17, 32, 32, 3), 7, np.uint8)
    got = greys(prepared.finish(made))
    assert len(got) == len(expected) and np.abs(got - np.array(expected)).max() <= 2


def test_strength_is_spread_over_the_clip(files):
    prepared = prepare(request(files, "edit", "a.mp4", strength=(0.0, 0.8)), SHAPE, GEOMETRY)
    assert prepared.condition_frames.strength_T.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    image = prepare(request(files, "edit", "first.png", strength=(0.3,)), SHAPE, GEOMETRY)
    assert image.shape.frames == 1
    assert image.condition_frames.strength_T.tolist() == pytest.approx([0.3])
    assert prepare(SampleRequest(op="t2i"), SHAPE, GEOMETRY).shape.frames == 1


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
@pytest.mark.parametrize("op", ["extend", "i2v", "edit"])
def test_latents_of_given_frames_come_back_identical(files, parts, op, solver):
    vae, model, spec = parts
    names = {"extend": ["a.mp4"], "i2v": ["first.png", "last.png"], "edit": ["a.mp4"]}[op]
    settings = {"strength": (0.0, 0.9)} if op == "edit" else {}
    prepared = prepare(request(files, op, *names, **settings), SHAPE, vae.geometry)
    known = encode_conditions(prepared.condition_frames, vae, spec)
    noise = draw_noise(3, "sample", [(0, 0)], vae.latent_shape(17, 32, 32))
    got = sample_latents(
        model, spec.replace(solver=solver, num_steps=3), ["x"], noise, 8.0, conditions=known
    )
    kept = known.strength_T == 0 if op == "edit" else known.mask_T > 0
    assert kept.any() and not kept.all()
    assert torch.equal(got[:, :, kept], known.latents[:, :, kept])
    assert (got[:, :, ~kept] - known.latents[:, :, ~kept]).abs().mean() > 0.05


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_clip_does_not_depend_on_its_batch(files, parts, solver):
    vae, model, spec = parts
    spec = spec.replace(solver=solver, condition_scale=2.0, guidance_rescale=0.5, num_steps=3)
    prepared = prepare(request(files, "extend", "a.mp4"), SHAPE, vae.geometry)
    known = encode_conditions(prepared.condition_frames, vae, spec)
    prompts, keys = ["red", "a longer prompt", ""], [(0, i) for i in range(3)]

    def latents(rows):
        noise = draw_noise(3, "sample", [keys[i] for i in rows], vae.latent_shape(17, 32, 32))
        return sample_latents(model, spec, [prompts[i] for i in rows], noise, 8.0, conditions=known)

    together = latents([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(latents([i])[0], together[i], rtol=0, atol=2e-5)
    assert torch.equal(latents([0, 1, 2]), together)


def test_both_scales_interval_and_rescale_are_what_they_say(files, parts):
    vae, model, spec = parts
    prepared = prepare(request(files, "i2v", "first.png"), SHAPE, vae.geometry)
    known = encode_conditions(prepared.condition_frames, vae, spec)
    noise = draw_noise(3, "sample", [(0, 0)], vae.latent_shape(17, 32, 32))
    mask = known.mask_T[None]
    free = (mask == 0)[:, None, :, None, None]
    z = torch.where(free, interpolate(known.latents, noise, torch.tensor([0.5])), known.latents)
    t = torch.where(mask > 0, 0.0, 0.5)
    dropped = torch.where(free, z, interpolate(known.latents, noise, torch.tensor([0.5])))

    def call(z, t, mask, prompt):
        return model(z, t, model.tokenize([prompt]), mask_BT=mask, fps_B=torch.tensor([8.0]))

    v = call(z, t, mask, "red")
    v_condition = call(z, t, mask, "dull")
    v_null = call(dropped, torch.full_like(t, 0.5), torch.zeros_like(mask), "dull")
    assert (v_condition - v_null).abs().max() > 1e-3

    def guided(**changes):
        wanted = spec.replace(guidance_scale=4.0, **changes)
        return GuidedVelocity(model, wanted, ["red"], noise, 8.0, "dull", known, 0.0)(z, t)

    both = guide_both(v, v_condition, v_null, 4.0, 2.5)
    close = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(guided(condition_scale=2.5), both, **close)
        expected = rescale(both, v, 0.7, 1 - mask)
        got = guided(condition_scale=2.5, guidance_rescale=0.7)
        torch.testing.assert_close(got, expected, **close)
        torch.testing.assert_close(guided(guidance_from=0.6), v, **close)
        torch.testing.assert_close(guided(guidance_to=0.4, condition_scale=2.5), v, **close)
        inside = guided(guidance_from=0.5, guidance_to=0.5)
    torch.testing.assert_close(inside, v_condition + 4 * (v - v_condition), **close)


# --- mistakes ---


@pytest.mark.parametrize(
    ("op", "names", "settings", "facts"),
    [
        ("zoom", [], {}, ("--op", "'zoom'", "choose", "t2v")),
        ("i2v", [], {}, ("0 images and 0 videos", "image")),
        ("t2v", ["first.png"], {}, ("--op t2v", "--image")),
        ("i2v", ["a.mp4"], {}, ("0 images and 1 video",)),
        ("i2v", ["first.png", "a.mp4"], {}, ("1 image and 1 video",)),
        ("extend", ["first.png"], {}, ("--op extend", "--image")),
        ("connect", ["a.mp4"], {}, ("1 video", "video to another")),
        ("extend", ["gone.mp4"], {}, ("no file",)),
        ("extend", ["broken.mp4"], {}, ("broken.mp4", "video")),
        ("extend", ["short.mp4"], {}, ("3 frames", "8", "5")),
        ("edit", ["short.mp4"], {}, ("3 frames", "8", "17")),
        ("extend", ["a.mp4"], {"frames_given": 6}, ("the nearest is 5",)),
        ("extend-back", ["a.mp4"], {"frames_given": 5}, ("the nearest is 4",)),
        ("extend", ["a.mp4"], {"frames_given": 17}, ("the nearest is 13",)),
        ("extend", ["a.mp4"], {"gap": (5, 9)}, ("--op extend", "--gap")),
        ("infill", ["a.mp4"], {"gap": (4, 9)}, ("nearest", "5:9")),
        ("infill", ["a.mp4"], {"gap": (9, 30)}, ("nearest", "9:13")),
        ("edit", ["a.mp4"], {"strength": (0.5, 1.5)}, ("--strength is 1.5",)),
        ("edit", ["a.mp4"], {"strength": (0.0,)}, ("nothing would change",)),
        ("t2v", [], {"strength": (0.5,)}, ("--op t2v", "--strength")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_a_sentence(files, op, names, settings, facts):
    with pytest.raises(UserError) as caught:
        prepare(request(files, op, *names, **settings), SHAPE, GEOMETRY)
    says(caught.value, *facts)


@pytest.mark.parametrize(
    "op", [op for op in OPERATIONS if op not in ("t2v", "t2i", "edit", "upscale")]
)
def test_a_clip_too_short_for_an_operation_is_told_the_shortest(files, op):
    names = ["a.mp4"] * OPERATIONS[op].videos or ["first.png"]
    for frames in (1, 5, 9):
        shape = ClipShape(frames, 32, 32, 8)
        try:
            prepared = prepare(request(files, op, *names), shape, GEOMETRY)
        except UserError as error:
            assert frames < 9
            assert f"--frames {5 if op in ('i2v', 'extend', 'extend-back') else 9}" in str(error)
        else:
            mask_T = prepared.condition_frames.mask_T
            assert 0 < mask_T.sum() < len(mask_T)


def test_each_prompt_is_led_away_from_its_own_negative(parts):
    vae, model, spec = parts
    noise = torch.stack(
        [draw_noise(i, "n", [(0, i)], vae.latent_shape(5, 32, 32))[0] for i in (0, 1)]
    )
    wanted = spec.replace(num_steps=1, guidance_scale=3.0)
    both = sample_latents(
        model,
        wanted,
        ["red", "blue"],
        noise,
        8.0,
        negative_prompt=["dull", "a far longer negative"],
    )
    for i, (prompt, negative) in enumerate([("red", "dull"), ("blue", "a far longer negative")]):
        alone = sample_latents(
            model, wanted, [prompt], noise[i : i + 1], 8.0, negative_prompt=negative
        )
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        other = sample_latents(
            model, wanted, [prompt], noise[i : i + 1], 8.0, negative_prompt="another one"
        )
        assert (other - alone).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--op", "i2v"], ("0 images",)),
        (["--op", "extend", "--video", "a.mp4", "--frames-given", "3"], ("the nearest is 1",)),
        (["--op", "i2v", "--image", "first.png", "--frames", "5", "--size", "40x32"], ("32x32",)),
        (["--op", "i2v", "--image", "first.png", "--frames", "6"], ("for example 5",)),
        (["--guidance-interval", "0.9:0.1"], ("guidance_from",)),
        (["--guidance-interval", "all"], ("--guidance-interval", "'all'")),
        (["--dtype", "half"], ("--dtype half", "float32, bfloat16")),
        (["--solver", "dpm"], ("euler, heun, unipc",)),
        (["--op", "edit", "--video", "a.mp4", "--strength", "much"], ("--strength is 'much'",)),
        (["--op", "infill", "--video", "a.mp4", "--gap", "9"], ("--gap is '9'",)),
        (["--fps", "0"], ("--fps is 0",)),
        (["--condition-noise", "0.1"], ("--op t2v gives none",)),
        (["--condition-scale", "2"], ("--op t2v gives none",)),
        (["--negative-prompt", "dull", "--guidance-scale", "1"], ("raise --guidance-scale",)),
        (["--prompt", "a\x1bb"], ("--prompt", "U+001B", "take it out")),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    finished_run: Path, files, flags, facts, monkeypatch, tmp_path
):
    monkeypatch.chdir(files)
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        run(["sample", "--ckpt", str(finished_run), "--prompt", "x", "--out", str(out), *flags])
    says(caught.value, *facts)
    assert not out.exists()


def test_bfloat16_halves_the_transformer_and_keeps_the_video(finished_run: Path):
    """Rounding of 2^-9 a product, not another video: the pixels' mean difference is a few levels of 255 at most."""
    wide, narrow = (
        api.load(finished_run, dtype=dtype, device="cpu") for dtype in ("auto", "bfloat16")
    )
    assert {one.dtype for one in wide.model.transformer.parameters()} == {torch.float32}
    assert {one.dtype for one in narrow.model.transformer.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in narrow.vae.parameters()} == {torch.float32}
    clips = [one.sample(["x"], frames=5, steps=4)[0].astype(float) for one in (wide, narrow)]
    apart = abs(clips[0] - clips[1]).mean()
    assert 0 < apart < 3


def test_an_untrained_operation_is_told_and_goes_on(finished_run: Path, files, tmp_path, capsys):
    flags = [
        "sample",
        "--ckpt",
        str(finished_run),
        "--prompt",
        "x",
        "--steps",
        "1",
        "--frames",
        "5",
    ]
    extend = ["--op", "extend", "--video", str(files / "a.mp4"), "--out", str(tmp_path / "extend")]
    assert run([*flags, *extend]) == 0
    told = capsys.readouterr()
    says(told.err, "not trained", "extend")
    assert "i2v 25 %" in told.err
    assert (tmp_path / "extend" / "contact_sheet.png").is_file()
    image = ["--op", "i2v", "--image", str(files / "first.png"), "--out", str(tmp_path / "i2v")]
    assert run([*flags, *image]) == 0
    assert capsys.readouterr().err == ""
    assert run([*flags[:-2], "--op", "t2i", "--out", str(tmp_path / "t2i")]) == 0
    assert Image.open(tmp_path / "t2i" / "000.png").size == (32, 32)

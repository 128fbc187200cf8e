"""What is uploaded and what was made: judged by its bytes, within limits, whole, and with flat memory."""

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import skimage.data
from PIL import Image

from sora_train.serving.safety import files, pictures
from sora_train.serving.safety.decision import Entry
from sora_train.serving.safety.files import BadFile, frames_of, kind_of, picture_of
from sora_train.serving.safety.policy import Policy
from sora_train.serving.safety.policy_file import UploadLimits
from tests.sentences import refuses

LIMITS = UploadLimits(image_bytes=1 << 20, image_pixels=300_000, video_bytes=1 << 20, video_pixels=20_000,
                      video_seconds=4.0, video_frames=80)  # fmt: skip
TOP = """
categories:
  bare: {action: block, says: bare skin, terms: [naked]}
"""


class Kept:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def record(self, entry: Entry) -> None:
        self.entries.append(entry)


def policy(tmp_path: Path, text: str = "", audit: Kept | None = None) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(TOP + text)
    return Policy.read(path, audit=audit)


def saved(path: Path, picture: np.ndarray | Image.Image, form: str, **options) -> Path:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, form, **options)
    return path


def clip(
    path: Path, frames: list[np.ndarray], fps: int = 10, form: str = "mp4", codec: str = "libx264"
) -> Path:
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def greys(count: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """Frames, each of a grey of its own."""
    return [
        np.full((height, width, 3), 20 + 200 * number // count, np.uint8) for number in range(count)
    ]


# --- what a file is ---


def test_a_file_is_what_its_bytes_are_whatever_its_name(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    for form in ("PNG", "JPEG", "WEBP"):
        path = saved(tmp_path / "clip.mp4", picture, form)
        assert kind_of(path.read_bytes()[:16]) == ("image", form.lower())
        assert picture_of(path, LIMITS).shape == (8, 8, 3)
    for form, codec in (("mp4", "libx264"), ("mov", "libx264"), ("webm", "libvpx-vp9")):
        path = clip(tmp_path / "picture.png", greys(3), form=form, codec=codec)
        assert kind_of(path.read_bytes()[:16])[0] == "video"
        assert len(list(frames_of(path, 2.0, LIMITS))) == 2


WRONG = {
    "empty": b"",
    "text": b"hello",
    "html": b"<html><script>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "playlist": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/\n",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "zip": b"PK\x03\x04" + bytes(100),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "gif": b"GIF89a" + bytes(100),
    "tiff": b"II*\0" + bytes(100),
    "bmp": b"BM" + bytes(100),
    "elf": b"\x7fELF" + bytes(100),
    "heic": b"\0\0\0\x18ftypheic" + bytes(100),
    "avi": b"RIFF\0\0\0\0AVI LIST" + bytes(100),
}


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("wrong", WRONG)
def test_other_files_are_refused(tmp_path, wrong, kind):
    path = tmp_path / ("a.png" if kind == "image" else "a.mp4")
    path.write_bytes(WRONG[wrong])
    with refuses(BadFile, "by its bytes", "send"):
        policy(tmp_path).judge_upload(path, kind)


@pytest.mark.parametrize("head", ["\x89PNG\r\n\x1a\n", "\xff\xd8\xff", "RIFF\x10\0\0\0WEBPVP8 "])
def test_a_head_alone_is_no_picture(tmp_path, head):
    path = tmp_path / "a.png"
    path.write_bytes(head.encode("latin-1") + bytes(200))
    with refuses(BadFile, "picture", "save it anew"):
        policy(tmp_path).judge_upload(path, "image")


@pytest.mark.parametrize("head", ["\0\0\0\x18ftypmp42", "\x1a\x45\xdf\xa3"])
def test_a_head_alone_is_no_clip(tmp_path, head):
    path = tmp_path / "a.mp4"
    path.write_bytes(head.encode("latin-1") + b"#EXTM3U\nhttp://127.0.0.1/" + bytes(200))
    with refuses(BadFile, "clip", "encode it anew"):
        policy(tmp_path).judge_upload(path, "video")


def test_a_picture_is_no_clip_and_a_clip_no_picture(tmp_path):
    picture = saved(tmp_path / "a.mp4", np.zeros((8, 8, 3), np.uint8), "PNG")
    with refuses(BadFile, "png image", "MP4"):
        policy(tmp_path).judge_upload(picture, "video")
    with refuses(BadFile, "mp4 video", "PNG"):
        policy(tmp_path).judge_upload(clip(tmp_path / "a.png", greys(3)), "image")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated_pictures_are_refused(tmp_path, form):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = saved(tmp_path / "whole", noise, form)
    assert policy(tmp_path).judge_upload(path, "image").allowed
    data = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with refuses(BadFile, "picture", "save it anew"):
            policy(tmp_path).judge_upload(path, "image")


def test_truncated_clips_are_refused(tmp_path):
    data = clip(tmp_path / "whole", greys(20)).read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "part").write_bytes(data[: int(len(data) * share)])
        with refuses(BadFile, "clip", "encode it anew"):
            policy(tmp_path).judge_upload(tmp_path / "part", "video")


def test_damaged_clips_are_refused(tmp_path, real_videos):
    with refuses(BadFile, "28 of 50 frames"):
        policy(tmp_path).judge_upload(real_videos / "corrupted.mp4", "video")


def test_pictures_that_move_are_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form in ("PNG", "WEBP"):
        path = saved(tmp_path / "a", frames[0], form, save_all=True, append_images=frames[1:])
        with refuses(BadFile, "animated", "still"):
            picture_of(path, LIMITS)


# --- bombs ---


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of one colour, of which a gigabyte is a megabyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packer, body = zlib.compressobj(9), b""
    for _ in range(min(height, 400)):
        body += packer.compress(bytes(1 + 3 * width))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", body + packer.flush())
        + chunk(b"IEND", b"")
    )


def test_a_picture_of_too_many_pixels_is_refused_by_its_head(tmp_path):
    path = tmp_path / "a.png"
    # Whoever decodes it finds no pixels.
    path.write_bytes(bomb_png(30_000, 30_000).replace(b"IDAT\x78", b"IDAT\0"))
    tracemalloc.start()
    with refuses(BadFile, "30000x30000", "300000"):
        picture_of(path, LIMITS)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_limits_are_of_bytes_pixels_seconds_and_frames(tmp_path):
    ok = [clip(tmp_path / "ok.mp4", greys(40))]
    assert all(list(frames_of(path, 2.0, LIMITS)) for path in ok)
    with refuses(BadFile, "longer than 4 s", "cut"):
        list(frames_of(clip(tmp_path / "long.mp4", greys(50)), 2.0, LIMITS))
    with refuses(BadFile, "80 frames", "cut"):
        list(frames_of(clip(tmp_path / "many.mp4", greys(90), fps=60), 2.0, LIMITS))
    with refuses(BadFile, "256x128", "20000"):
        list(frames_of(clip(tmp_path / "large.mp4", greys(3, 128, 256)), 2.0, LIMITS))
    (tmp_path / "heavy.mp4").write_bytes((tmp_path / "ok.mp4").read_bytes() + bytes(1 << 20))
    with refuses(BadFile, "bytes", str(1 << 20)):
        list(frames_of(tmp_path / "heavy.mp4", 2.0, LIMITS))
    heavy = saved(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), "PNG")
    heavy.write_bytes(heavy.read_bytes() + bytes(1 << 20))
    with refuses(BadFile, "image", "bytes", str(1 << 20)):
        picture_of(heavy, LIMITS)


def test_frames_that_grow_after_the_first_are_refused(tmp_path):
    """Raw H.264 with another size half way: the container says what the first frame has."""
    parts = []
    for height, width in ((64, 96), (512, 512)):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for frame in greys(5, height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        parts.append(buffer.getvalue())
    path = tmp_path / "grows.mp4"
    path.write_bytes(b"".join(parts))
    # As MPEG-TS it would be turned away by its bytes; the limit must hold whatever the container.
    monkey = pytest.MonkeyPatch()
    monkey.setattr(files, "kind_of", lambda head: ("video", "mp4"))
    try:
        with refuses(BadFile, "clip"):
            list(frames_of(path, 2.0, LIMITS))
    finally:
        monkey.undo()


def test_time_is_limited(tmp_path):
    path = clip(tmp_path / "a.mp4", greys(40))
    with refuses(BadFile, "1e-06 s", "scale it down"):
        list(frames_of(path, 2.0, UploadLimits(work_seconds=1e-6)))


PEAK = """
import resource, sys
from pathlib import Path
from sora_train.serving.safety.files import frames_of
for path in sys.argv[1:]:
    count = sum(1 for _ in frames_of(Path(path), 2.0))
    print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_length(tmp_path):
    frames = greys(20, 480, 640)
    short, long = clip(tmp_path / "a.mp4", frames), clip(tmp_path / "b.mp4", frames * 20)
    told = subprocess.run(
        [sys.executable, "-c", PEAK, short, long], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(told[0]) == 5 and int(told[2]) == 81
    # 380 more frames of 0.9 MB each.
    assert int(told[3]) - int(told[1]) < 40


# --- which frames ---


@pytest.mark.parametrize(
    "fps, count, wanted",
    [(10, 40, 9), (30, 30, 3), (25, 1, 1), (2, 7, 7), (1, 3, 3), (24, 120, 11)],
)
def test_two_frames_a_second_and_the_last_one(tmp_path, fps, count, wanted):
    path = clip(tmp_path / "a.mp4", greys(count), fps=fps)
    levels = [int(frame.mean()) for frame in frames_of(path, 2.0)]
    assert len(levels) == wanted
    step = max(1, fps // 2)
    places = sorted({*range(0, count, step), count - 1})
    assert levels == pytest.approx([20 + 200 * place // count for place in places], abs=4)


# --- what is in it ---


@pytest.fixture
def scores(monkeypatch) -> dict[int, float]:
    """Grey level -> probability that the classifier gives pictures of it; 0 for others."""
    given: dict[int, float] = {}

    def nsfw(shown):
        return max(given.get(int(round(picture.mean() / 10) * 10), 0.0) for picture in shown)

    monkeypatch.setattr(pictures, "nsfw", nsfw)
    return given


def test_one_frame_blocks_the_whole_video(tmp_path, scores):
    kept = Kept()
    judge = policy(tmp_path, "outputs: {nsfw: 0.7}\n", kept).judge_video
    path = clip(tmp_path / "a.mp4", greys(40))
    assert judge(path).allowed
    scores[170] = 0.69
    assert judge(path).allowed
    scores[170] = 0.7
    decision = judge(path, subject="video_1")
    assert not decision.allowed and decision.category == "sexual" and decision.reason
    assert kept.entries[-1].action == "block" and kept.entries[-1].subject == "video_1"
    assert kept.entries[-1].stage == "video" and "0.70" in kept.entries[-1].rules[0]


def test_the_last_frame_is_looked_at_too(tmp_path, scores):
    scores[210] = 1.0
    assert not policy(tmp_path).judge_video(clip(tmp_path / "a.mp4", greys(39))).allowed


def test_uploads_have_a_threshold_of_their_own_which_is_stricter(tmp_path, scores):
    shipped = Policy.default()
    scores[60] = 0.5
    path = saved(tmp_path / "a.png", np.full((64, 64, 3), 60, np.uint8), "PNG")
    decision = shipped.judge_upload(path, "image")
    assert not decision.allowed and decision.rules == ("upload: nsfw",)
    assert shipped.judge_video(
        clip(tmp_path / "a.mp4", [np.full((64, 64, 3), 60, np.uint8)] * 9)
    ).allowed


def test_a_video_that_cannot_be_decoded_is_no_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with refuses(BadFile, "encode it anew"):
        policy(tmp_path).judge_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "faces, allowed, rules", [("block", False, 1), ("log", True, 1), ("allow", True, 0)]
)
def test_faces_of_uploads_are_what_the_policy_makes_of_them(tmp_path, kind, faces, allowed, rules):
    person, cat = skimage.data.astronaut()[:400, :400], skimage.data.chelsea()[:300, :400]
    kept = Kept()
    judge = policy(tmp_path, f"uploads: {{faces: {faces}, nsfw: 1.0}}\n", kept).judge_upload

    def upload(picture: np.ndarray) -> Path:
        if kind == "image":
            return saved(tmp_path / "a.png", picture, "PNG")
        return clip(tmp_path / "a.mp4", [picture] * 12)

    decision = judge(upload(person), kind)
    assert decision.allowed == allowed and len(decision.rules) == rules
    assert kept.entries[-1].action == ("block" if not allowed else "log" if rules else "allow")
    assert not allowed or not decision.reason
    assert judge(upload(cat), kind).allowed


@pytest.mark.parametrize(
    "lefts, is_found", [((0.1,), True), ((0.1, 0.12), True), ((0.1, 0.6, 0.1), False)]
)
def test_a_face_of_a_clip_is_in_about_the_same_place_twice(monkeypatch, lefts, is_found):
    seen = iter(lefts)
    monkeypatch.setattr(pictures, "boxes", lambda *given: [(next(seen), 0.2, 0.3, 0.3)])
    watch = pictures.Watch(1.0, looks_for_faces=True)
    for _ in lefts:
        watch.see(np.zeros((8, 8, 3), np.uint8))
    watch.end()
    assert ("faces" in watch.found) == is_found


def test_the_classifier_of_the_wheel_lets_a_cat_and_an_astronaut_pass(tmp_path):
    judge = policy(tmp_path, "uploads: {faces: allow}\n").judge_upload
    for picture in (skimage.data.chelsea(), skimage.data.astronaut()):
        assert judge(saved(tmp_path / "a.png", picture, "PNG"), "image").allowed

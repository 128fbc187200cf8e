"""What is read from a file is what a player shows: orientation, alpha, 16 bits, HDR, interlacing, matrix."""

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from sentences import refuses

from sora_train.data.decode import frames as decode
from sora_train.data.decode import hdr, picture
from sora_train.data.decode.frames import BadClip, DecodeRequest
from sora_train.data.decode.probe import Probe, ProbeRequest, probe_video
from sora_train.data.decode.rgb import colour, over
from sora_train.data.decode.video_io import encode_h264

SIZE = (64, 96)
GREEN, MAGENTA = (20, 160, 20), (255, 0, 255)


def probed(path: Path, count: str = "decode") -> Probe:
    kind = "image" if path.suffix in (".png", ".jpg", ".webp") else "video"
    return probe_video(ProbeRequest(0, path.name, str(path), 0, path.stat().st_size, kind, count))


def read(
    path: Path,
    times: tuple[float, ...] = (0.0,),
    background: str = "black",
    **size: int,
) -> np.ndarray:
    """The frames at some times as training and sampling read them, at their own size or another."""
    found = probed(path)
    shown = (found.height, found.width)
    kind = "image" if not found.fps else "video"
    return decode.decode_frames(
        DecodeRequest(
            0, path.name, str(path), 0, path.stat().st_size, kind, times, (0, 0, *shown), shown,
            size.get("height", shown[0]), size.get("width", shown[1]), start=found.start,
            fps=found.fps, traits=found.traits, alpha_background=background,
        )
    )  # fmt: skip


def write(
    path: Path,
    frames: list[np.ndarray],
    codec: str,
    layout: str,
    pix_fmt: str,
    options: dict[str, str] | None = None,
    **tags: int,
) -> Path:
    """A clip of 8 frames a second; `tags` are those of the codec context."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        if path.suffix == ".webm":
            stream.metadata["alpha_mode"] = "1"
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=layout)
            frame.pts, frame.time_base = index, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# -- orientation --------------------------------------------------------------------------------

ORIENTATIONS = {
    (1, 0, 0, 1): lambda frame: frame,
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),
    (-1, 0, 0, -1): lambda frame: np.rot90(frame, 2),
    (0, -1, 1, 0): np.rot90,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda frame: frame.swapaxes(0, 1),
    (0, -1, -1, 0): lambda frame: np.rot90(frame, 2).swapaxes(0, 1),
}
# The filters that FFmpeg's own documentation gives for them.
FILTERS = {
    (0, 1, -1, 0): "transpose=clock",
    (-1, 0, 0, -1): "transpose=clock,transpose=clock",
    (0, -1, 1, 0): "transpose=cclock",
    (-1, 0, 0, 1): "hflip",
    (1, 0, 0, -1): "vflip",
    (0, 1, 1, 0): "transpose=cclock_flip",
    (0, -1, -1, 0): "transpose=clock_flip",
}


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """An mp4 that is to be shown by the display matrix a, b, c, d."""
    a, b, c, d = (value << 16 for value in matrix)
    data = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(plain, data.index(b"tkhd"))
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def uneven() -> np.ndarray:
    """A frame that no turn and no mirror leaves as it is."""
    frame = np.zeros((*SIZE, 3), np.uint8)
    frame[:20, :30], frame[:20, 60:], frame[50:, :12] = (
        (200, 40, 40),
        (40, 200, 40),
        (240, 240, 240),
    )
    return frame


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_every_display_matrix(tmp_path: Path, matrix: tuple[int, int, int, int]):
    path = tmp_path / "a.mp4"
    encode_h264(np.stack([uneven()] * 3), 8, path)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        stored = frame.to_ndarray(format="rgb24")
    (seen,) = read(with_matrix(path, matrix))
    assert (seen == ORIENTATIONS[matrix](stored)).all()
    found = probed(path)
    assert (found.height, found.width) == seen.shape[:2]
    assert probed(path, "header").traits == found.traits
    assert ("mirrored" in found.traits) == (matrix[0] * matrix[3] < matrix[1] * matrix[2])
    if matrix in FILTERS:
        graph = av.filter.Graph()
        names = [text.split("=") for text in FILTERS[matrix].split(",")]
        rgb = frame.reformat(format="rgb24")
        nodes = [graph.add_buffer(
            width=rgb.width, height=rgb.height, format=rgb.format.name, time_base=Fraction(1, 8)
        )]  # fmt: skip
        nodes += [graph.add(name, *arguments) for name, *arguments in names]
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        graph.vpush(rgb)
        assert (graph.vpull().to_ndarray(format="rgb24") == seen).all()


# -- alpha ----------------------------------------------------------------------------------------


def cutout() -> np.ndarray:
    """RGBA: green in the middle, and magenta where nothing is to be seen."""
    frame = np.zeros((*SIZE, 4), np.uint8)
    frame[..., :3] = MAGENTA
    frame[16:48, 32:64] = (*GREEN, 255)
    return frame


def write_vp(path: Path, codec: str) -> Path:
    return write(
        path,
        [cutout()] * 4,
        codec,
        "rgba",
        "yuva420p",
        {"auto-alt-ref": "0", "crf": "4", "b": "2M"},
    )


def write_palette(path: Path) -> Path:
    indices = Image.fromarray((cutout()[..., 3] == 0).astype(np.uint8), "P")
    indices.putpalette([*GREEN, *MAGENTA])
    indices.save(path, transparency=1)
    return path


TRANSPARENT = {
    "qtrle.mov": lambda path: write(path, [cutout()] * 4, "qtrle", "rgba", "argb"),
    "png.mov": lambda path: write(path, [cutout()] * 4, "png", "rgba", "rgba"),
    "prores.mov": lambda path: write(
        path, [cutout()] * 4, "prores_ks", "rgba", "yuva444p10le", {"profile": "4444"}
    ),
    "vp8.webm": lambda path: write_vp(path, "libvpx"),
    "vp9.webm": lambda path: write_vp(path, "libvpx-vp9"),
    "a.png": lambda path: Image.fromarray(cutout()).save(path) or path,
    "a.webp": lambda path: Image.fromarray(cutout()).save(path, lossless=True, exact=True) or path,
    "palette.png": write_palette,
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_lies_under_alpha_is_the_background(tmp_path: Path, name: str):
    path = TRANSPARENT[name](tmp_path / name)
    assert "alpha" in probed(path).traits.split()
    frame = read(path, background="#204060")[0].astype(int)
    inside, outside = frame[20:44, 36:60], np.concatenate([frame[:12], frame[52:]])
    assert np.abs(inside - GREEN).max() <= 12
    assert np.abs(outside - (0x20, 0x40, 0x60)).max() <= 3


def test_half_transparent_pixels_are_mixed_as_pillow_mixes_them(tmp_path: Path):
    rgba = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    below = Image.new("RGBA", SIZE[::-1], (*colour("orange"), 255))
    expected = np.asarray(Image.alpha_composite(below, Image.fromarray(rgba)).convert("RGB"))
    for mixed in (read(tmp_path / "a.png", background="orange")[0], over("orange", rgba)):
        assert np.abs(mixed.astype(int) - expected).max() <= 1
    opaque = np.dstack([rgba[..., :3], np.full(SIZE, 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "b.png")
    assert probed(tmp_path / "b.png").traits == ""


# -- still pictures -----------------------------------------------------------------------------


def test_grey_of_16_bits(tmp_path: Path):
    values = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    seen = read(tmp_path / "a.png")[0]
    assert (seen == np.round(values / 65535 * 255).astype(np.uint8)[..., None]).all()


def test_the_first_of_several_pictures_and_no_animation(tmp_path: Path):
    first, second = (Image.new("RGB", (48, 32), shade) for shade in ("red", "blue"))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert probed(tmp_path / "a.jpg").traits == "first_of_several"
    assert np.abs(read(tmp_path / "a.jpg")[0].astype(int) - (255, 0, 0)).max() <= 2
    first.save(tmp_path / "b.webp", save_all=True, append_images=[second])
    with refuses(BadClip, "animated webp", "convert", "mp4"):
        probed(tmp_path / "b.webp")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels, and holds none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def test_the_size_of_a_picture_is_limited_by_memory_and_not_by_suspicion(tmp_path: Path):
    """200 million pixels are a camera's; Pillow alone would refuse the header of such a file."""
    (tmp_path / "a.png").write_bytes(png_of_size(14000, 14300))
    with pytest.raises(BadClip) as caught:
        probed(tmp_path / "a.png")
    assert "bomb" not in str(caught.value) and "larger" not in str(caught.value)
    (tmp_path / "b.png").write_bytes(png_of_size(60000, 60000))
    with refuses(BadClip, "60000x60000", str(picture.MAX_PIXELS), "scale it down"):
        probed(tmp_path / "b.png")


# -- HDR --------------------------------------------------------------------------------------------


def pq_signal(light: np.ndarray) -> np.ndarray:
    """The inverse EOTF of SMPTE ST 2084, cd/m2 to [0, 1], as the standard writes it."""
    power = (np.asarray(light, np.float64) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def test_pq_and_hlg_are_the_light_of_the_standards():
    assert hdr.pq_light(pq_signal([0.005, 1, 100, 203, 1000, 10000])) == pytest.approx(
        [0.005, 1, 100, 203, 1000, 10000], rel=1e-9
    )
    # BT.2408, table 1: 203 cd/m2 are 58 % of PQ and 75 % of HLG on a display of 1000 cd/m2.
    assert hdr.pq_light(0.58) == pytest.approx(203, rel=0.01)
    assert 1000 * hdr.hlg_scene(0.75) ** 1.2 == pytest.approx(203, rel=0.01)
    assert hdr.hlg_scene([0, 0.5, 1]) == pytest.approx([0, 1 / 12, 1], abs=1e-6)


def test_the_matrix_of_primaries_is_that_of_bt2087():
    published = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    assert hdr.to_bt709(hdr.BT2020) == pytest.approx(np.array(published), abs=1e-4)
    assert hdr.to_bt709(hdr.P3).sum(axis=1) == pytest.approx([1, 1, 1])


def test_the_tone_curve_is_ffmpegs_mobius():
    light = np.concatenate([np.linspace(0, 1.5, 200), np.linspace(1.51, 4.9, 56)]).astype(
        np.float32
    )
    frame = av.VideoFrame(256, 1, "gbrpf32le")
    for plane in frame.planes:
        plane.update(np.pad(light, (0, plane.line_size // 4 - 256)).tobytes())
    frame.pts, frame.time_base = 0, Fraction(1, 8)
    graph = av.filter.Graph()
    source = graph.add_buffer(width=256, height=1, format="gbrpf32le", time_base=Fraction(1, 8))
    peak = hdr.PEAK / hdr.REFERENCE_WHITE
    curve = graph.add("tonemap", f"tonemap=mobius:param={hdr.KNEE}:peak={peak}:desat=0")
    graph.link_nodes(source, curve, graph.add("buffersink")).configure()
    graph.vpush(frame)
    theirs = np.frombuffer(graph.vpull().planes[0], np.float32)[:256]
    ours = hdr.compressed(light.astype(np.float64))
    assert np.abs(ours - theirs).max() < 2e-3
    assert (np.diff(ours) > 0).all() and ours[light <= 0.9] == pytest.approx(light[light <= 0.9])
    assert hdr.compressed(np.array(peak)) == pytest.approx(1.0)


@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
def test_hdr_codes_are_shown_as_the_formulas_say(transfer: int):
    rgb = np.random.default_rng(2).integers(0, 60000, (64, 64, 3), np.uint16)
    signal = rgb / 65535
    if transfer == hdr.PQ:
        light = hdr.pq_light(signal) / 203
    else:
        scene = hdr.hlg_scene(signal)
        luma = scene @ [0.2627, 0.6780, 0.0593]
        light = 1000 / 203 * luma[..., None] ** 0.2 * scene
    light = (light @ hdr.to_bt709(hdr.BT2020).T).clip(0)
    largest = light.max(axis=-1, keepdims=True)
    light *= np.divide(
        hdr.compressed(largest), largest, out=np.ones_like(largest), where=largest > 0
    )
    expected = np.round(255 * light.clip(0, 1) ** (1 / 2.4))
    seen = hdr.as_sdr(rgb, transfer, hdr.BT2020).astype(int)
    assert np.abs(seen - expected).max() <= 1


@pytest.mark.parametrize("smaller", [1, 5])
def test_sdr_colours_in_pq_come_back(tmp_path: Path, smaller: int):
    """A clip of colours at a reference white of 203 cd/m2, written as HDR10 is: BT.2020, 10 bits, limited range."""
    colours = np.array(
        [(200, 120, 60), (30, 30, 30), (128, 128, 128), (235, 235, 235), (40, 200, 60)]
    )
    light = np.linalg.solve(hdr.to_bt709(hdr.BT2020), (203 * (colours / 255) ** 2.4).T).T
    signal = pq_signal(light.clip(0)).repeat(16, axis=0)
    luma = signal @ [0.2627, 0.6780, 0.0593]
    blue, red = (signal[:, 2] - luma) / 1.8814, (signal[:, 0] - luma) / 1.4746
    planes = np.stack([64 + 876 * luma, 512 + 896 * blue, 512 + 896 * red]).round()
    frame = np.ascontiguousarray(planes[:, None].repeat(64, axis=1).astype(np.uint16))
    path = tmp_path / "pq.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv444p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = 16, 9, 9
        context.color_range = 1
        made = av.VideoFrame(80, 64, "yuv444p10le")
        for plane, values in zip(made.planes, frame, strict=True):
            rows = np.zeros((64, plane.line_size // 2), np.uint16)
            rows[:, :80] = values
            plane.update(rows.tobytes())
        made.colorspace, made.color_range, made.color_trc, made.color_primaries = 9, 1, 16, 9
        made.pts, made.time_base = 0, Fraction(1, 8)
        container.mux(stream.encode(made))
        container.mux(stream.encode(None))
    assert probed(path).traits == "pq"
    made = (64 // smaller, 80 // smaller)
    seen = read(path, height=made[0], width=made[1])[0][made[0] // 2].astype(int)
    middles = (8 + 16 * np.arange(5)) // smaller
    assert np.abs(seen[middles] - colours).max() <= 5


# -- interlacing and matrices -------------------------------------------------------------------


def fields(count: int) -> list[np.ndarray]:
    """Frames of two fields each, in which a bar moves on from one field to the next."""
    frames = []
    for index in range(count):
        frame = np.full((*SIZE, 3), 40, np.uint8)
        for field in (0, 1):
            left = 4 * (2 * index + field)
            frame[field::2, left : left + 16] = 220
        frames.append(frame)
    return frames


def write_fields(path: Path) -> Path:
    options = {"crf": "4", "x264-params": "tff=1:bframes=0:keyint=4", "flags": "+ildct+ilme"}
    return write(path, fields(9), "libx264", "rgb24", "yuv420p", options)


def comb(frame: np.ndarray) -> float:
    """How much each row differs from those around it."""
    grey = frame[..., 1].astype(float)
    return float(np.abs(grey[1:-1] - (grey[:-2] + grey[2:]) / 2).mean())


def test_interlaced_frames_are_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_fields(tmp_path / "i.mp4")
    found = probed(path)
    assert (found.frames, found.fps, found.traits) == (9, 8.0, "interlaced")
    with av.open(str(path)) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    times = tuple(index / 8 for index in range(9))
    whole = read(path, times)
    assert comb(stored[4]) > 10 * comb(whole[4])
    monkeypatch.setattr(decode, "SEEK_WORTH_SECONDS", 0.0)
    for first in range(1, 9):
        assert (read(path, times[first:]) == whole[first:]).all(), first


def test_hd_that_names_no_matrix_is_bt709_and_sd_is_bt601(tmp_path: Path):
    colours = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)])
    for height, width, matrix in ((720, 960, 1), (480, 640, 5)):
        frame = np.repeat(colours, width // 3, axis=0)[None].repeat(height, axis=0).astype(np.uint8)
        made = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        yuv = made.reformat(format="yuv444p", dst_colorspace=matrix)
        yuv.colorspace, yuv.color_range = 2, 0
        yuv.pts, yuv.time_base = 0, Fraction(1, 8)
        path = tmp_path / f"{height}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=8)
            stream.height, stream.width, stream.pix_fmt = height, frame.shape[1], "yuv444p"
            container.mux(stream.encode(yuv))
            container.mux(stream.encode(None))
        assert probed(path).traits == ("untagged_hd" if height > 576 else "")
        seen = read(path)[0][height // 2, width // 6 :: width // 3].astype(int)
        assert np.abs(seen - colours).max() <= 2, height

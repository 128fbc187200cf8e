"""Which packets are decoded for some frames: by a brute-force reading of what a decoder needs, and on real decoders."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import CODED_SIZE, code_of, write_coded
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.data.decode import frames as decode
from sora_train.data.decode.frames import DecodeRequest
from sora_train.data.decode.packets import PacketChoice, Unordered
from sora_train.data.decode.probe import ProbeRequest, probe_video

GOP_KEY, REFERENCE, LEAF = "I", "P", "b"


@dataclass(frozen=True)
class Fake:
    pts: int | None
    dts: int | None
    is_keyframe: bool = False
    is_discard: bool = False
    size: int = 1


@st.composite
def streams(draw: st.DrawFn) -> list[Fake]:
    """Closed groups of pictures, each a keyframe and mini-groups of a reference and the frames shown before it."""
    packets: list[Fake] = []
    shown = 0
    gaps = st.integers(1, 5)
    for _ in range(draw(st.integers(1, 5))):
        group = [(shown, True)]
        shown += draw(gaps)
        for _ in range(draw(st.integers(0, 3))):
            leaves = []
            for _ in range(draw(st.integers(0, 3))):
                leaves.append((shown, False))
                shown += draw(gaps)
            group += [(shown, False), *draw(st.permutations(leaves))]
            shown += draw(gaps)
        packets += [Fake(pts, 0, is_key) for pts, is_key in group]
    # Decoding times: rising, each no later than the times of showing from there on.
    latest, dated = 10**9, []
    for packet in reversed(packets):
        latest = min(latest - 1, packet.pts)
        dated.append(Fake(packet.pts, latest, packet.is_keyframe))
    return dated[::-1]


@settings(max_examples=150, deadline=None)
@given(streams(), st.lists(st.floats(0, 60), min_size=1, max_size=6))
def test_what_is_shown_is_decoded_from_its_keyframe_and_no_group_for_nothing(
    packets: list[Fake], limits: list[float]
):
    limits = sorted(limits)
    choice = PacketChoice(iter(packets), limits, float)
    steps = list(choice.steps())
    expected = [max(p.pts for p in packets if p.pts <= limit) for limit in limits]
    assert choice.shown == expected
    place = {packet: number for number, packet in enumerate(packets)}
    decoded = [place[step.packet] for step in steps]
    assert decoded == sorted(set(decoded)), "each once, in the order of the file"
    group = np.cumsum([packet.is_keyframe for packet in packets])
    for number, step in zip(decoded, steps, strict=True):
        assert step.jumps == (number > decoded[0] and number - 1 not in decoded)
        assert not step.jumps or step.packet.is_keyframe
        assert not (step.droppable and step.packet.pts in expected)
    for pts in expected:
        last = next(number for number, packet in enumerate(packets) if packet.pts == pts)
        begin = max(number for number in range(last + 1) if packets[number].is_keyframe)
        assert set(range(begin, last + 1)) <= set(decoded), "all it may refer to"
    wanted = {group[place[p]] for p in packets if p.pts in expected}
    assert {group[number] for number in decoded} == wanted
    assert choice.holds_more == any(packet.pts > limits[-1] for packet in packets)


@pytest.mark.parametrize(
    "packets",
    [
        [Fake(None, 0, True)],
        [Fake(5, 5, True), Fake(6, 6)],
        # The fifth packet is shown before the fourth is decoded.
        [Fake(0, 0, True), *(Fake(n, n) for n in range(3, 8)), Fake(1, 8), *(Fake(n, n) for n in range(9, 30))],
    ],
)  # fmt: skip
def test_times_that_contradict_each_other_are_not_gone_by(packets: list[Fake]):
    with pytest.raises(Unordered):
        list(PacketChoice(iter(packets), [2.0, 20.0], float).steps())


ENCODERS = {
    "h264": ("libx264", {"g": "12", "bf": "3"}, "mp4"),
    "h264_mkv": ("libx264", {"g": "12", "bf": "3"}, "mkv"),
    "h264_open": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}, "mp4"),
    "hevc": ("libx265", {"x265-params": "keyint=12:log-level=none"}, "mp4"),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "12"}, "webm"),
    "av1": ("libsvtav1", {"preset": "13", "g": "12"}, "mp4"),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ticks of the frames that come out of the decoder."""
    seen: list[int] = []
    filled = decode._filled

    def counting(frames: Iterator[av.VideoFrame], *args: object, **options: object) -> object:
        def through() -> Iterator[av.VideoFrame]:
            for frame in frames:
                seen.append(frame.pts)
                yield frame

        return filled(through(), *args, **options)

    monkeypatch.setattr(decode, "_filled", counting)
    return seen


def asked(path: Path, times: tuple[float, ...]) -> DecodeRequest:
    size = path.stat().st_size
    found = probe_video(ProbeRequest(0, path.name, str(path), 0, size, "video"))
    return DecodeRequest(
        0, path.name, str(path), 0, size, "video", times, (0, 0, *CODED_SIZE), CODED_SIZE, *CODED_SIZE,
        start=found.start, fps=found.fps,
    )  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_frames_spread_over_a_clip_do_not_cost_those_between(
    tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch, name: str
):
    """84 frames, a keyframe each 12: one frame of each group. Their pixels are those of decoding everything."""
    codec, options, suffix = ENCODERS[name]
    base, step = (Fraction(1, 1000), 40) if suffix in ("mkv", "webm") else (Fraction(1, 25), 1)
    ticks = [step * number for number in range(84)]
    path = write_coded(tmp_path / f"a.{suffix}", ticks, base, codec=codec, options=options)
    numbers = [1, 13, 26, 38, 50, 62, 74]
    request = asked(path, tuple(number / 25 for number in numbers))
    chosen = decode.decode_frames(request)
    assert [code_of(frame) for frame in chosen] == numbers
    if name != "h264_open":
        assert len(counted) <= 35, counted
    monkeypatch.setattr(decode, "_pick", only_whole(decode._pick))
    counted.clear()
    assert np.array_equal(decode.decode_frames(request), chosen)
    assert len(counted) >= 75


def only_whole(pick: Callable) -> Callable:
    """`_pick` where nothing may be left out."""

    def picked(container: object, stream: object, request: object, choice: object, *, sought: bool):
        return None if choice or sought else pick(container, stream, request, None, sought=False)

    return picked


def test_a_run_ends_with_its_last_frame(tmp_path: Path, counted: list[int]):
    """Nothing is decoded that comes after it, whatever the decoder holds back."""
    path = write_coded(tmp_path / "a.mp4", list(range(84)), Fraction(1, 25))
    request = asked(path, tuple(number / 25 for number in range(5)))
    assert [code_of(frame) for frame in decode.decode_frames(request)] == list(range(5))
    assert len(counted) <= 8

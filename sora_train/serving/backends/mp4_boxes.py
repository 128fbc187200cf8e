"""Whether an mp4 is all there: a download that ends early often opens, and plays up to where it ends."""

import struct
from pathlib import Path

import av

NEEDED = {b"ftyp", b"moov", b"mdat"}


def mp4_fault(path: Path) -> str:
    """What is wrong with a file, as the end of a sentence; '' for an mp4 that is whole and shows a first frame."""
    fault = _fault_of_boxes(path)
    if fault:
        return fault
    try:
        with av.open(str(path)) as container:
            next(container.decode(video=0))
    except (av.error.FFmpegError, IndexError, StopIteration):
        return "shows no picture"
    return ""


def _fault_of_boxes(path: Path) -> str:
    """Boxes fill the file to its last byte, and those that every mp4 has are there."""
    size = path.stat().st_size
    found: set[bytes] = set()
    with path.open("rb") as file:
        place = 0
        while place < size:
            file.seek(place)
            head = file.read(16)
            if len(head) < 8:
                return "ends within a box"
            length, kind = struct.unpack(">I4s", head[:8])
            least = 8
            if length == 1 and len(head) == 16:
                length, least = struct.unpack(">Q", head[8:])[0], 16
            elif length == 0:
                length = size - place  # the last box, up to the end
            if not found and kind != b"ftyp":
                return "is no mp4"
            if length < least:
                return "has a box of no size"
            found.add(kind)
            place += length
    if place > size:
        return "ends within a box"
    return "" if found >= NEEDED else "lacks a part that every mp4 has"

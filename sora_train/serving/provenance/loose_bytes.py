"""The bytes of a manifest that no hash and no signature covers: labels, sizes and padding of its boxes.

Readers of C2PA pass over them, and nothing that a person is shown depends on them. But a manifest of which a byte was
flipped is a damaged one, so here they must be what the specification says.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BOX = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
"""The type of the `uuid` box in which an mp4 has its manifests."""
_PURPOSE = bytes(4) + b"manifest\0"
_LABELS = {
    b"c2pa": (b"c2pa",),
    b"c2as": (b"c2pa.assertions",),
    b"c2cl": (b"c2pa.claim", b"c2pa.claim.v2"),
    b"c2cs": (b"c2pa.signature",),
}
"""The only labels of the boxes of C2PA's own types, which are the first four bytes of a description."""
_UNSIGNED_HEADERS = {"pad", "pad2", "sigTst", "sigTst2", "rVals", "x5chain", 33}
_PADDING = {"pad", "pad2"}
_NO_TOGGLES = 0xE0
_CBOR_NULL = 22


class Damaged(Exception):
    """What is wrong with the form of a manifest."""


def check_form(path: Path) -> None:
    """Raises Damaged where a byte that nothing covers is not what it must be; OSError where the file is not read."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for kind, start, end in _boxes(data, 0, len(data), strict=False):
            if kind == b"uuid" and data[start : start + 16] == _BOX:
                _check_store(data[start + 16 : end])


def _check_store(box: bytes) -> None:
    if not box.startswith(_PURPOSE):
        raise Damaged("the manifest's box does not say that it is one")
    start = len(_PURPOSE) + 8
    if any(box[len(_PURPOSE) : start]):
        raise Damaged("the manifest's box points to another that nobody wrote")
    _check_boxes(box, start, len(box))


def _boxes(
    data: Any, start: int, end: int, *, strict: bool = True
) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of what is in each box; all of them fill the space, if `strict`."""
    while start < end:
        size, header = int.from_bytes(data[start : start + 4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        elif size == 0 and not strict:
            size = end - start
        if size < header or start + size > end:
            if strict:
                raise Damaged("a box of the manifest has the wrong size")
            return
        yield data[start + 4 : start + 8], start + header, start + size
        start += size


def _check_boxes(data: bytes, start: int, end: int) -> None:
    """A box of boxes: a description first, and content whose kind that tells."""
    for kind, inside, after in _boxes(data, start, end):
        if kind != b"jumb":
            continue
        boxes = list(_boxes(data, inside, after))
        if not boxes or boxes[0][0] != b"jumd":
            raise Damaged("a box of the manifest has no description")
        _, at, stop = boxes[0]
        if data[at + 16] & _NO_TOGGLES:
            raise Damaged("a description of the manifest has flags that there are not")
        of = data[at : at + 4]
        label = data[at + 17 : stop].partition(b"\0")[0]
        if of in _LABELS and label not in _LABELS[of]:
            raise Damaged(f"a box of the manifest has the label {label!r}")
        if of == b"c2cs":
            for _, at, stop in boxes[1:]:
                _check_signature(data[at:stop])
        _check_boxes(data, stop, after)


def _check_signature(cose: bytes) -> None:
    """COSE's four parts: protected headers, others, the payload that is elsewhere, the signature."""
    try:
        parts, end = _cbor(cose, 0)
        headers = dict(parts[1])
    except (ValueError, IndexError, TypeError):
        raise Damaged("the signature is not written as COSE") from None
    if len(parts) != 4 or end != len(cose) or parts[2] != _CBOR_NULL:
        raise Damaged("the signature is not of a payload that is elsewhere")
    unknown = set(headers) - _UNSIGNED_HEADERS
    if unknown:
        raise Damaged(f"the signature has unknown headers: {sorted(map(str, unknown))}")
    if any(any(headers.get(name, b"")) for name in _PADDING):
        raise Damaged("the signature's padding is not empty")


def _cbor(data: bytes, at: int) -> tuple[Any, int]:
    """One item of CBOR of definite length, and where it ends; a map as a list of pairs."""
    major, length = data[at] >> 5, data[at] & 31
    at += 1
    if length > 27:
        raise ValueError("of no definite length")
    if length > 23:
        width = 1 << (length - 24)
        length, at = int.from_bytes(data[at : at + width], "big"), at + width
    if major in (2, 3):
        text = data[at : at + length]
        return (text if major == 2 else text.decode()), at + length
    if major == 6:
        return _cbor(data, at)
    if major in (4, 5):
        items = []
        for _ in range(length * (major - 3)):
            item, at = _cbor(data, at)
            items.append(item)
        return (items if major == 4 else list(zip(items[::2], items[1::2], strict=True))), at
    return length, at

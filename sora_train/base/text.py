"""Text that people wrote, from bytes: UTF-8, or UTF-16 that says so; nothing else is guessed at.

A wrong guess would be trained on unseen: cp1252 read as UTF-8 with replacements, or GBK as Latin-1.
"""

import codecs
import io
import re
from pathlib import Path

from sora_train.errors import UserError

_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# Python reads a byte that is no UTF-8 as U+DC00 and the byte, where it is asked to (`surrogateescape`).
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_BYTE = 0xDC00


class NotText(UserError):
    """Bytes, or a string, are no text; the message names the place, the byte or the character, and the remedy."""


def decode_text(data: bytes, name: str) -> str:
    """The text in `data`: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Line ends stay as they are. Raises NotText with `name` and the offset of the first byte that is no
    text, which a zero is too: UTF-16 and UTF-32 without a mark are full of them.
    """
    text, begin, encoding = _decoded(data, name)
    fault = _NO_TEXT.search(text)
    if fault:
        at = begin + len(text[: fault.start()].encode(encoding, "surrogateescape"))
        raise NotText(
            f"{name} is no UTF-8 text: {_fault(fault[0])} at offset {at}; save it as UTF-8"
        )
    return text


def decode_lines(data: bytes, name: str) -> tuple[str, dict[int, str]]:
    """The text of a file of one entry a line, and what is wrong with which line, counted from 1.

    So a million entries are not lost with one. A byte that is no UTF-8 stands for itself as half of a
    surrogate pair. Raises NotText where UTF-16 is damaged.
    """
    text, begin, encoding = _decoded(data, name)
    faults: dict[int, str] = {}
    line, done, offset = 1, 0, begin
    for fault in _NO_TEXT.finditer(text):
        between = text[done : fault.start()]
        line += between.count("\n")
        offset += len(between.encode(encoding, "surrogateescape"))
        done = fault.start()
        faults.setdefault(line, f"{_fault(fault[0])} at offset {offset} is no UTF-8 text")
    return text, faults


def _decoded(data: bytes, name: str) -> tuple[str, int, str]:
    """The text, bytes that are no UTF-8 escaped; the length of the byte order mark; the encoding."""
    encoding = _UTF16.get(data[:2], "utf-8")
    begin = 2 if encoding != "utf-8" else 3 if data.startswith(codecs.BOM_UTF8) else 0
    if encoding == "utf-8":
        return data[begin:].decode(encoding, "surrogateescape"), begin, encoding
    try:
        return data[begin:].decode(encoding), begin, encoding
    except UnicodeDecodeError as error:
        raise NotText(
            f"{name} begins as UTF-16 and is none: byte 0x{error.object[error.start]:02x} at offset "
            f"{begin + error.start} ({error.reason}); save it as UTF-8"
        ) from error


def _fault(character: str) -> str:
    return f"byte 0x{max(0, ord(character) - _BYTE):02x}"


def read_text(path: Path) -> str:
    """The text of a file, as `decode_text` reads it. Raises NotText and OSError."""
    return decode_text(path.read_bytes(), str(path))


def require_text(text: str, name: str) -> str:
    """`text` itself. Raises NotText where it holds a zero, or half of a surrogate pair, which no encoder takes.

    JSON can hold one (`"\\ud83d"`), and so does an argument of a command that is no UTF-8.
    """
    fault = _NO_TEXT.search(text)
    if fault:
        what = "a zero" if fault[0] == "\0" else "half of a surrogate pair"
        raise NotText(
            f"{name} is no text: character {fault.start() + 1} is U+{ord(fault[0]):04X}, {what}; correct it"
        )
    return text


def lines_of(text: str) -> list[str]:
    """The lines of a text, ended as files end them; U+2028 and U+0085 are text, other than for `splitlines`."""
    return io.StringIO(text, newline=None).read().split("\n")


def printable(text: str) -> str:
    """The text with what cannot be written as UTF-8 spelled out: a byte of a file's name as `\\xe9`."""
    escaped = re.sub("[\udc80-\udcff]", lambda one: f"\\x{ord(one[0]) - _BYTE:02x}", text)
    return escaped.encode(errors="backslashreplace").decode()

"""Latents and caption embeddings that lie in shards beside or instead of the clips.

They are members of a sample: `KEY.latents.safetensors` holds the tensor `latents` (C, T', H', W') as
the VAE gives it (the mean of its posterior) and, for draws, `logvar` of the same shape;
`KEY.text.safetensors` the tensor `embedding` (L, D) of the caption's own tokens; float32, float16 or
bfloat16. Their metadata name the network that made them and the clip or caption. The manifest's
column `members` repeats the metadata beside the byte ranges:

    {"latents.safetensors": [offset, length], "text.safetensors": [offset, length],
     "latents": {"vae_digest": ..., "fps": 8.0, "frames": 9, "height": 48, "width": 48, "shape": [...],
                 "logvar": true},
     "text": {"text_digest": ..., "caption_digest": ..., "shape": [...]}}

Nothing here imports torch: decode processes list members too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from sora_train.data.decode.probe import Probe
from sora_train.data.manifest import Stamp, text_digest
from sora_train.data.sample import Bucket
from sora_train.data.storage.cached_reads import read_range
from sora_train.data.storage.ranges import DIGEST_END_BYTES, read_bytes
from sora_train.data.storage.remote import is_remote
from sora_train.data.storage.retry import ReadPolicy
from sora_train.errors import UserError

LATENTS, TEXT = "latents.safetensors", "text.safetensors"
KIND = "latents"
"""The manifest's kind and codec of a sample that has latents and no clip."""
_PART = {LATENTS: "latents", TEXT: "text"}
_TENSOR = {LATENTS: "latents", TEXT: "embedding"}
LOGVAR = "logvar"
_AXES = {LATENTS: 4, TEXT: 2}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# A longer header is not that of one or two tensors.
MAX_HEADER_BYTES = 1 << 20

Read = Callable[[int, int], bytes]
"""(offset in the member, number of bytes) -> the bytes."""


class DamagedMember(Exception):
    """A member is cut off, or is not what its name says."""


@dataclass(frozen=True)
class StoredLatents:
    """Where a sample's latents lie, and the clip they encode: `pixels` at `fps` (0 for an image)."""

    offset: int
    length: int
    vae_digest: str
    fps: float
    pixels: Bucket
    shape: tuple[int, ...]
    logvar: bool = False


@dataclass(frozen=True)
class StoredText:
    """Where the embedding of a sample's caption lies, and the digest of that caption."""

    offset: int
    length: int
    text_digest: str
    caption_digest: str
    shape: tuple[int, ...]


# -- writing --------------------------------------------------------------------------------------


def pack_latents(
    latents: np.ndarray,
    *,
    vae_digest: str,
    fps: float,
    pixels: Bucket,
    caption: str = "",
    dtype: str = "float32",
    logvar: np.ndarray | None = None,
) -> bytes:
    """The member of float32 latents (C, T', H', W') and their log-variance, which encode `pixels` at `fps`."""
    metadata = {
        "vae_digest": vae_digest,
        "fps": repr(float(fps)),
        "frames": str(pixels.frames),
        "height": str(pixels.height),
        "width": str(pixels.width),
        **({"caption": caption} if caption else {}),
    }
    beside = {} if logvar is None else {LOGVAR: logvar}
    return _pack({_TENSOR[LATENTS]: latents, **beside}, metadata, dtype)


def pack_text(
    embedding: np.ndarray, *, encoder_digest: str, caption: str, dtype: str = "float32"
) -> bytes:
    """The member of a caption's float32 embedding (L, D), its own tokens alone."""
    metadata = {"text_digest": encoder_digest, "caption_digest": text_digest(caption)}
    return _pack({_TENSOR[TEXT]: embedding}, metadata, dtype)


def _pack(arrays: Mapping[str, np.ndarray], metadata: dict[str, str], dtype: str) -> bytes:
    # By hand: safetensors writes bfloat16 only with torch, and its bare writer changed between releases.
    tensors: dict[str, dict[str, Any]] = {}
    values: list[bytes] = []
    begin = 0
    for name, values_of in arrays.items():
        array = np.ascontiguousarray(values_of, np.float32)
        data = (_to_bfloat16(array) if dtype == "bfloat16" else array.astype(dtype)).tobytes()
        tensors[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, begin + len(data)],
        }
        values.append(data)
        begin += len(data)
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + b"".join(values)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper halves of finite float32 values, rounded to the nearest, ties to even."""
    bits = array.view(np.uint32)
    is_odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + is_odd) >> 16).astype(np.uint16)


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """Type and shape of a member's tensors, where the values of each begin, and its metadata."""

    kind: str
    shape: tuple[int, ...]
    begins: dict[str, int]
    metadata: dict[str, str]


def unpack(data: bytes, extension: str, tensor: str = "") -> np.ndarray:
    """The member's tensor as float32, its main one or another by name. Raises DamagedMember."""
    header = _header(lambda offset, count: data[offset : offset + count], len(data), extension)
    name = tensor or _TENSOR[extension]
    if name not in header.begins:
        raise DamagedMember(f"{extension} has no tensor `{name}`")
    start, count = header.begins[name], math.prod(header.shape)
    if header.kind == "BF16":
        halves = np.frombuffer(data, "<u2", count, start)
        array = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        kind = "<f4" if header.kind == "F32" else "<f2"
        array = np.frombuffer(data, kind, count, start).astype(np.float32)
    if not np.isfinite(array).all():
        raise DamagedMember(f"{extension} holds values that are not finite")
    return array.reshape(header.shape)


def _header(read: Read, size: int, extension: str) -> _Header:
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else 0
    if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise DamagedMember(f"{extension} is no safetensors file")
    main = _TENSOR[extension]
    try:
        header = json.loads(read(8, length))
        names = [main, *([LOGVAR] if extension == LATENTS and LOGVAR in header else [])]
        kind, shape = str(header[main]["dtype"]), tuple(int(side) for side in header[main]["shape"])
        alike = all(
            header[name]["dtype"] == kind and tuple(header[name]["shape"]) == shape
            for name in names
        )
        ranges = {name: tuple(map(int, header[name]["data_offsets"])) for name in names}
        metadata = {str(key): str(value) for key, value in header["__metadata__"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedMember(
            f"{extension} has no tensor `{main}` with metadata ({error!r})"
        ) from error
    if kind not in _BYTES or len(shape) != _AXES[extension] or min(shape) < 1 or not alike:
        raise DamagedMember(f"{extension} holds {kind} values of shape {list(shape)}")
    bytes_each = math.prod(shape) * _BYTES[kind]
    expected = [(number * bytes_each, (number + 1) * bytes_each) for number in range(len(names))]
    if sorted(ranges.values()) != expected or 8 + length + expected[-1][1] != size:
        raise DamagedMember(f"{extension} has {size} bytes, its header promises another number")
    begins = {name: 8 + length + place[0] for name, place in ranges.items()}
    return _Header(kind, shape, begins, metadata)


def describe(read: Read, size: int, extension: str) -> dict[str, Any]:
    """The description of a member in the column `members`, from its header alone. Raises DamagedMember."""
    header = _header(read, size, extension)
    shape, metadata = header.shape, header.metadata
    try:
        if extension == TEXT:
            return {
                "text_digest": metadata["text_digest"],
                "caption_digest": metadata["caption_digest"],
                "shape": list(shape),
            }
        fps = float(metadata["fps"])
        pixels = {name: int(metadata[name]) for name in ("frames", "height", "width")}
        vae_digest = metadata["vae_digest"]
    except (KeyError, ValueError) as error:
        raise DamagedMember(f"the metadata of {extension} lack or garble {error}") from error
    if min(pixels.values()) < 1 or not 0 <= fps < math.inf:
        raise DamagedMember(f"the metadata of {extension} name an impossible clip")
    beside = {LOGVAR: True} if LOGVAR in header.begins else {}
    return {"vae_digest": vae_digest, "fps": fps, **pixels, "shape": list(shape), **beside}


def describe_bytes(data: bytes, extension: str) -> dict[str, Any]:
    """`describe` of a member in memory."""
    return describe(lambda offset, count: data[offset : offset + count], len(data), extension)


def digest(read: Read, size: int) -> str:
    """The digest of latents by their length and both ends, so that indexing need not read them whole."""
    state = hashlib.sha256(str(size).encode())
    state.update(read(0, min(size, DIGEST_END_BYTES)))
    state.update(read(max(0, size - DIGEST_END_BYTES), min(size, DIGEST_END_BYTES)))
    return state.hexdigest()[:32]


# -- the manifest's column ------------------------------------------------------------------------


def as_members(
    places: Mapping[str, tuple[int, int]], descriptions: Mapping[str, dict[str, Any]]
) -> str:
    """The column `members` from byte ranges and descriptions by extension; '' where there are none."""
    parts = {_PART[name]: description for name, description in descriptions.items()}
    return json.dumps({**places, **parts}) if places else ""


@lru_cache(maxsize=4096)
def stored_of(members: str) -> tuple[StoredLatents | None, StoredText | None]:
    """The latents and the text that the column `members` of a row describes. Raises UserError."""
    if not members:
        return None, None
    latents, text = None, None
    try:
        known = json.loads(members)
        if LATENTS in known:
            about, (offset, length) = known["latents"], known[LATENTS]
            latents = StoredLatents(
                int(offset),
                int(length),
                str(about["vae_digest"]),
                float(about["fps"]),
                Bucket(*(int(about[side]) for side in ("frames", "height", "width"))),
                tuple(about["shape"]),
                bool(about.get(LOGVAR, False)),
            )
        if TEXT in known:
            about, (offset, length) = known["text"], known[TEXT]
            digests = str(about["text_digest"]), str(about["caption_digest"])
            text = StoredText(int(offset), int(length), *digests, tuple(about["shape"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the manifest's column members holds {members[:120]!r}, which cannot be read ({error!r}); "
            "index the shards again"
        ) from error
    return latents, text


def probe_of(members: str, digest_: str) -> Probe:
    """The manifest's figures of a sample that has latents and no clip."""
    latents, _ = stored_of(members)
    assert latents is not None, "a sample of this kind has latents"
    pixels, fps = latents.pixels, latents.fps
    duration = pixels.frames / fps if fps > 0 else 0.0
    return Probe(
        KIND, pixels.frames, fps, False, pixels.height, pixels.width, 0, duration, 0.0, digest_
    )


def read_member(
    path: str,
    place: StoredLatents | StoredText,
    extension: str,
    policy: ReadPolicy,
    stamp: Stamp | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """A member's tensor, and the log-variance of latents that have one, float32.

    `stamp` is that of the shard; a remote member without one is not kept on the local disk, as a
    change of it would go unnoticed. Raises DamagedMember, and StorageFault where it cannot be read.
    """
    if is_remote(path):
        policy = policy if stamp is not None else replace(policy, cache_dir="")
        data = read_range(path, place.offset, place.length, policy, stamp=stamp)
    else:
        data = read_bytes(path, place.offset, place.length)
    array = unpack(data, extension)
    if array.shape != place.shape:
        raise DamagedMember(
            f"{extension} has the shape {list(array.shape)}, {list(place.shape)} is indexed"
        )
    drawn = isinstance(place, StoredLatents) and place.logvar
    return array, unpack(data, extension, LOGVAR) if drawn else None

"""Latents and caption embeddings that stand in shards beside or instead of the clips.

They are members of a sample: `KEY.latents.safetensors` holds the tensor `latents` (C, T', H', W') as
the VAE gives it, `KEY.text.safetensors` the tensor `embedding` (L, D) of the caption's own tokens;
float32, float16 or bfloat16. Their metadata say which network made them and for what, and the
manifest's column `members` repeats that beside their byte ranges:

    {"latents.safetensors": [offset, length], "text.safetensors": [offset, length],
     "latents": {"vae_digest": ..., "fps": 8.0, "frames": 9, "height": 48, "width": 48, "shape": [...]},
     "text": {"text_digest": ..., "caption_digest": ..., "shape": [...]}}

Nothing here imports torch: decode processes list members too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sora_train.data.decode import DIGEST_END_BYTES, ByteRange, Probe
from sora_train.data.manifest import Manifest, text_digest
from sora_train.data.reading import read_range
from sora_train.data.remote import is_remote
from sora_train.data.retry import ReadPolicy
from sora_train.data.sample import Bucket
from sora_train.errors import UserError

LATENTS, TEXT = "latents.safetensors", "text.safetensors"
KIND = "latents"
"""The manifest's kind and codec of a sample that has latents and no clip."""
_PART = {LATENTS: "latents", TEXT: "text"}
_TENSOR = {LATENTS: "latents", TEXT: "embedding"}
_AXES = {LATENTS: 4, TEXT: 2}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# A header names one tensor; a longer one is something else.
MAX_HEADER_BYTES = 1 << 20

Read = Callable[[int, int], bytes]
"""Bytes from an offset of the member on, so many."""


class DamagedMember(Exception):
    """A member is not what its name promises."""


@dataclass(frozen=True)
class StoredLatents:
    """Where a sample's latents lie, and what they stand for: `pixels` at `fps` (0 for an image)."""

    offset: int
    length: int
    vae_digest: str
    fps: float
    pixels: Bucket
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredText:
    """Where the embedding of a sample's caption lies, and of which caption it is."""

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
) -> bytes:
    """The member of float32 latents (C, T', H', W'), which stand for `pixels` sampled at `fps`."""
    metadata = {
        "vae_digest": vae_digest,
        "fps": repr(float(fps)),
        "frames": str(pixels.frames),
        "height": str(pixels.height),
        "width": str(pixels.width),
        **({"caption": caption} if caption else {}),
    }
    return _pack(LATENTS, latents, metadata, dtype)


def pack_text(
    embedding: np.ndarray, *, encoder_digest: str, caption: str, dtype: str = "float32"
) -> bytes:
    """The member of a caption's float32 embedding (L, D), its own tokens alone."""
    metadata = {"text_digest": encoder_digest, "caption_digest": text_digest(caption)}
    return _pack(TEXT, embedding, metadata, dtype)


def _pack(extension: str, array: np.ndarray, metadata: dict[str, str], dtype: str) -> bytes:
    array = np.ascontiguousarray(array, np.float32)
    values = _to_bfloat16(array) if dtype == "bfloat16" else array.astype(dtype)
    # By hand: safetensors knows bfloat16 with torch alone, and its bare writer changed between releases.
    tensor = {
        "dtype": _DTYPES[dtype],
        "shape": list(array.shape),
        "data_offsets": [0, values.nbytes],
    }
    header = json.dumps({"__metadata__": metadata, _TENSOR[extension]: tensor}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + values.tobytes()


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper halves of finite float32 values, rounded to the nearest, ties to even."""
    bits = array.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> 16).astype(
        np.uint16
    )


# -- reading --------------------------------------------------------------------------------------


def unpack(data: bytes, extension: str) -> np.ndarray:
    """The member's tensor as float32. Raises DamagedMember."""
    kind, shape, _, start = _header(
        lambda offset, count: data[offset : offset + count], len(data), extension
    )
    if kind == "BF16":
        halves = np.frombuffer(data, "<u2", offset=start)
        array = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        array = np.frombuffer(data, "<f4" if kind == "F32" else "<f2", offset=start).astype(
            np.float32
        )
    if not np.isfinite(array).all():
        raise DamagedMember(f"{extension} holds values that are not finite")
    return array.reshape(shape)


def _header(
    read: Read, size: int, extension: str
) -> tuple[str, tuple[int, ...], dict[str, str], int]:
    """Type, shape and metadata of the member's one tensor, and where its values begin."""
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else 0
    if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise DamagedMember(f"{extension} is no safetensors file")
    try:
        header = json.loads(read(8, length))
        tensor = header[_TENSOR[extension]]
        kind, shape = str(tensor["dtype"]), tuple(int(side) for side in tensor["shape"])
        first, last = tensor["data_offsets"]
        metadata = {str(key): str(value) for key, value in header["__metadata__"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedMember(
            f"{extension} has no tensor `{_TENSOR[extension]}` with metadata ({error!r})"
        ) from error
    if kind not in _BYTES or len(shape) != _AXES[extension] or min(shape) < 1:
        raise DamagedMember(f"{extension} holds {kind} values of shape {list(shape)}")
    if first != 0 or last != math.prod(shape) * _BYTES[kind] or 8 + length + last != size:
        raise DamagedMember(f"{extension} has {size} bytes, its header promises another number")
    return kind, shape, metadata, 8 + length


def describe(read: Read, size: int, extension: str) -> dict[str, Any]:
    """What the column `members` says of a member, from its header alone. Raises DamagedMember."""
    _, shape, metadata, _ = _header(read, size, extension)
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
    return {"vae_digest": vae_digest, "fps": fps, **pixels, "shape": list(shape)}


def describe_bytes(data: bytes, extension: str) -> dict[str, Any]:
    """`describe` of a member that is at hand."""
    return describe(lambda offset, count: data[offset : offset + count], len(data), extension)


def digest(read: Read, size: int) -> str:
    """Names latents by their length and both ends, so that indexing need not read what lies between."""
    state = hashlib.sha256(str(size).encode())
    state.update(read(0, min(size, DIGEST_END_BYTES)))
    state.update(read(max(0, size - DIGEST_END_BYTES), min(size, DIGEST_END_BYTES)))
    return state.hexdigest()[:32]


# -- the manifest's column ------------------------------------------------------------------------


def as_members(places: Mapping[str, tuple[int, int]], said: Mapping[str, dict[str, Any]]) -> str:
    """The column `members` from byte ranges and descriptions by extension; '' where there are none."""
    known = {name: list(place) for name, place in places.items()}
    parts = {_PART[name]: about for name, about in said.items()}
    return json.dumps({**known, **parts}) if known else ""


@lru_cache(maxsize=4096)
def stored_of(members: str) -> tuple[StoredLatents | None, StoredText | None]:
    """What the column `members` of a row says of latents and text. Raises UserError."""
    if not members:
        return None, None
    latents, text = None, None
    try:
        known = json.loads(members)
        if LATENTS in known:
            said, (offset, length) = known["latents"], known[LATENTS]
            pixels = Bucket(int(said["frames"]), int(said["height"]), int(said["width"]))
            latents = StoredLatents(
                int(offset),
                int(length),
                str(said["vae_digest"]),
                float(said["fps"]),
                pixels,
                tuple(said["shape"]),
            )
        if TEXT in known:
            said, (offset, length) = known["text"], known[TEXT]
            text = StoredText(
                int(offset),
                int(length),
                str(said["text_digest"]),
                str(said["caption_digest"]),
                tuple(said["shape"]),
            )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the manifest's column members holds {members[:120]!r}, which cannot be read ({error!r}); "
            "index the shards again"
        ) from error
    return latents, text


def probe_of(members: str, digest_: str) -> Probe:
    """What the index says of a sample that has latents and no clip."""
    latents, _ = stored_of(members)
    assert latents is not None, "a sample of this kind has latents"
    pixels, fps = latents.pixels, latents.fps
    duration = pixels.frames / fps if fps > 0 else 0.0
    return Probe(
        KIND, pixels.frames, fps, False, pixels.height, pixels.width, 0, duration, 0.0, digest_
    )


def read_member(
    path: str, place: StoredLatents | StoredText, extension: str, policy: ReadPolicy
) -> np.ndarray:
    """A member's tensor, float32. Raises DamagedMember, and StorageFault where it cannot be read."""
    if is_remote(path):
        data = read_range(path, place.offset, place.length, policy)
    else:
        with ByteRange(path, place.offset, place.length) as file:
            data = file.readall() or b""
    array = unpack(data, extension)
    if array.shape != place.shape:
        raise DamagedMember(
            f"{extension} has the shape {list(array.shape)}, {list(place.shape)} is indexed"
        )
    return array


# -- before step 1 --------------------------------------------------------------------------------


def require_latents(
    manifest: Manifest,
    rows: Iterable[int],
    vae_digest: str,
    latent_shape: Callable[[int, int, int], tuple[int, ...]],
) -> None:
    """Raise UserError where stored latents of these rows are another VAE's."""
    members = manifest.members
    for row in rows:
        if not members[row]:
            continue
        latents = stored_of(members[row])[0]
        if latents is None:
            continue
        where = f"the latents of {manifest.key[row]!r} in {manifest.path(row)}"
        if latents.vae_digest != vae_digest:
            raise UserError(
                f"{where} were made by the VAE {latents.vae_digest}, this run's is {vae_digest}: give vae.path the "
                "VAE that made them, encode the clips again with `sora data encode`, or set "
                "data.stored_latents=ignore to train from the clips where there are any"
            )
        pixels = latents.pixels
        wanted = latent_shape(pixels.frames, pixels.height, pixels.width)
        if latents.shape != wanted:
            raise UserError(
                f"{where} have the shape {list(latents.shape)} where this VAE gives {list(wanted)} for {pixels.name}; "
                "encode the clips again with `sora data encode`"
            )


def require_text(
    manifest: Manifest, rows: Iterable[int], encoder_digest: str, trainable: bool, longest: int
) -> None:
    """Raise UserError where stored embeddings of these rows cannot stand for the run's own."""
    members = manifest.members
    for row in rows:
        text = stored_of(members[row])[1] if members[row] else None
        if text is None:
            continue
        where = f"the caption embedding of {manifest.key[row]!r} in {manifest.path(row)}"
        if trainable:
            raise UserError(
                f"{where} cannot be used, because text.trainable=true changes the encoder that made it; set "
                "data.stored_text=ignore to encode captions in the run, or text.trainable=false"
            )
        if text.text_digest != encoder_digest:
            raise UserError(
                f"{where} was made by the text encoder {text.text_digest}, this run's is {encoder_digest}: restore "
                "the text section and the seed it was encoded with, encode again with `sora data encode`, or set "
                "data.stored_text=ignore"
            )
        if text.shape[0] > longest:
            raise UserError(
                f"{where} has {text.shape[0]} tokens, more than text.max_length={longest}; encode again with "
                "`sora data encode`, or set data.stored_text=ignore"
            )

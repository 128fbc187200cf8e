"""A child process that lists shards and probes their clips, local or remote, and can be killed.

It serves `DecodePool(module="sora_train.data.index.listing_worker")`, and like every decode process never
imports torch.
"""

from __future__ import annotations

from sora_train.data.decode import worker as decode_worker
from sora_train.data.decode.probe import ProbeRequest, probe_file
from sora_train.data.index.tars import Listing, ListRequest, compression, list_shard
from sora_train.data.storage.ranges import ByteRange
from sora_train.data.storage.remote import RemoteRange, is_remote, read_range

# A clip that is read whole comes in pieces, so that a pause in the network costs one of them.
_PIECE_BYTES = 8 << 20


def list_remote(request: ListRequest) -> Listing:
    """The samples of a local or remote tar. Raises StorageFault."""
    opener = RemoteRange if is_remote(request.path) else ByteRange
    with opener(request.path, 0, request.length) as file:
        packed = compression(file.read(8) or b"") if request.length else ""
        if packed:
            return Listing([], packed)
        return Listing(list_shard(file, request.length, request.key, request.members))


def answer(request: ListRequest | ProbeRequest) -> tuple[str, object]:
    """('ok', Listing or Probe), ('bad', (reason, detail)) or ('storage', detail)."""
    if isinstance(request, ListRequest):
        return decode_worker.guarded(lambda: list_remote(request))
    if not is_remote(request.path):
        return decode_worker.answer(request)
    return decode_worker.guarded(lambda: probe_file(_remote(request), request))


def _remote(request: ProbeRequest) -> RemoteRange | ByteRange:
    """The member as a file: read block by block where its header is enough, else whole."""
    if request.count == "header" and request.kind == "video":
        return RemoteRange(request.path, request.offset, request.length)
    end = request.offset + request.length
    starts = range(request.offset, end, _PIECE_BYTES)
    data = b"".join(
        read_range(request.path, start, min(end, start + _PIECE_BYTES)) for start in starts
    )
    return ByteRange(request.path, request.offset, request.length, data)


if __name__ == "__main__":
    decode_worker.serve(answer)

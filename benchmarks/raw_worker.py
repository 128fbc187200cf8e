"""A child process that decodes and throws away: how fast the decoder alone is, with no loader around it."""

from dataclasses import dataclass

from sora_train.data.decode import worker as decode_worker
from sora_train.data.decode.frames import DecodeRequest


@dataclass(frozen=True)
class RawRequest:
    """Clips to decode one after the other."""

    row: int
    key: str
    clips: tuple[DecodeRequest, ...]


def answer(request: RawRequest) -> tuple[str, object]:
    """('ok', how many of the clips were decoded)."""
    return "ok", sum(decode_worker.answer(clip)[0] == "ok" for clip in request.clips)


if __name__ == "__main__":
    decode_worker.serve(answer)

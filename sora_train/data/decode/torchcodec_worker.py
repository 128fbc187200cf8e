"""A decode process for torchcodec: the one that imports torch, since torchcodec is nothing without it.

It is a program of its own, so that the other decode processes stay small and quick to start.
"""

from sora_train.data.decode import torchcodec as decode_torchcodec
from sora_train.data.decode import worker as decode_worker

if __name__ == "__main__":
    # Before the first request, whose deadline must not pay for it.
    decode_torchcodec.load()
    decode_worker.serve(decode_worker.answer)

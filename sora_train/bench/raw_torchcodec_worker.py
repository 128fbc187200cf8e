"""`raw_worker` for torchcodec, whose program has to load its libraries first."""

from sora_train.bench.raw_worker import answer
from sora_train.data import decode_torchcodec, decode_worker

if __name__ == "__main__":
    decode_torchcodec.load()
    decode_worker.serve(answer)

"""`raw_worker` for torchcodec, whose program has to load its libraries first."""

from benchmarks.raw_worker import answer
from sora_train.data.decode import torchcodec as decode_torchcodec
from sora_train.data.decode import worker as decode_worker

if __name__ == "__main__":
    decode_torchcodec.load()
    decode_worker.serve(answer)

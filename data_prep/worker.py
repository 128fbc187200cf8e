"""A process that runs stages on rows, one call at a time, and may be killed: `python -m data_prep.worker`."""

import resource
import sys
import time

# First, as it sets the threads of the libraries that it loads.
from sora_train.data.decode import worker  # isort: skip
from data_prep import calls  # isort: skip
from data_prep.stage import Later  # isort: skip
from sora_train.data.decode.frames import DISK_ERRORS, BadClip, in_words
from sora_train.data.storage.ranges import StorageFault
from sora_train.errors import Fault, UserError

GIB = 1 << 30


def answer(call: calls.Call) -> tuple[str, object]:
    """('ok', Answer) or ('bad', (reason, detail)), the row's fault."""
    limit_memory(call.memory_gb)
    began = time.process_time()

    def done(**kind: object) -> tuple[str, object]:
        return "ok", calls.Answer(seconds=time.process_time() - began, **kind)  # type: ignore[arg-type]

    try:
        return done(table=calls.answered(call))
    except BadClip as error:
        return "bad", (error.reason, error.detail)
    except Later as error:
        return done(later=(error.reason, error.detail))
    except (Fault, UserError, StorageFault, ImportError) as error:
        return done(fault=str(error))
    except MemoryError:
        return "bad", ("out_of_memory", f"takes more than limits.memory_gb={call.memory_gb:g}")
    # Libraries raise any exception on a damaged file.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return done(fault=f"{error.strerror}: {error.filename}")
        return "bad", ("failed", f"{type(error).__name__}: {in_words(error)}")


def limit_memory(gigabytes: float) -> None:
    """What the process may hold; beyond it an allocation fails, or the process ends, and its row is to blame."""
    if sys.platform == "linux" and gigabytes:
        most = int(gigabytes * GIB)
        resource.setrlimit(
            resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1])
        )


if __name__ == "__main__":
    worker.serve(answer)

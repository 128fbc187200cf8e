"""The two kinds of failure a person can meet, and how a command tells of them: one sentence and an exit code."""

import errno
import os
import sys
from collections.abc import Callable

EXIT_FAULT = 1
EXIT_USER = 2
EXIT_REQUEUE = 75  # sysexits.h: a temporary failure, to be tried again
EXIT_INTERRUPTED = 130


class SoraError(Exception):
    """Base of every failure that is explained in one sentence instead of a traceback."""

    exit_code = EXIT_FAULT


class UserError(SoraError):
    """The command, config or data was wrong; the message names the key or file, the value, the remedy."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """The run was described wrongly."""


class Fault(SoraError):
    """The machine, the storage or the numbers failed; nothing the user typed was wrong."""


class Preempted(SoraError):
    """The run was told to leave and can be started again; its checkpoint is committed."""

    exit_code = EXIT_REQUEUE


def run_command(command: Callable[[], int | None]) -> int:
    """Run `command` and return the process's exit code, failures told in one sentence each on stderr.

    With SORA_DEBUG=1 the exception passes through with its traceback.
    """
    # Where it is installed, diffusers and transformers import it, with warnings and seconds, though nothing of it is
    # used: parallel/memory/float8.py, which does, takes this away.
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output went away (`sora ... | head`); the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAULT
    except Exception as error:
        if os.environ.get("SORA_DEBUG") == "1":
            raise
        for line in sentence(error).splitlines():
            print(line if isinstance(error, Preempted) else f"error: {line}", file=sys.stderr)
        return error.exit_code if isinstance(error, SoraError) else EXIT_FAULT


def sentence(error: Exception) -> str:
    """What a person is told about `error`."""
    if isinstance(error, SoraError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full{_at(error)}; free some space and run the same command again, "
            "it goes on from the last checkpoint"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror or type(error).__name__}{_at(error)}; check the path, its permissions and the storage"
    if isinstance(error, MemoryError):
        return "the machine ran out of memory; lower data.micro_batch or data.num_workers"
    text = " ".join(str(error).split())
    return (
        f"internal fault ({type(error).__name__}: {text[:300]}); set SORA_DEBUG=1 for the traceback"
    )


def _at(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""

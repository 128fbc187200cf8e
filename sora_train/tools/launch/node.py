"""One node's part of a job: torchrun, with exit codes that a scheduler can act on.

    python -m sora_train.tools.launch.node --nnodes 4 --nproc-per-node 8 ... -m sora_train.train --frozen FILE

takes torchrun's own arguments. Ranks that are told to leave have `SHUTDOWN_SECONDS` to save, instead of torchrun's 30.
"""

import argparse
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from types import FrameType

from sora_train.errors import EXIT_FAULT, EXIT_REQUEUE, EXIT_USER, UserError, run_command

SHUTDOWN_SECONDS = "600"
HEEDED = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGQUIT")
PLACE = {
    "address": ("--master-addr", "--master_addr"),
    "port": ("--master-port", "--master_port"),
    "rank": ("--node-rank", "--node_rank"),
}
"""Where ranks meet, as torchrun's arguments say it."""
NAMED_SECONDS = 120.0
"""How long the name of a pod may take to appear in Kubernetes."""


def main(argv: Sequence[str]) -> int:
    """Run the ranks of this node to their end; returns the exit code."""
    for name in HEEDED:
        # Until torchrun, whose import takes seconds, has handlers of its own.
        signal.signal(getattr(signal, name), leave)
    return run_command(lambda: run_ranks(argv))


def leave(_number: int, _frame: FrameType | None) -> None:
    """Told to leave before any rank was there."""
    raise SystemExit(EXIT_REQUEUE)


def run_ranks(argv: Sequence[str]) -> int:
    """As `main`. Raises UserError where the ranks could not meet."""
    require_meeting_place(argv)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(["--signals-to-handle", ",".join(HEEDED), *argv]))
    except ChildFailedError as error:
        return combined(failure.exitcode for failure in error.failures.values())
    except SignalException:
        return EXIT_REQUEUE
    return 0


def combined(codes: Iterable[int]) -> int:
    """The node's exit code from those of its ranks that did not end with 0 (negative: killed by that signal).

    Ranks leave together, and torchrun stops those that are last to go: told to leave counts unless one failed.
    """
    seen = set(codes) - {-signal.SIGTERM, -signal.SIGUSR1}
    if not seen or seen == {EXIT_REQUEUE}:
        return EXIT_REQUEUE
    return EXIT_USER if seen == {EXIT_USER} else EXIT_FAULT


def require_meeting_place(argv: Sequence[str]) -> None:
    """The first node's address has a meaning here, and where this is the first node its port is free.

    Raises UserError: torchrun would wait for minutes, or say it in a page of stack traces.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, words in PLACE.items():
        parser.add_argument(*words, dest=flag, default="")
    known, _ = parser.parse_known_args(list(argv))
    if not known.address:
        return
    family = resolved(
        known.address, NAMED_SECONDS if "KUBERNETES_SERVICE_HOST" in os.environ else 0
    )
    if known.rank != "0" or not known.port.isdigit():
        return
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(known.port)))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(
                f"port {known.port} of {socket.gethostname()}, at which ranks meet, cannot be had ({error.strerror}); "
                "set launch.port (or --master-port) to a free one"
            ) from None


def resolved(address: str, seconds: float) -> socket.AddressFamily:
    """The family of the address. Raises UserError where the name means nothing here within `seconds`."""
    ends = time.monotonic() + seconds
    while True:
        try:
            return socket.getaddrinfo(address, None)[0][0]
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() > ends:
                raise UserError(
                    f"'{address}', the first node's address, does not resolve on {socket.gethostname()} ({error}); "
                    "give a name that all nodes know, or an IP address"
                ) from None
        time.sleep(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Nodes talk to each other over TCP on ports that the system picks, as NCCL and gloo do: who reaches whom, how fast
an answer comes, and what the other's clock says."""

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass

from sora_train.tools.doctor.checks.clock import Exchange, Offset, estimate
from sora_train.tools.doctor.findings import FAIL, INFO, OK, Finding, info, judged

ROUNDS = 8
TIMES = struct.Struct("!dd")
ALL_PAIRS = 16
"""Up to so many nodes each one tries all others; of more, each tries those 1, 2, 4, ... places on, and node 0."""


class EchoServer:
    """A thread that answers each byte with the times it was received and sent back, for clients that know the token."""

    def __init__(self, token: bytes):
        self._token = token
        self._socket = socket.create_server(("", 0), family=socket.AF_INET, backlog=256)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                # Closed.
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        # A peer that goes away is its own business, and it will say so.
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if read_exactly(connection, len(self._token)) != self._token:
                return
            connection.sendall(b"+")
            for _ in range(ROUNDS):
                read_exactly(connection, 1)
                received = time.time()
                connection.sendall(TIMES.pack(received, time.time()))

    def close(self) -> None:
        self._socket.close()


def read_exactly(connection: socket.socket, count: int) -> bytes:
    """`count` bytes. Raises ConnectionError when the other side ends before."""
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the other side ended the connection")
        data += part
    return data


@dataclass(frozen=True)
class PeerCheck:
    """Whether a node reached another: `why` it did not, or how fast the answer came."""

    node: int
    address: str
    why: str = ""
    milliseconds: float = 0.0
    offset: Offset = Offset(0.0, 0.0)


def reach(node: int, address: str, port: int, token: bytes, seconds: float) -> PeerCheck:
    """Talk to the EchoServer at this address."""
    ends = time.monotonic() + seconds
    try:
        with socket.create_connection((address, port), timeout=seconds) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(max(0.1, ends - time.monotonic()))
            connection.sendall(token)
            if read_exactly(connection, 1) != b"+":
                raise ConnectionError("something else listens there")
            exchanges = []
            for _ in range(ROUNDS):
                sent = time.time()
                connection.sendall(b"?")
                received, returned = TIMES.unpack(read_exactly(connection, TIMES.size))
                exchanges.append(Exchange(sent, received, returned, time.time()))
    except OSError as error:
        return PeerCheck(
            node, f"{address}:{port}", error.strerror or str(error) or type(error).__name__
        )
    quickest = min(exchange.on_the_way for exchange in exchanges)
    return PeerCheck(node, f"{address}:{port}", "", quickest * 1e3, estimate(exchanges))


def partners(node: int, nodes: int) -> list[int]:
    """The nodes that a node tries to reach: enough to notice one that reaches none, or is reached by none."""
    if nodes <= ALL_PAIRS:
        return [other for other in range(nodes) if other != node]
    steps = [1 << power for power in range((nodes - 1).bit_length())]
    return sorted({(node + step) % nodes for step in steps} | {0} - {node})


def reach_all(others: dict[int, tuple[str, int]], token: bytes, seconds: float) -> list[PeerCheck]:
    """Reach all nodes at once; `others` are address and port by node."""
    checks: dict[int, PeerCheck] = {}

    def run(node: int, address: str, port: int) -> None:
        checks[node] = reach(node, address, port, token, seconds)

    threads = [
        threading.Thread(target=run, args=(node, *where), daemon=True)
        for node, where in others.items()
    ]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + 2 * seconds
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    late = f"no answer within {seconds:g} s"
    return [
        checks.get(node, PeerCheck(node, f"{address}:{port}", late))
        for node, (address, port) in others.items()
    ]


def judge(reached: list[PeerCheck], names: dict[int, str]) -> list[Finding]:
    """A line for all nodes, and one for each that was not reached; `names` by node."""
    if not reached:
        return [info("other nodes", "none")]
    good = [one for one in reached if not one.why]
    bad = [one for one in reached if one.why]
    slowest = max((one.milliseconds for one in good), default=0.0)
    value = f"{len(good)} of {len(reached)} answer"
    value += f", there and back within {slowest:.2f} ms" if good else ""
    remedy = (
        "open all TCP ports between the nodes (firewall, security group, network policy): NCCL and gloo take any; "
        "or the address is of a network they do not share, then set launch.interface"
    )
    pairs = [
        Finding(f"to {names.get(one.node, one.node)}", f"{one.address}: {one.why}", FAIL, remedy)
        for one in bad
    ]
    return [judged("other nodes", value, good=INFO if bad else OK), *pairs]

"""Names, addresses and interfaces of a node, and the port at which ranks meet."""

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

from sora_train.tools.doctor.findings import FAIL, INFO, OK, WARN, Finding, Verdict, info, judged

SIOCGIFADDR = 0x8915
SLOW_MBITS = 10_000
VIRTUAL = ("lo", "docker", "veth", "ifb", "br-", "virbr", "tunl", "cni", "flannel", "cali", "dummy")


@dataclass(frozen=True)
class Interface:
    name: str
    up: bool
    mtu: int
    mbits: int | None
    """None: the driver does not tell."""
    address: str = ""

    def row(self) -> str:
        speed = "" if self.mbits is None else f" {self.mbits / 1000:g} Gbit/s"
        state = "" if self.up else " down"
        return (
            f"{self.name}{state}{' ' + self.address if self.address else ''}{speed} mtu {self.mtu}"
        )


@dataclass(frozen=True)
class Port:
    """A port of InfiniBand or RoCE."""

    name: str
    state: str
    rate: str
    layer: str


@dataclass(frozen=True)
class Network:
    hostname: str
    resolved: tuple[str, ...]
    """Addresses of the hostname; none: it does not resolve."""
    interfaces: tuple[Interface, ...] = ()
    infiniband: tuple[Port, ...] = ()
    master: str = ""
    """MASTER_ADDR; empty without a job."""
    master_resolved: tuple[str, ...] = ()
    source: str = ""
    """The address from which this node reaches MASTER_ADDR."""
    addresses: frozenset[str] = field(default_factory=frozenset)
    """Of all interfaces."""

    @property
    def chosen(self) -> Interface | None:
        """The interface towards MASTER_ADDR, or GLOO's own choice by the hostname's address."""
        address = self.source or next(iter(self.resolved), "")
        return next(
            (interface for interface in self.interfaces if interface.address == address), None
        )

    @property
    def owns_master(self) -> bool | None:
        if not self.master_resolved:
            return None
        return any(loopback(one) or one in self.addresses for one in self.master_resolved)


def read(master: str = "") -> Network:
    """This node. `master` is MASTER_ADDR."""
    hostname = socket.gethostname()
    interfaces = read_interfaces()
    return Network(
        hostname=hostname,
        resolved=resolve(hostname),
        interfaces=interfaces,
        infiniband=read_infiniband(),
        master=master,
        master_resolved=resolve(master) if master else (),
        source=address_towards(master) if master else "",
        addresses=frozenset(interface.address for interface in interfaces) | ipv6_addresses(),
    )


def resolve(name: str) -> tuple[str, ...]:
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in entries))


def read_interfaces(root: Path = Path("/sys/class/net")) -> tuple[Interface, ...]:
    folders = sorted(path for path in root.glob("*") if (path / "mtu").is_file())
    return tuple(
        Interface(
            path.name,
            _text(path / "operstate") == "up" or path.name == "lo",
            int(_text(path / "mtu") or 0),
            speed if (speed := int(_text(path / "speed") or -1)) > 0 else None,
            _ipv4(path.name),
        )
        for path in folders
    )


def read_infiniband(root: Path = Path("/sys/class/infiniband")) -> tuple[Port, ...]:
    return tuple(
        Port(
            f"{port.parent.parent.name}:{port.name}",
            _text(port / "state").rpartition(": ")[2],
            _text(port / "rate"),
            _text(port / "link_layer"),
        )
        for port in sorted(root.glob("*/ports/*"))
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        # The speed of an interface that is down cannot be read.
        return ""


def _ipv4(name: str) -> str:
    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
    return ""


def ipv6_addresses(table: Path = Path("/proc/net/if_inet6")) -> frozenset[str]:
    lines = _text(table).splitlines()
    return frozenset(str(ipaddress.IPv6Address(int(line.split()[0], 16))) for line in lines)


def address_towards(host: str) -> str:
    """Which of our addresses the kernel takes for packets to `host`; nothing is sent."""
    try:
        entries = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for family, _, _, _, address in entries:
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect(address)
            return str(probe.getsockname()[0])
    return ""


def loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def judge(network: Network, *, nodes: int, interface_named: bool = False) -> list[Finding]:
    """`interface_named`: whether gloo's interface is given, so that it need not ask for the hostname's address."""
    return [
        *_names(network, nodes, interface_named),
        *_interfaces(network, nodes),
        *_ports(network),
    ]


def _names(network: Network, nodes: int, interface_named: bool) -> list[Finding]:
    grave: Verdict = FAIL if nodes > 1 else WARN
    own = ", ".join(network.resolved) or "does not resolve"
    local = bool(network.resolved) and all(loopback(one) for one in network.resolved)
    unbound = "gloo cannot bind to it: add it to /etc/hosts"
    unreachable = "gloo gives others a loopback address: set GLOO_SOCKET_IFNAME (launch.interface), or mend /etc/hosts"
    hostname = judged(
        "hostname",
        f"{network.hostname}: {own}",
        (not network.resolved and not interface_named, grave, unbound),
        (local and nodes > 1 and not interface_named, WARN, unreachable),
    )
    if not network.master:
        return [hostname]
    addresses = ", ".join(network.master_resolved) or "does not resolve"
    all_loopback = nodes > 1 and all(loopback(one) for one in network.master_resolved)
    unknown = "give an address or name that this node resolves"
    own_machine = "a loopback address reaches this machine alone; give the first node's own"
    master = judged(
        "MASTER_ADDR",
        f"{network.master}: {addresses}",
        (not network.master_resolved, FAIL, unknown),
        (all_loopback, WARN, own_machine),
    )
    return [hostname, master]


def _interfaces(network: Network, nodes: int) -> list[Finding]:
    chosen = network.chosen
    shown = [
        interface.row()
        for interface in network.interfaces
        if not interface.name.startswith(VIRTUAL)
    ]
    findings = [info("interfaces", "; ".join(shown) or "none but loopback")]
    if chosen is None:
        return findings
    slow = chosen.mbits is not None and chosen.mbits < SLOW_MBITS and not network.infiniband
    down = "it is down: name another one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    faster = "ranks exchange gigabytes each step: name a faster interface in NCCL_SOCKET_IFNAME (launch.interface)"
    findings.append(
        judged(
            "chosen interface",
            chosen.row(),
            (not chosen.up, FAIL, down),
            (slow and nodes > 1, WARN, faster),
        )
    )
    return findings


def _ports(network: Network) -> list[Finding]:
    ports = network.infiniband
    if not ports:
        return [info("InfiniBand", "none")]
    active = [port for port in ports if "ACTIVE" in port.state]
    asleep = [port.name for port in ports if port not in active]
    value = f"{len(active)} of {len(ports)} ports active; " + ", ".join(
        dict.fromkeys(f"{port.layer} {port.rate}" for port in ports)
    )
    remedy = f"{', '.join(asleep)} not active: ibstat, cable, or the subnet manager; NCCL leaves them out"
    return [judged("InfiniBand", value, (bool(asleep), WARN, remedy))]


def meeting_port(address: str, port: int, *, under_launcher: bool, seconds: float) -> list[Finding]:
    """Under a launcher the store must answer there; else the port must be free."""
    name = "meeting port"
    if under_launcher:
        try:
            with socket.create_connection((address, port), timeout=seconds):
                return [Finding(name, f"{address}:{port} answers", OK)]
        except OSError as error:
            remedy = "the first node's firewall or address: open the port, or give another --master-port (launch.port)"
            return [Finding(name, f"{address}:{port}: {error.strerror or error}", FAIL, remedy)]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            used = error.errno == errno.EADDRINUSE
            remedy = f"a job that meets there cannot start: ss -ltnp 'sport = :{port}', or give --master-port"
            text = "in use" if used else os.strerror(error.errno or 0)
            return [Finding(name, f"{port}: {text}", WARN, remedy)]
    return [Finding(name, f"{port} is free", INFO)]

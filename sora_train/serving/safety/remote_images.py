"""Pictures that a request names by address: fetched from the public internet alone, whatever the address says.

A host is resolved once and the checked address is connected to, so that a name cannot answer with another one later
(DNS rebinding); each redirect is a new address. The environment's proxies, cookies and credentials have no part in it.
"""

import base64
import binascii
import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass

from sora_train.base.text import printable
from sora_train.base.timed import TimedResponse
from sora_train.errors import UserError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTS = {"http": 80, "https": 443}
SHOWN = 80
"""Characters of an address that a sentence quotes."""
_MOVED = (301, 302, 303, 307, 308)
_METADATA = ipaddress.ip_address("168.63.129.16")
"""Azure's, which is the one that lies in public space."""
_EMBEDDING = [ipaddress.IPv6Network(net) for net in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")]
"""Networks whose last 32 bits are an IPv4 address: compatible, and translated (NAT64)."""


class BadImageUrl(UserError):
    """An address that is not fetched, or that gave no picture within the limits; the message is for whoever asked."""


def is_public(address: Address, port: int) -> bool:
    """Whether anyone on the internet could ask the same: no private, local, shared, reserved or metadata address."""
    if port not in PORTS.values() or address == _METADATA:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.is_site_local or address.teredo:
            return False
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and any(address in net for net in _EMBEDDING):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner, port)
    refused = address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not refused


@dataclass(frozen=True)
class RemoteImages:
    """Fetches pictures. All limits are of one fetch, its redirects included."""

    most_bytes: int = 20 << 20
    seconds: float = 15.0
    redirects: int = 3
    may_connect: Callable[[Address, int], bool] = is_public
    """Of an address and a port; another than `is_public` is for tests."""

    def fetch(self, url: str) -> bytes:
        """The bytes at an address of http:, https: or data:; what they are is for the caller to find out.

        Raises BadImageUrl.
        """
        end = time.monotonic() + self.seconds
        if url[:5].lower() == "data:":
            return self._data(url)
        for _ in range(self.redirects + 1):
            data, moved = self._hop(_parsed(url), end)
            if data is not None:
                return data
            url = urllib.parse.urljoin(url, moved)
        raise BadImageUrl(
            f"image_url is redirected more than {self.redirects} times; give the last address"
        )

    def _data(self, url: str) -> bytes:
        head, comma, payload = url[5:].partition(",")
        if not comma:
            raise BadImageUrl("image_url is no data: URL; write data:image/png;base64,...")
        if len(payload) > 4 * self.most_bytes:
            raise self._too_large()
        try:
            if head.lower().endswith(";base64"):
                data = base64.b64decode(urllib.parse.unquote_to_bytes(payload), validate=True)
            else:
                data = urllib.parse.unquote_to_bytes(payload)
        except (binascii.Error, ValueError):
            raise BadImageUrl("image_url holds no base64; encode the picture anew") from None
        if len(data) > self.most_bytes:
            raise self._too_large()
        return data

    def _hop(self, url: urllib.parse.SplitResult, end: float) -> tuple[bytes | None, str]:
        """The body of one address, or None and where it has moved."""
        host, port = url.hostname or "", url.port or PORTS[url.scheme]
        address = self._checked(host, port, end)
        try:
            with socket.create_connection((str(address), port), _left(end)) as plain:
                plain.settimeout(_left(end))
                if url.scheme == "https":
                    context = ssl.create_default_context()
                    with context.wrap_socket(plain, server_hostname=host) as secure:
                        return self._asked(secure, url, end)
                return self._asked(plain, url, end)
        except TimeoutError:
            raise self._too_slow() from None
        except (OSError, http.client.HTTPException) as error:
            # Which of a host's ports are closed, and what answers there, is nobody's business.
            raise BadImageUrl(
                f"{_quoted(url.geturl())} cannot be fetched; check the address"
            ) from error

    def _asked(
        self, sock: socket.socket, url: urllib.parse.SplitResult, end: float
    ) -> tuple[bytes | None, str]:
        connection = http.client.HTTPConnection(url.hostname or "", url.port or 80)
        connection.response_class = TimedResponse
        connection.sock = sock
        path = urllib.parse.quote(url.path or "/", safe="/%:@!$&'()*+,;=~")
        query = urllib.parse.quote(url.query, safe="/%:@!$&'()*+,;=~?")
        headers = {
            "Host": url.netloc.encode("idna").decode(),
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
            "User-Agent": "sora_train",
        }
        sock.settimeout(_left(end))
        connection.request("GET", path + (f"?{query}" if query else ""), headers=headers)
        sock.settimeout(_left(end))
        with connection.getresponse() as response:
            location = response.headers.get("Location", "")
            if response.status in _MOVED and location:
                return None, location
            if response.status != 200:
                status = f"answers {response.status}"
                raise BadImageUrl(f"{_quoted(url.geturl())} {status}; check the address")
            return self._body(response), ""

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if (response.length or 0) > self.most_bytes:
            raise self._too_large()
        data = bytearray()
        while piece := response.read1(1 << 16):
            data += piece
            if len(data) > self.most_bytes:
                raise self._too_large()
        if response.length:
            raise http.client.IncompleteRead(bytes(data[:0]), response.length)
        return bytes(data)

    def _checked(self, host: str, port: int, end: float) -> Address:
        """The address of a host that is connected to; all that it has must be allowed."""
        found = _resolved(host, port, end)
        if found is None:
            raise self._too_slow()
        if not found or not all(self.may_connect(address, port) for address in found):
            # One sentence for both, so that nobody learns which names an inner network has.
            raise BadImageUrl(
                f"image_url names {_quoted(host)} port {port}, which is no public web server; give an address that "
                "anybody can open, or send the file itself"
            )
        return found[0]

    def _too_large(self) -> BadImageUrl:
        return BadImageUrl(
            f"image_url gives more than {self.most_bytes >> 20} MiB; give a smaller picture"
        )

    def _too_slow(self) -> BadImageUrl:
        return BadImageUrl(
            f"image_url does not answer within {self.seconds:g} s; send the file itself"
        )


def _parsed(url: str) -> urllib.parse.SplitResult:
    """An address that is worth resolving. Raises BadImageUrl."""
    # urlsplit would take line ends out, and other readers take a backslash for a slash.
    if any(ord(letter) <= 32 or letter in "\\\x7f" for letter in url):
        raise BadImageUrl("image_url holds a space, a line end or a backslash; percent-encode it")
    try:
        parts = urllib.parse.urlsplit(url)
        port, host = parts.port, (parts.hostname or "").encode("idna").decode()
    except ValueError:
        raise BadImageUrl(
            f"image_url={_quoted(url)} is no address; write https://host/path"
        ) from None
    if parts.scheme not in PORTS:
        raise BadImageUrl(
            f"image_url={_quoted(url)} is fetched by https:, http: or data: only; give such an address"
        )
    if "@" in parts.netloc:
        raise BadImageUrl("image_url holds a name or a password; give an address without them")
    if not host or "%" in host or port == 0:
        raise BadImageUrl(f"image_url={_quoted(url)} names no host; write https://host/path")
    return parts


def _resolved(host: str, port: int, end: float) -> list[Address] | None:
    """All addresses of a host, none for one that there is not; None: there was no answer in time.

    The resolver has no timeout of its own, so it works in a thread that may be left behind.
    """
    answers: queue.SimpleQueue[list[Address]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put([ipaddress.ip_address(str(one[4][0])) for one in found])
        except (OSError, ValueError):
            answers.put([])

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=_left(end))
    except queue.Empty:
        return None


def _left(end: float) -> float:
    """Seconds until then, and never none: a socket's timeout of 0 would be no timeout."""
    return max(1e-3, end - time.monotonic())


def _quoted(text: str) -> str:
    return repr(printable(text))[: SHOWN + 2]

"""image_url: only the public internet is asked, on every hop, and never for long or for much."""

import base64
import ipaddress
import itertools
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.serving.safety.remote_images import BadImageUrl, RemoteImages, is_public
from tests.sentences import refuses
from tests.serve.rude_server import answer, rude_server, silent, slowly

PICTURE = b"\x89PNG some bytes"


def loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> bool:
    """For servers of these tests: 127.0.0.1 and no other address."""
    return str(address) == "127.0.0.1"


HERE = RemoteImages(seconds=3, may_connect=loopback)


def test_a_picture_comes_as_it_is_and_nothing_private_is_sent(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with rude_server(lambda head: [answer(PICTURE)]) as server:
        assert HERE.fetch(f"{server.url}/a%20b/ü.png?q=1#part") == PICTURE
    head = server.asked[0].decode()
    assert head.startswith("GET /a%20b/%C3%BC.png?q=1 HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{server.port}\r\n" in head
    assert not any(word in head.lower() for word in ("cookie", "authorization", "referer"))


@pytest.mark.parametrize(
    "body",
    [
        b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n" + PICTURE + b"\r\n0\r\n\r\n",
    ],
)
def test_lengths_may_be_told_in_any_way(body):
    with rude_server(lambda head: [body]) as server:
        assert HERE.fetch(server.url) == PICTURE


# --- which addresses ---

# Written down from the registries of IANA (special-purpose addresses) and the clouds' documentation.
INNER = """
127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.1.1
169.254.169.254 169.254.0.1 100.64.0.1 100.100.100.200 192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1
224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 168.63.129.16 ::1 :: fe80::1 fc00::1 fd00:ec2::254 ff02::1
fec0::1 2001:db8::1 100::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::127.0.0.1 64:ff9b::7f00:1
64:ff9b:1::a00:1 64:ff9b::a9fe:a9fe 2002:7f00:1:: 2002:a00:1:: 2001:0:5ef5:79fd::1
"""
OUTER = """
1.1.1.1 8.8.8.8 93.184.216.34 172.15.0.1 172.32.0.1 192.167.0.1 100.63.0.1 100.128.0.1 168.63.129.17
2606:4700::1111 2001:4860:4860::8888 ::ffff:8.8.8.8 64:ff9b::808:808
"""


@pytest.mark.parametrize("address", INNER.split())
def test_inner_addresses_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address), 443)


@pytest.mark.parametrize("address", OUTER.split())
def test_outer_addresses_are(address):
    assert is_public(ipaddress.ip_address(address), 443)
    assert not is_public(ipaddress.ip_address(address), 22)


SPELLED = """
localhost 127.1 0x7f.0.0.1 0177.0.0.1 2130706433 0x7f000001 017700000001 127.0.0.1. 0 [::1] [::ffff:7f00:1]
[0:0:0:0:0:ffff:127.0.0.1] 169.254.169.254 １２７.０.０.１ 127。0。0。1 no-such-host.invalid
"""
"""Inner addresses as URLs may write them, and a name that there is not."""


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_as_public_inside_ipv6(address):
    inside = [f"::ffff:{address}", f"64:ff9b::{address}"]
    assert all(is_public(ipaddress.ip_address(one), 80) == is_public(address, 80) for one in inside)


@pytest.mark.parametrize(
    "host",
    SPELLED.split(),
)
def test_other_ways_to_write_an_inner_address_are_refused(host):
    with rude_server(lambda head: [answer(PICTURE)]) as server:
        for port in ("", f":{server.port}"):
            with refuses(BadImageUrl, "image_url", "public", "send the file itself"):
                RemoteImages(seconds=5).fetch(f"http://{host}{port}/")
    assert not server.asked


@pytest.mark.parametrize(
    "url, fact",
    [
        ("file:///etc/passwd", "https:"),
        ("ftp://example.org/a.png", "https:"),
        ("gopher://127.0.0.1:6379/_x", "https:"),
        ("/etc/passwd", "https:"),
        ("", "https:"),
        ("http://", "host"),
        ("http:///a.png", "host"),
        ("http://user:secret@example.org/", "password"),
        ("http://user@example.org/", "password"),
        ("http://example.org\\@127.0.0.1/", "backslash"),
        ("http://example.org/\r\nX-Injected: 1", "line end"),
        ("http://exam ple.org/", "space"),
        ("http://example.org:99999/", "address"),
        ("http://example.org:0/", "host"),
        ("http://[fe80::1%25lo]/", "host"),
        ("http://[::1/", "address"),
        ("http://a..b/", "address"),
        (f"http://{'a' * 64}.org/", "address"),
    ],
)
def test_what_is_no_plain_web_address_is_refused(url, fact):
    with refuses(BadImageUrl, "image_url", fact):
        RemoteImages().fetch(url)


def test_secrets_of_an_address_are_not_repeated():
    with pytest.raises(BadImageUrl) as caught:
        RemoteImages().fetch("http://user:secret@example.org/")
    assert "secret" not in str(caught.value)


def test_a_name_is_resolved_once_and_the_checked_address_is_connected_to(monkeypatch):
    """DNS rebinding: the name answers with 127.0.0.1 from the second time on."""
    answers = itertools.chain(["127.0.0.1"], itertools.repeat("127.0.0.2"))
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        _only_for("rebinding.example", lambda: next(answers), socket.getaddrinfo),
    )
    with rude_server(lambda head: [answer(PICTURE)]) as server:
        url = f"http://rebinding.example:{server.port}/"
        assert HERE.fetch(url) == PICTURE
        assert b"Host: rebinding.example" in server.asked[0]
        with refuses(BadImageUrl, "rebinding.example", "public"):
            HERE.fetch(url)


def _only_for(host, address, real):
    def getaddrinfo(name, port, *args, **named):
        if name == host:
            found = address()
            listed = found if isinstance(found, list) else [found]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in listed]
        return real(name, port, *args, **named)

    return getaddrinfo


def test_a_host_with_one_inner_address_among_others_is_refused(monkeypatch):
    both = _only_for("both.example", lambda: ["93.184.216.34", "10.0.0.1"], socket.getaddrinfo)
    monkeypatch.setattr(socket, "getaddrinfo", both)
    with refuses(BadImageUrl, "both.example", "public"):
        RemoteImages().fetch("https://both.example/")


# --- redirects ---


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status):
    def plays(head: bytes) -> list[bytes]:
        if head.startswith(b"GET /there"):
            return [answer(PICTURE)]
        return [answer(b"", f"{status} Moved", location="/there?x=1")]

    with rude_server(plays) as server:
        assert HERE.fetch(f"{server.url}/here") == PICTURE


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2:80/",
        "http://169.254.169.254/latest/meta-data/",
        "//10.0.0.1/",
        "http://[::1]/",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "http://u:p@127.0.0.1/",
    ],
)
def test_every_hop_is_checked(target):
    with rude_server(lambda head: [answer(b"", "302 Found", location=target)]) as server:
        with refuses(BadImageUrl, "image_url"):
            HERE.fetch(server.url)
        assert len(server.asked) == 1


def test_redirects_have_an_end():
    with rude_server(lambda head: [answer(b"", "302 Found", location="/again")]) as server:
        with refuses(BadImageUrl, "image_url", "redirected", "3"):
            HERE.fetch(server.url)
        assert len(server.asked) == 4


# --- sizes and times ---

SMALL = RemoteImages(most_bytes=1 << 20, seconds=3, may_connect=loopback)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % (1 << 40),
    ],
)
def test_a_body_without_end_is_cut_off(head):
    endless = itertools.chain([head], itertools.repeat(bytes(1 << 16)))
    with (
        rude_server(lambda asked: endless) as server,
        refuses(BadImageUrl, "image_url", "1 MiB", "smaller"),
    ):
        SMALL.fetch(server.url)


def test_the_largest_body_is_taken():
    with rude_server(lambda head: [answer(bytes(1 << 20))]) as server:
        assert len(SMALL.fetch(server.url)) == 1 << 20


@pytest.mark.parametrize("part", ["head", "body", "nothing", "redirects", "headers"])
def test_a_slow_server_costs_no_more_than_the_time(part):
    moved = answer(b"", "302 Found", location="/again")
    plays = {
        "head": lambda head: slowly(answer(PICTURE)),
        "body": lambda head: [answer(b"", content_length="99"), *slowly(bytes(99))],
        "nothing": lambda head: silent(3),
        "redirects": lambda head: [moved[:10], moved[10:20], moved[20:30], moved[30:]],
        "headers": lambda head: itertools.chain(
            [b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"a: b\r\n")
        ),
    }[part]
    began = time.monotonic()
    with (
        rude_server(plays, drip=0.1) as server,
        refuses(BadImageUrl, "image_url", "0.6 s", "send the file itself"),
    ):
        RemoteImages(seconds=0.6, may_connect=loopback, redirects=100).fetch(server.url)
    assert time.monotonic() - began < 2


def test_a_slow_resolver_costs_no_more_than_the_time(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: time.sleep(3) or [])
    began = time.monotonic()
    with refuses(BadImageUrl, "0.3 s"):
        RemoteImages(seconds=0.3).fetch("https://example.org/")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 999999 x\r\n\r\n",
        answer(b"", "404 Not Found"),
        answer(b"", "302 Found"),
        answer(b"", "204 No Content"),
        answer(PICTURE, content_length="100"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    ],
)
def test_answers_that_are_none_are_refused_in_a_sentence(said):
    with rude_server(lambda head: [said]) as server, refuses(BadImageUrl, "check the address"):
        HERE.fetch(server.url)


def test_a_closed_port_is_refused():
    with rude_server(lambda head: []) as server:
        pass
    with refuses(BadImageUrl, "check the address"):
        HERE.fetch(server.url)


# --- data: ---


def test_data_urls_hold_what_they_hold():
    coded = base64.b64encode(PICTURE).decode()
    assert RemoteImages().fetch(f"data:image/png;base64,{coded}") == PICTURE
    assert RemoteImages().fetch(f"DATA:;BASE64,{coded}") == PICTURE
    assert RemoteImages().fetch("data:,a%20b") == b"a b"


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png;base64", "data:image/png;base64,=x", "data:;base64,ü"]
)
def test_data_urls_that_are_none(url):
    with refuses(BadImageUrl, "image_url"):
        RemoteImages().fetch(url)


def test_a_data_url_has_the_same_limit():
    assert len(SMALL.fetch("data:;base64," + base64.b64encode(bytes(1 << 20)).decode())) == 1 << 20
    for coded in (base64.b64encode(bytes((1 << 20) + 1)).decode(), "A" * (5 << 20)):
        with refuses(BadImageUrl, "1 MiB"):
            SMALL.fetch(f"data:;base64,{coded}")

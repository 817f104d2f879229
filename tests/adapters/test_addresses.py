"""Which addresses are the internet's, and that no other is connected to, whatever it is called."""

from __future__ import annotations

import errno
import socket

import pytest

from lorikeet.adapters.sources.addresses import PublicSockets, is_public, is_refusal


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1"),
        *(
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::808:808",
            "2002:7f00:1::",
        ),
        *("2001:0:4136:e378:8000:63bf:80ff:fffe", "localhost", "2130706433", ""),
    ],
)
def test_not_public(address):
    assert not is_public(address)


def place(address: str, port: int = 80):
    return (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))


def test_a_socket_for_another_address_is_not_even_made(monkeypatch):
    monkeypatch.delenv("http_proxy", raising=False)
    with pytest.raises(OSError, match="not public") as caught:
        PublicSockets()(place("10.0.0.1"))
    assert caught.value.errno == errno.EACCES
    assert is_refusal(caught.value)
    assert not is_refusal(OSError(errno.EACCES, "something else"))
    assert not is_refusal(None)
    with PublicSockets()(place("8.8.8.8")):
        pass


def test_the_operators_proxy_may_be_anywhere(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:3128")
    sockets = PublicSockets()
    with sockets(place("127.0.0.1", 3128)):
        pass
    with pytest.raises(OSError, match="not public"):
        sockets(place("127.0.0.1", 80))

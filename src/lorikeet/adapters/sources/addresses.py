"""Which addresses a download may connect to.

The address that is connected to is checked, not the name: a name may mean another address the next time it is asked
for, and a redirect is a new connection. So every spelling of an address is seen as what the system makes of it.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

REFUSAL = "its host, or one that it redirects to, has an address that is not public; --lora-allow-private-hosts allows these"

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Public by their numbers: special ones of clouds (Oracle's and Azure's services for their machines), local NAT64.
_NOT_PUBLIC = (
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("168.63.129.16/32"),
    ipaddress.ip_network("64:ff9b:1::/48"),
)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet: not this machine, not a private or local network, no metadata
    service, no group. False for what is not an address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        # Addresses that stand for one of version 4.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def is_refusal(error: BaseException | None) -> bool:
    """Whether a connection failed because of :func:`public_socket`."""
    return isinstance(error, OSError) and error.errno == errno.EACCES and REFUSAL in str(error)


class PublicSockets:
    """Makes sockets for aiohttp's connector, to public addresses only. A proxy that the environment names is the
    operator's and may be anywhere; whom it connects to is its own decision."""

    def __init__(self) -> None:
        self._proxies = _proxy_addresses()

    def __call__(self, address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, place = address
        if not is_public(str(place[0])) and tuple(place[:2]) not in self._proxies:
            raise OSError(errno.EACCES, REFUSAL)
        return socket.socket(family, kind, protocol)


def _proxy_addresses() -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    for scheme, url in getproxies().items():
        if scheme not in ("http", "https"):
            continue
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            places = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError):
            continue
        found.update((str(place[0]), int(place[1])) for *_, place in places)
    return found

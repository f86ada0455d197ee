"""Which network interface leads to another machine. Nothing here imports torch."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys

SIOCGIFADDR = 0x8915
"""Of Linux' netdevice(7): the IPv4 address of an interface."""


def interface_towards(host: str, *, elsewhere: bool) -> str | None:
    """The interface whose address packets to `host` come from; None where that can't be told.

    Args:
        elsewhere: other machines are to reach this one through it. Where `host` is this machine's own name, which many
            systems let stand for 127.0.1.1, that can't be told.
    """
    if sys.platform != "linux":
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 1))  # sends nothing
            address = probe.getsockname()[0]
            if elsewhere and ipaddress.ip_address(address).is_loopback:
                return None
            return next((name for _, name in socket.if_nameindex() if _address(probe, name) == address), None)
    except OSError:
        return None


def _address(any_socket: socket.socket, interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        return socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)[20:24])
    except OSError:  # it has none
        return None

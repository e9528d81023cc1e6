"""Where processes listen: ``@name`` (an abstract Unix socket) or ``tcp://host:port``. Pure text."""

from __future__ import annotations

import ipaddress
import urllib.parse
from dataclasses import dataclass

from memserve.core.errors import ProtocolError

_SCHEME = "tcp"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """An abstract Unix socket: nothing in the file system, reachable on this host only."""

    name: str

    @property
    def path(self) -> str:
        return "\0" + self.name

    def __str__(self) -> str:
        return f"@{self.name}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host name or IP address, and a port; port 0 lets the system choose when listening."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{_SCHEME}://{host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Read ``@name``, ``tcp://host:port`` or ``tcp://[ipv6]:port``. Raises ``ProtocolError``."""
    if text.startswith("@") and len(text) > 1:
        return UnixAddress(text[1:])
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    rest = "" if host is None else parts.path + parts.query + parts.fragment + (parts.username or "")
    if host is None or port is None or rest or parts.scheme != _SCHEME:
        raise ProtocolError(f"address {text!r} is none of ours; write @name or {_SCHEME}://host:port")
    return TcpAddress(host, port)


def is_loopback(ip: str) -> bool:
    """Whether a numeric address, as sockets report it, never leaves this host."""
    return ipaddress.ip_address(ip.partition("%")[0]).is_loopback

"""Reading and writing addresses."""

from __future__ import annotations

import pytest

from memserve.core.errors import ProtocolError
from memserve.wire.address import TcpAddress, UnixAddress, is_loopback, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("@pool", UnixAddress("pool")),
        ("tcp://127.0.0.1:80", TcpAddress("127.0.0.1", 80)),
        ("tcp://node-7.cluster:0", TcpAddress("node-7.cluster", 0)),
        ("tcp://[::1]:5000", TcpAddress("::1", 5000)),
    ],
)
def test_addresses_are_read_and_written_alike(text: str, address: UnixAddress | TcpAddress) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "pool",
        "tcp://",
        "tcp://host",
        "tcp://:80",
        "tcp://host:port",
        "tcp://host:70000",
        "udp://host:80",
        "tcp://host:80/path",
        "tcp://user@host:80",
        "tcp://[::1:80",
    ],
)
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(ProtocolError, match="write @name or tcp://host:port"):
        parse_address(text)


@pytest.mark.parametrize(
    ("ip", "stays"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("fe80::1%lo", False),
    ],
)
def test_loopback(ip: str, stays: bool) -> None:
    assert is_loopback(ip) is stays

"""Which backend two pools use with each other."""

from __future__ import annotations

import pytest

from memserve.core.errors import ConfigError, PeerLost
from memserve.core.messages import Hello
from memserve.core.types import InstanceId
from memserve.mempool.transfer.backends import choose_backend, require_known


def hello(host: str, *backends: str) -> Hello:
    return Hello(InstanceId("b"), 1, "", "", host, "", backends)


@pytest.mark.parametrize(
    ("wanted", "host", "offered", "chosen"),
    [
        (("shm", "tcp"), "here", ("shm", "tcp"), "shm"),
        (("shm", "tcp"), "there", ("shm", "tcp"), "tcp"),
        (("shm", "tcp"), "here", ("tcp",), "tcp"),
        (("tcp", "shm"), "here", ("shm", "tcp"), "tcp"),
        (("shm", "nixl"), "here", ("shm", "tcp"), "shm"),
        (("shm", "nixl", "tcp"), "here", ("shm", "nixl", "tcp"), "shm"),
        (("shm", "nixl", "tcp"), "there", ("shm", "nixl", "tcp"), "nixl"),
        (("shm", "nixl", "tcp"), "there", ("shm", "tcp"), "tcp"),
        (("shm", "tcp"), "there", ("shm", "nixl", "tcp"), "tcp"),
    ],
)
def test_the_first_that_both_can(
    wanted: tuple[str, ...], host: str, offered: tuple[str, ...], chosen: str
) -> None:
    assert choose_backend(wanted, hello("here"), hello(host, *offered)) == chosen


@pytest.mark.parametrize(
    ("wanted", "host", "offered", "reason"),
    [
        (("shm",), "there", ("shm", "tcp"), "on another host"),
        (("shm", "tcp"), "there", ("shm",), "cluster key"),
        (("tcp",), "here", (), "there none"),
    ],
)
def test_no_way_says_why(wanted: tuple[str, ...], host: str, offered: tuple[str, ...], reason: str) -> None:
    with pytest.raises(PeerLost, match=reason):
        choose_backend(wanted, hello("here"), hello(host, *offered))


@pytest.mark.parametrize("names", [(), ("shm", "carrier pigeon")])
def test_unknown_names_are_refused_at_the_door(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="choose from shm, nixl, tcp"):
        require_known(names)

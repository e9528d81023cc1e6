"""The nixl backend without NIXL: what is said when it is missing, and what peers say of their memory."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest

from memserve.core.clock import MonotonicClock
from memserve.core.errors import ConfigError, ProtocolError
from memserve.core.types import InstanceId
from memserve.mempool import KVLayout, MemPool, TransferEndpoint
from memserve.mempool.transfer.backends import DEFAULT_BACKENDS
from memserve.mempool.transfer.nixl_agent import load_bindings, read_offer


@pytest.fixture
def _no_nixl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where it is not installed."""
    for package in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"{package}._bindings", raising=False)
    load_bindings.cache_clear()
    yield
    load_bindings.cache_clear()


@pytest.fixture
def pool() -> Iterator[MemPool]:
    layout = KVLayout("small", layers=2, kv_heads=1, head_dim=64)
    pool = MemPool(layout, 4, instance=InstanceId("a"), incarnation=1, clock=MonotonicClock())
    yield pool
    pool.close()


@pytest.mark.usefixtures("_no_nixl")
def test_whoever_asks_for_it_is_told_what_to_install(pool: MemPool) -> None:
    with pytest.raises(ConfigError, match=r"nixl-cu12.*pip install --no-deps nixl-cu12"):
        TransferEndpoint(pool, MonotonicClock(), backends=("shm", "nixl"))


@pytest.mark.usefixtures("_no_nixl")
def test_whoever_does_not_ask_for_it_does_not_need_it(pool: MemPool) -> None:
    assert "nixl" not in DEFAULT_BACKENDS

    async def scenario() -> None:
        endpoint = TransferEndpoint(pool, MonotonicClock())
        await endpoint.start("@memserve-test-without-nixl")
        assert endpoint._hello.backends == ("shm",)
        await endpoint.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("raw", [b"", b"\x93", b"\x81\xa5agent\x01"])
def test_nonsense_about_memory_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="NIXL agent"):
        read_offer(raw)

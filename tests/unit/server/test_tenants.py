"""Whose requests are whose, what a request may ask of the line, and what clients see of refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from memserve.core.config import ServerConfig, TenantConfig
from memserve.core.errors import Overloaded, Refusal
from memserve.engine.models.tokenizer import Tokenizer
from memserve.server.app import create_app
from memserve.server.backend import Counter, LineView, TenantView
from memserve.server.stand_in import Script, StandInBackend
from memserve.server.tenants import Tenants

pytestmark = pytest.mark.anyio
COMPLETION = "/v1/completions"
ASKED = {"prompt": "a", "max_tokens": 1}
SEARCH = TenantConfig("search", 3.0, "k-search")
BATCH = TenantConfig("batch", api_key="k-batch")
LIGHT = TenantConfig("light", 0.5)


@asynccontextmanager
async def client_of(
    backend: StandInBackend, tokenizer: Tokenizer, config: ServerConfig
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(backend, tokenizer, None, ("tiny",), config, 64))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


async def test_a_request_says_tenant_priority_and_limit(
    client: httpx.AsyncClient, backend: StandInBackend
) -> None:
    headers = {"x-memserve-tenant": "team/a", "x-memserve-slo-ttft": "2.5"}
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "priority": -3}
    assert (await client.post("/v1/chat/completions", json=asked, headers=headers)).status_code == 200
    assert (await client.post(COMPLETION, json=ASKED | {"priority": 7})).status_code == 200
    first, second = backend.requests
    assert (first.tenant, first.priority, first.slo_ttft) == ("team/a", -3, 2.5)
    assert (second.tenant, second.priority, second.slo_ttft) == ("default", 7, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("x-memserve-tenant", ""),
        ("x-memserve-tenant", "a b"),
        ("x-memserve-tenant", "a" * 65),
        ("x-memserve-slo-ttft", "soon"),
        ("x-memserve-slo-ttft", "0"),
        ("x-memserve-slo-ttft", "-1"),
        ("x-memserve-slo-ttft", "nan"),
        ("x-memserve-slo-ttft", "inf"),
    ],
)
async def test_headers_that_make_no_sense_are_refused(
    client: httpx.AsyncClient, backend: StandInBackend, field: str, value: str
) -> None:
    response = await client.post(COMPLETION, json=ASKED, headers={field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (field, "invalid_value")
    assert backend.requests == []


@pytest.mark.parametrize("value", [1 << 31, -(1 << 31) - 1, 1.5, "high"])
async def test_a_priority_is_a_32_bit_integer(client: httpx.AsyncClient, value: object) -> None:
    response = await client.post(COMPLETION, json=ASKED | {"priority": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"


async def test_the_servers_limit_holds_unless_the_request_says_its_own(
    backend: StandInBackend, tokenizer: Tokenizer
) -> None:
    async with client_of(backend, tokenizer, ServerConfig(slo_ttft=4.0)) as client:
        await client.post(COMPLETION, json=ASKED)
        await client.post(COMPLETION, json=ASKED, headers={"x-memserve-slo-ttft": "30"})
    assert [request.slo_ttft for request in backend.requests] == [4.0, 30.0]


async def test_a_key_says_whose_a_request_is(backend: StandInBackend, tokenizer: Tokenizer) -> None:
    config = ServerConfig(tenants=(SEARCH, BATCH, LIGHT))
    async with client_of(backend, tokenizer, config) as client:
        for key in ("k-search", "k-batch"):
            headers = {"authorization": f"Bearer {key}", "x-memserve-tenant": "search"}
            assert (await client.post(COMPLETION, json=ASKED, headers=headers)).status_code == 200
        for headers in ({}, {"authorization": "Bearer other"}, {"x-memserve-tenant": "light"}):
            assert (await client.post(COMPLETION, json=ASKED, headers=headers)).status_code == 401
    assert [request.tenant for request in backend.requests] == ["search", "batch"]


async def test_the_common_key_may_name_anybody(backend: StandInBackend, tokenizer: Tokenizer) -> None:
    config = ServerConfig(api_key="gateway", tenants=(SEARCH,))
    async with client_of(backend, tokenizer, config) as client:
        common = {"authorization": "Bearer gateway"}
        for headers in (common, common | {"x-memserve-tenant": "someone"}):
            assert (await client.post(COMPLETION, json=ASKED, headers=headers)).status_code == 200
    assert [request.tenant for request in backend.requests] == ["default", "someone"]


def test_weights_are_those_configured_else_one() -> None:
    tenants = Tenants(None, (SEARCH, LIGHT))
    assert [tenants.weight(name) for name in ("search", "light", "new")] == [3.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("reason", "status", "kind"),
    [
        (Refusal.TENANT_QUEUE_FULL, 429, "rate_limit_error"),
        (Refusal.QUEUE_FULL, 503, "service_unavailable_error"),
        (Refusal.SLO_TTFT, 503, "service_unavailable_error"),
    ],
)
@pytest.mark.parametrize(("seconds", "told"), [(0.01, "1"), (6.2, "7"), (1e9, "600")])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_says_why_and_when_to_come_back(
    client: httpx.AsyncClient,
    backend: StandInBackend,
    reason: Refusal,
    status: int,
    kind: str,
    seconds: float,
    told: str,
    stream: bool,
) -> None:
    backend.script = Script(failure=Overloaded("too much", reason=reason, retry_after=seconds))
    response = await client.post(COMPLETION, json=ASKED | {"stream": stream})
    assert response.status_code == status
    assert response.headers["retry-after"] == told
    error = response.json()["error"]
    assert (error["message"], error["type"], error["code"]) == ("too much", kind, reason.value)


async def test_the_line_is_in_metrics_and_in_the_cluster(
    client: httpx.AsyncClient, backend: StandInBackend
) -> None:
    tenants = (TenantView("search", 3.0, 2, 700, 5, 1.5),)
    backend.line = LineView(tenants, (Counter("slo_ttft", 4),))
    text = (await client.get("/metrics")).text
    for shown in (
        'memserve_waiting_requests{tenant="search"} 2.0',
        'memserve_waiting_tokens{tenant="search"} 700.0',
        'memserve_wait_seconds_count{tenant="search"} 5.0',
        'memserve_wait_seconds_sum{tenant="search"} 1.5',
        'memserve_refusals_total{reason="slo_ttft"} 4.0',
    ):
        assert shown in text
    line = (await client.get("/v1/cluster")).json()["line"]
    assert line["tenants"][0] == {
        "tenant": "search", "weight": 3.0, "waiting": 2, "tokens": 700, "waited": 5, "waited_seconds": 1.5
    }  # fmt: skip
    assert line["refusals"] == [{"name": "slo_ttft", "value": 4.0}]

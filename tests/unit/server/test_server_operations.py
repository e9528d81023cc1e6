"""Models, cluster, decisions, health, metrics, request ids, API keys, failures of the backend."""

from __future__ import annotations

import json

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from memserve.core.config import ServerConfig
from memserve.core.errors import (
    InvalidRequest,
    MemServeError,
    NoInstance,
    Overloaded,
    PeerLost,
    RequestFailed,
)
from memserve.engine.models.tokenizer import Tokenizer
from memserve.server.app import create_app
from memserve.server.backend import Health, LostInstance, StateCount
from memserve.server.stand_in import Script, StandInBackend

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == ["tiny", "alias"]
    assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 256
    missing = await client.get("/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_cluster(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/cluster")).json()
    assert body["instances"][0]["blocks"].keys() == {"total", "free", "active", "historical", "incoming"}
    assert body["trees"][0]["role"] == "colocated"


async def test_memory_of_an_instance(client: httpx.AsyncClient) -> None:
    answer = await client.put("/v1/cluster/stand-in-0/memory", json={"device": 100, "disk": 32})
    assert answer.json() == {
        "instance": "stand-in-0",
        "tiers": [
            {"tier": "device", "blocks": 6, "memory": 96, "draining": 0},
            {"tier": "disk", "blocks": 2, "memory": 32, "draining": 0},
        ],
    }


@pytest.mark.parametrize(
    ("instance", "body", "status", "field"),
    [
        ("other", {"device": 100}, 404, "instance"),
        ("stand-in-0", {}, 400, "device"),
        ("stand-in-0", {"gpu": 1}, 400, "gpu"),
        ("stand-in-0", {"host": "1GiB"}, 400, "host"),
    ],
)
async def test_memory_that_cannot_be_given(
    client: httpx.AsyncClient, instance: str, body: dict[str, object], status: int, field: str
) -> None:
    answer = await client.put(f"/v1/cluster/{instance}/memory", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field)


async def test_role_of_an_instance(client: httpx.AsyncClient) -> None:
    for role, before in (("decode", "colocated"), ("prefill", "decode")):
        answer = await client.put("/v1/cluster/stand-in-0/role", json={"role": role})
        assert answer.json() == {"instance": "stand-in-0", "role": role, "before": before}
    body = (await client.get("/v1/cluster")).json()
    assert body["instances"][0]["role"] == "prefill"
    assert (
        'memserve_instance_up{instance="stand-in-0",isa="",role="prefill"}'
        in (await client.get("/metrics")).text
    )


@pytest.mark.parametrize(
    ("instance", "body", "status", "field"),
    [
        ("other", {"role": "decode"}, 404, "instance"),
        ("stand-in-0", {"role": "both"}, 400, "role"),
        ("stand-in-0", {}, 400, "role"),
    ],
)
async def test_role_that_cannot_be(
    client: httpx.AsyncClient, instance: str, body: dict[str, object], status: int, field: str
) -> None:
    answer = await client.put(f"/v1/cluster/{instance}/role", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field)


async def test_decision_of_an_answer(client: httpx.AsyncClient) -> None:
    answer = (await client.post(CHAT, json=HELLO)).json()
    body = (await client.get(f"/v1/cluster/why/{answer['id']}")).json()
    assert body["id"] == answer["id"]
    assert [attempt["decision"]["prefill"] for attempt in body["attempts"]] == ["stand-in-0"]
    missing = await client.get("/v1/cluster/why/other")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "request_id")


async def test_decision_by_the_id_that_the_client_gave(client: httpx.AsyncClient) -> None:
    answers = [await client.post(CHAT, json=HELLO, headers={"x-request-id": "mine/1"}) for _ in range(2)]
    body = (await client.get("/v1/cluster/why/mine/1")).json()
    assert body["id"] == answers[1].json()["id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_names_its_route(client: httpx.AsyncClient, stream: bool) -> None:
    answer = await client.post(CHAT, json=HELLO | {"stream": stream})
    route = answer.headers["x-memserve-route"]
    assert route == "prefill=stand-in-0; decode=stand-in-0; policy=round-robin; matched=0"
    refused = await client.post(CHAT, json={})
    assert "x-memserve-route" not in refused.headers


async def test_trace_of_an_answer(client: httpx.AsyncClient) -> None:
    traced = (await client.post(CHAT, json=HELLO, headers={"x-memserve-trace": "1"})).json()
    body = (await client.get(f"/v1/traces/{traced['id']}")).json()
    assert [entry["room"] for entry in body["entries"]] == ["server.accept", "server.finish"]
    plain = (await client.post(CHAT, json=HELLO)).json()
    missing = await client.get(f"/v1/traces/{plain['id']}")
    assert missing.status_code == 404
    assert "x-memserve-trace" in missing.json()["error"]["message"]


@pytest.mark.parametrize(("status", "code"), [("ok", 200), ("degraded", 200), ("unavailable", 503)])
async def test_health(client: httpx.AsyncClient, backend: StandInBackend, status: str, code: int) -> None:
    lost = LostInstance("decode-0", "killed by SIGKILL", 12.5)
    backend.state = Health(status, "see lost", (StateCount("ready", 1),), (lost,))  # type: ignore[arg-type]
    response = await client.get("/health")
    assert response.status_code == code
    assert response.json() == {
        "status": status,
        "message": "see lost",
        "instances": {"ready": 1},
        "lost": [{"instance": "decode-0", "reason": "killed by SIGKILL", "at": 12.5}],
    }


async def test_metrics_count_requests_tokens_and_instances(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=HELLO | {"max_tokens": 3})
    await client.post(CHAT, json=HELLO | {"max_tokens": 0})
    await client.get("/made/up")
    text = (await client.get("/metrics")).text
    for line in (
        'memserve_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        'memserve_requests_total{endpoint="/v1/chat/completions",status="400"} 1.0',
        'memserve_requests_total{endpoint="other",status="404"} 1.0',
        'memserve_time_to_first_token_seconds_count{endpoint="/v1/chat/completions"} 1.0',
        'memserve_inter_token_seconds_count{endpoint="/v1/chat/completions"} 2.0',
        'memserve_request_seconds_count{endpoint="/v1/chat/completions"} 2.0',
        "memserve_generated_tokens_total 3.0",
        'memserve_choices_finished_total{reason="length"} 1.0',
        'memserve_instance_up{instance="stand-in-0",isa="",role="colocated"} 1.0',
        'memserve_tree_nodes{role="colocated"} 1.0',
        'memserve_tree_memory_bytes{role="colocated"} 4096.0',
        'memserve_tree_prompt_tokens{belief="stale",role="colocated",source="events"} 16.0',
        "memserve_requests_in_flight 1.0",
    ):
        assert line in text.splitlines()
    assert 'memserve_prompt_tokens_total{source="computed"}' in text


async def test_request_ids_are_echoed_or_made(client: httpx.AsyncClient) -> None:
    mine = await client.get("/v1/models", headers={"x-request-id": "abc-1"})
    assert mine.headers["x-request-id"] == "abc-1"
    odd = await client.get("/v1/models", headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"] not in ("", "a b")
    repeated = [await client.post(CHAT, json=HELLO, headers={"x-request-id": "same"}) for _ in range(2)]
    assert repeated[0].json()["id"] != repeated[1].json()["id"]


async def test_an_api_key_guards_v1_only(backend: StandInBackend, tokenizer: Tokenizer) -> None:
    app = create_app(backend, tokenizer, None, ("tiny",), ServerConfig(api_key="s3cret"), 64)
    async with client_of(app) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            response = await client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        good = {"authorization": "Bearer s3cret"}
        assert (await client.get("/v1/models", headers=good)).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_a_model_without_a_template_refuses_chat_only(
    backend: StandInBackend, tokenizer: Tokenizer
) -> None:
    async with client_of(create_app(backend, tokenizer, None, ("tiny",), ServerConfig(), 64)) as client:
        refused = await client.post(CHAT, json=HELLO)
        assert refused.status_code == 400
        assert "/v1/completions" in refused.json()["error"]["message"]
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200


FAILURES: list[tuple[MemServeError, int, str, bool]] = [
    (NoInstance("no prefill instance is ready"), 503, "no_instance", True),
    (Overloaded("256 requests are waiting"), 429, "overloaded", True),
    (PeerLost("decode-0 is gone"), 503, "instance_lost", True),
    (RequestFailed("decode-0: out of blocks"), 500, "request_failed", False),
    (InvalidRequest("prompt does not fit", field="prompt"), 400, "invalid_value", False),
]


@pytest.mark.parametrize(("failure", "status", "code", "retry"), FAILURES, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_failures_before_the_first_token(
    client: httpx.AsyncClient,
    backend: StandInBackend,
    failure: MemServeError,
    status: int,
    code: str,
    retry: bool,
    stream: bool,
    n: int,
) -> None:
    backend.script = Script(failure=failure)
    response = await client.post(CHAT, json=HELLO | {"stream": stream, "n": n})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"] == str(failure)
    assert ("retry-after" in response.headers) == retry
    assert not backend.running


async def test_a_failure_in_mid_stream_is_an_event(
    client: httpx.AsyncClient, backend: StandInBackend
) -> None:
    backend.script = Script(failure=PeerLost("decode-0 is gone"), fail_after=3)
    response = await client.post(CHAT, json=HELLO | {"stream": True})
    assert response.status_code == 200
    last = response.text.removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "instance_lost"
    assert "[DONE]" not in response.text
    assert not backend.running


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long_is_cancelled(
    backend: StandInBackend, tokenizer: Tokenizer, stream: bool
) -> None:
    backend.script = Script(stall_after=0)
    config = ServerConfig(request_timeout=0.05)
    async with client_of(create_app(backend, tokenizer, None, ("tiny",), config, 64)) as client:
        response = await client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "request_timeout"
    assert len(backend.cancelled) == 1


async def test_a_bug_is_an_error_in_the_same_shape(
    client: httpx.AsyncClient, backend: StandInBackend
) -> None:
    backend.script = Script(failure=ZeroDivisionError("secret"))  # type: ignore[arg-type]
    response = await client.post(CHAT, json=HELLO)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


async def test_a_bug_in_mid_stream_is_an_event(client: httpx.AsyncClient, backend: StandInBackend) -> None:
    backend.script = Script(failure=ZeroDivisionError("secret"), fail_after=2)  # type: ignore[arg-type]
    for n in (1, 2):
        response = await client.post(CHAT, json=HELLO | {"stream": True, "n": n})
        assert '"internal_error"' in response.text.split("\n\n")[-2]
    assert not backend.running


async def test_the_openapi_document_describes_the_bodies(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert "messages" in schemas["ChatBody"]["properties"]
    text = msgspec.json.encode(document).decode()
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in schemas
    assert (await client.get("/docs")).status_code == 200

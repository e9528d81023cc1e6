"""Endpoints for people and monitors: models, cluster, decisions, health, metrics."""

from __future__ import annotations

import logging
from http import HTTPStatus

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from memserve.core.errors import InvalidRequest, MemServeError
from memserve.core.types import RequestId
from memserve.server.backend import ClusterView, Health, InstanceView, LostInstance, TreeView
from memserve.server.door import TRACE_HEADER, Door, now
from memserve.server.metrics import CONTENT_TYPE
from memserve.server.responses import json_response
from memserve.server.schemas import ModelCard, ModelList
from memserve.server.validation import check_model

log = logging.getLogger(__name__)


class HealthBody(msgspec.Struct, frozen=True):
    """Body of ``GET /health``; ``instances`` counts them by state."""

    status: str
    message: str
    instances: dict[str, int]
    lost: tuple[LostInstance, ...]


class InstanceBlocks(msgspec.Struct, frozen=True):
    total: int
    free: int
    active: int
    historical: int
    incoming: int


class InstanceBody(msgspec.Struct, frozen=True):
    """One instance in ``GET /v1/cluster``."""

    instance: str
    role: str
    state: str
    incarnation: int
    pid: int
    isa: str
    blocks: InstanceBlocks
    waiting: int
    running: int
    tokens_to_prefill: int
    counters: dict[str, float]


class ClusterBody(msgspec.Struct, frozen=True):
    """Body of ``GET /v1/cluster``."""

    model: str
    policy: str
    phases: str
    block_tokens: int
    block_bytes: int
    instances: tuple[InstanceBody, ...]
    trees: tuple[TreeView, ...]


class TraceEntry(msgspec.Struct, frozen=True):
    """A room that a request entered; ``at`` is a monotonic clock shared by this machine, s."""

    instance: str
    room: str
    event: str
    at: float


class TraceBody(msgspec.Struct, frozen=True):
    """Body of ``GET /v1/traces/{id}``."""

    request: str
    entries: tuple[TraceEntry, ...]


class OperationEndpoints:
    """The endpoints; ``door`` is all they work with."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._created = now()

    async def list_models(self) -> Response:
        """The models that are served."""
        return json_response(ModelList([self._card(name) for name in self._door.served]))

    async def show_model(self, model: str) -> Response:
        """One served model."""
        return json_response(self._card(check_model(model, self._door.served)))

    async def show_cluster(self) -> Response:
        """Instances, their blocks and requests, and the sizes of the prompt trees."""
        return json_response(cluster_body(await self._door.backend.cluster()))

    async def show_decision(self, request_id: str) -> Response:
        """Why a request ran where it ran. ``request_id`` is the answer's ``id``."""
        decision = self._door.backend.decision(RequestId(request_id))
        if decision is None:
            raise _not_kept("decision", request_id, "only those of recent requests are")
        return json_response(decision)

    async def show_trace(self, request_id: str) -> Response:
        """The rooms that a request passed, if it was sent with ``x-memserve-trace: 1``."""
        traces = self._door.backend.trace(RequestId(request_id))
        if not traces:
            raise _not_kept("trace", request_id, f"send the request with the header {TRACE_HEADER}: 1")
        entries = tuple(TraceEntry(one.instance, one.room, one.event, one.at) for one in traces)
        return json_response(TraceBody(request_id, entries))

    async def show_health(self) -> Response:
        """200 while requests can be served, also with fewer instances than configured; else 503."""
        health = self._door.backend.health()
        ok = health.status != "unavailable"
        return json_response(health_body(health), HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE)

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus metrics. They are shown without the cluster's when that does not answer."""
        try:
            self._door.metrics.show_cluster(await self._door.backend.cluster())
        except MemServeError as error:
            log.warning("metrics without the cluster's: %s", error)
        return Response(self._door.metrics.render(), headers={"content-type": CONTENT_TYPE})

    def _card(self, name: str) -> ModelCard:
        return ModelCard(name, self._created, self._door.limits.context)


def _not_kept(what: str, request_id: str, remedy: str) -> InvalidRequest:
    text = f"No {what} is kept for request_id {request_id!r}; {remedy}."
    return InvalidRequest(text, field="request_id", code="not_found")


def health_body(health: Health) -> HealthBody:
    """Health as clients see it."""
    counts = {entry.state: entry.count for entry in health.instances}
    return HealthBody(health.status, health.message, counts, health.lost)


def cluster_body(view: ClusterView) -> ClusterBody:
    """The cluster as clients see it."""
    return ClusterBody(
        view.model,
        view.policy,
        view.phases,
        view.block_tokens,
        view.block_bytes,
        tuple(_instance_body(one) for one in view.instances),
        view.trees,
    )


def _instance_body(one: InstanceView) -> InstanceBody:
    blocks = InstanceBlocks(
        one.blocks_total, one.blocks_free, one.blocks_active, one.blocks_historical, one.blocks_incoming
    )
    return InstanceBody(
        one.instance,
        one.role,
        one.state,
        one.incarnation,
        one.pid,
        one.isa,
        blocks,
        one.waiting,
        one.running,
        one.tokens_to_prefill,
        {counter.name: counter.value for counter in one.counters},
    )

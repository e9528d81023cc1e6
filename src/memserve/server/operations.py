"""Endpoints for people and monitors: models, cluster, decisions, health, metrics."""

from __future__ import annotations

import logging
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from memserve.core.errors import InvalidRequest, MemServeError
from memserve.core.messages import TierName
from memserve.core.types import RequestId, Role
from memserve.server.body import parse_body, read_body
from memserve.server.door import TRACE_HEADER, Door, now
from memserve.server.metrics import CONTENT_TYPE
from memserve.server.responses import json_response
from memserve.server.schemas import ModelCard, ModelList
from memserve.server.validation import check_model
from memserve.server.views import (
    MemoryAnswer,
    MemoryBody,
    RoleAnswer,
    RoleBody,
    cluster_body,
    health_body,
    trace_body,
)
from memserve.server.why import WhyBody

log = logging.getLogger(__name__)


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

    async def resize_memory(self, instance: str, request: Request) -> Response:
        """Give an instance's pool more or less memory, under load. Sizes are bytes per tier."""
        raw = await read_body(request, self._door.config.max_body)
        parsed = parse_body(raw, MemoryBody, {})
        body = parsed.body
        if parsed.ignored:
            text = f"{parsed.ignored[0]!r} is no tier; accepted: device, host, disk."
            raise InvalidRequest(text, field=parsed.ignored[0])
        sizes: dict[TierName, int | None] = {"device": body.device, "host": body.host, "disk": body.disk}
        asked = [(tier, memory) for tier, memory in sizes.items() if memory is not None]
        if not asked:
            raise InvalidRequest("Name at least one of device, host, disk.", field="device")
        resized = [await self._door.backend.resize(instance, tier, memory) for tier, memory in asked]
        return json_response(MemoryAnswer(instance, tuple(resized)))

    async def set_role(self, instance: str, request: Request) -> Response:
        """Let an instance prefill, decode, or do both, from now on; requests and caches go on."""
        raw = await read_body(request, self._door.config.max_body)
        asked = parse_body(raw, RoleBody, {}).body.role
        if asked not in tuple(Role):
            text = f"role is {asked!r}; accepted: {', '.join(Role)}."
            raise InvalidRequest(text, field="role")
        role = Role(asked)
        before = await self._door.backend.set_role(instance, role)
        return json_response(RoleAnswer(instance, role, before))

    async def explain(self, request_id: str) -> Response:
        """Why a request ran where it ran. ``request_id``: the answer's ``id``, or its ``x-request-id``."""
        answer = self._door.ids.answer_of(request_id)
        attempts = self._door.backend.why(RequestId(answer))
        if not attempts:
            raise _not_kept("decision", request_id, "only those of recent requests are")
        return json_response(WhyBody(answer, attempts))

    async def show_trace(self, request_id: str) -> Response:
        """The rooms that a request passed, if it was sent with ``x-memserve-trace: 1``."""
        traces = self._door.backend.trace(RequestId(request_id))
        if not traces:
            raise _not_kept("trace", request_id, f"send the request with the header {TRACE_HEADER}: 1")
        return json_response(trace_body(request_id, traces))

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

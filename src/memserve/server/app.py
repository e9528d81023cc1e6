"""The HTTP application: which path leads to which endpoint, and what wraps them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from memserve import __version__
from memserve.core.clock import Clock, MonotonicClock
from memserve.core.config import ServerConfig
from memserve.core.errors import MemServeError
from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.tokenizer import Tokenizer
from memserve.server.backend import Backend
from memserve.server.chat import ChatEndpoint
from memserve.server.completions import CompletionEndpoint
from memserve.server.door import Door
from memserve.server.errors import ErrorBody, on_http_exception, on_known_error
from memserve.server.metrics import Metrics
from memserve.server.middleware import EveryRequest
from memserve.server.operations import OperationEndpoints
from memserve.server.schemas import ChatBody, ChatCompletion, Completion, CompletionBody, ModelCard, ModelList
from memserve.server.tenants import Tenants
from memserve.server.validation import Limits
from memserve.server.views import (
    ClusterBody,
    HealthBody,
    MemoryAnswer,
    MemoryBody,
    RoleAnswer,
    RoleBody,
    TraceBody,
)
from memserve.server.why import WhyBody

_REFERENCE = "#/components/schemas/{name}"


def create_app(
    backend: Backend,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    served_models: Sequence[str],
    config: ServerConfig,
    context: int,
    *,
    clock: Clock | None = None,
) -> FastAPI:
    """Build the OpenAI-compatible application.

    ``served_models`` are all names of the one model, its main name first. ``context`` bounds prompt and
    answer together, in tokens. Without a ``template`` chat requests are refused.
    """
    assert served_models, "at least one model name is served"
    metrics = Metrics(clock or MonotonicClock())
    limits = Limits(context, tokenizer.vocabulary_size, tuple(tokenizer.eos_tokens))
    tenants = Tenants(config.api_key, config.tenants)
    door = Door(backend, tokenizer, template, tuple(served_models), config, limits, metrics, tenants)
    app = FastAPI(title="MemServe", version=__version__, redoc_url=None)
    _add_routes(app, door)
    app.add_exception_handler(MemServeError, on_known_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_middleware(EveryRequest, metrics=metrics, tenants=tenants)
    return app


def _add_routes(app: FastAPI, door: Door) -> None:
    chat, completions, operations = ChatEndpoint(door), CompletionEndpoint(door), OperationEndpoints(door)
    schemas = _Schemas(app)
    app.add_api_route(
        "/v1/chat/completions",
        chat.create,
        methods=["POST"],
        openapi_extra=schemas.describe(ChatCompletion, body=ChatBody),
    )
    app.add_api_route(
        "/v1/completions",
        completions.create,
        methods=["POST"],
        openapi_extra=schemas.describe(Completion, body=CompletionBody),
    )
    for path, endpoint, schema in (
        ("/v1/models", operations.list_models, ModelList),
        ("/v1/models/{model:path}", operations.show_model, ModelCard),
        ("/v1/cluster", operations.show_cluster, ClusterBody),
        ("/v1/cluster/why/{request_id:path}", operations.explain, WhyBody),
        ("/v1/traces/{request_id}", operations.show_trace, TraceBody),
        ("/health", operations.show_health, HealthBody),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], openapi_extra=schemas.describe(schema))
    for what, change, answer, body in (
        ("memory", operations.resize_memory, MemoryAnswer, MemoryBody),
        ("role", operations.set_role, RoleAnswer, RoleBody),
    ):
        described = schemas.describe(answer, body=body)
        app.add_api_route(
            f"/v1/cluster/{{instance}}/{what}", change, methods=["PUT"], openapi_extra=described
        )
    app.add_api_route("/metrics", operations.show_metrics, methods=["GET"])


class _Schemas:
    """Describes msgspec types in the OpenAPI document, which FastAPI knows how to do for pydantic only."""

    def __init__(self, app: FastAPI) -> None:
        self._components: dict[str, Any] = {}
        self._generate = app.openapi
        app.openapi = self._with_components  # type: ignore[method-assign]

    def describe(self, answer: type[msgspec.Struct], body: type[msgspec.Struct] | None = None) -> Any:
        types = [answer, ErrorBody, *([body] if body else [])]
        references, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
        self._components.update(components)
        contents = [{"content": {"application/json": {"schema": reference}}} for reference in references]
        described: dict[str, Any] = {
            "responses": {
                "200": {"description": "The answer", **contents[0]},
                "default": {"description": "What is wrong", **contents[1]},
            }
        }
        if body is not None:
            described["requestBody"] = {"required": True, **contents[2]}
        return described

    def _with_components(self) -> dict[str, Any]:
        document = self._generate()
        document.setdefault("components", {}).setdefault("schemas", {}).update(self._components)
        return document

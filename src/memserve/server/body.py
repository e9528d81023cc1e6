"""From an HTTP request's bytes to a checked body: size, media type, UTF-8, JSON, types of fields."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from starlette.requests import Request

from memserve.core.errors import InvalidRequest
from memserve.server.unsupported import Unsupported, reject_unsupported

B = TypeVar("B", bound=msgspec.Struct)

_DRAIN_TIMES = 16
"""How many times the limit is read and thrown away, so that an honest client sees the 413."""
_DRAIN_SECONDS = 10.0
_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>\w+)`")


@dataclass(frozen=True, slots=True)
class Parsed(Generic[B]):
    """A body and the names of the fields that nobody here knows."""

    body: B
    ignored: tuple[str, ...]


async def read_body(request: Request, limit: int) -> bytes:
    """Read a JSON request's body of at most ``limit`` bytes. Raises ``InvalidRequest``."""
    _check_media_type(request.headers.get("content-type", ""))
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        await _refuse_body(request, limit)
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > limit:
            read.clear()
            await _refuse_body(request, limit)
    return bytes(read)


def parse_body(raw: bytes, schema: type[B], unsupported: Mapping[str, Unsupported]) -> Parsed[B]:
    """Parse JSON. Raises ``InvalidRequest`` naming the field that is wrong or not supported."""
    _check_utf8(raw)
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        reject_unsupported(fields, unsupported)
        body = msgspec.json.decode(raw, type=schema)
    except msgspec.ValidationError as error:
        raise _wrong_type(error) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error}.", field="", code="invalid_json"
        ) from error
    except RecursionError as error:
        raise InvalidRequest(
            "The body is nested too deeply to be a request.", field="", code="invalid_json"
        ) from error
    known = set(schema.__struct_fields__) | unsupported.keys()
    return Parsed(body, tuple(sorted(fields.keys() - known)))


async def _refuse_body(request: Request, limit: int) -> None:
    """Raise the 413. Closing on a client that still sends would reset the connection under the answer."""
    if request.headers.get("expect", "").lower() != "100-continue":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                await _drain(request, limit * _DRAIN_TIMES)
    raise InvalidRequest(
        f"The body is larger than the limit of {limit} bytes. Remedy: send less text, or raise "
        "server.max_body.",
        field="",
        code="body_too_large",
    )


async def _drain(request: Request, most: int) -> None:
    """Read and forget at most about ``most`` bytes."""
    while most > 0 and (message := await request.receive()).get("more_body", False):
        most -= len(message.get("body", b""))


def _check_media_type(content_type: str) -> None:
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequest(
            f"Content-Type is {content_type or 'missing'!r}; send 'application/json'.",
            field="",
            code="unsupported_media_type",
        )


def _check_utf8(raw: bytes) -> None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid UTF-8: byte {raw[error.start]:#04x} at position {error.start}.",
            field="",
            code="invalid_json",
        ) from error


def _wrong_type(error: msgspec.ValidationError) -> InvalidRequest:
    """Turn msgspec's "Expected `int`, got `str` - at `$.n`" into an error that names the field."""
    match = _AT.match(str(error))
    assert match is not None
    what, path = match["what"], match["path"] or ""
    missing = _MISSING.match(what)
    if missing:
        field = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequest(f"'{field}' is required.", field=field, code="missing_required_parameter")
    where = f"'{path}'" if path else "the body"
    return InvalidRequest(f"Wrong type for {where}: {_lower(what)}.", field=path, code="invalid_type")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].replace("`", "")

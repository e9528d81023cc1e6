"""Checks the values of a request's fields, and turns them into what the engine takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from memserve.core.errors import InvalidRequest
from memserve.core.types import SamplingParams
from memserve.server.schemas import AskedBase, ChatBody, CompletionBody, Stop

MAX_STOPS = 4
MAX_STOP_LENGTH = 1024
"""Characters; each sampled token is compared with all ends of what is held back."""
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
COMPLETION_TOKENS = 16
"""OpenAI's default ``max_tokens`` of ``/v1/completions``."""
SLO_TTFT_HEADER = "x-memserve-slo-ttft"
MAX_SLO_TTFT = 86_400
_PRIORITIES = 1 << 31
_SEEDS = 1 << 63
N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the served model can take. Tokens for ``context``; ids below ``vocabulary`` exist."""

    context: int
    vocabulary: int
    eos_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request asks for besides its prompts; ``max_tokens`` None means the endpoint's default."""

    n: int
    stop: tuple[str, ...]
    max_tokens: int | None
    max_tokens_field: str
    sampling: SamplingParams
    stream: bool
    include_usage: bool


def check_chat(body: ChatBody, limits: Limits, seed: int) -> Wishes:
    """Check everything but the messages. ``seed`` is used if the request has none."""
    top = body.top_logprobs
    if top is not None:
        _check_range("top_logprobs", top, 0, MAX_TOP_LOGPROBS)
        if not body.logprobs:
            _fail("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
    logprobs = (top or 0) if body.logprobs else None
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _check_common(body, limits, seed, logprobs, asked, name)


def check_completion(body: CompletionBody, limits: Limits, seed: int) -> Wishes:
    """Check everything but the prompts. ``seed`` is used if the request has none."""
    if body.logprobs is not None:
        _check_range("logprobs", body.logprobs, 0, MAX_COMPLETION_LOGPROBS)
    return _check_common(body, limits, seed, body.logprobs, body.max_tokens, "max_tokens")


def check_model(name: str | None, served: Sequence[str]) -> str:
    """The served name that a request means; without a name it is the first."""
    if name is None:
        return served[0]
    if name not in served:
        known = ", ".join(repr(other) for other in served)
        raise InvalidRequest(
            f"The model {name!r} is not served here; ask for {known}.", field="model", code="model_not_found"
        )
    return name


def check_slo_ttft(given: str | None, default: float) -> float | None:
    """Seconds within which the first token is of use: as the header says, else ``default``, 0 being none."""
    if given is None:
        return default or None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_SLO_TTFT:
        _fail(
            SLO_TTFT_HEADER,
            f"'{SLO_TTFT_HEADER}' is {given[:40]!r}; it must be a number of seconds greater than 0, at most "
            f"{MAX_SLO_TTFT}.",
        )
    return seconds


def check_token_ids(tokens: Sequence[int], limits: Limits, field: str) -> None:
    """Raise ``InvalidRequest`` if an id does not exist."""
    for place, token in enumerate(tokens):
        if not 0 <= token < limits.vocabulary:
            where = f"{field}[{place}]"
            _fail(where, f"'{where}' is token {token}; the vocabulary has ids 0 to {limits.vocabulary - 1}.")


def room_for_answer(prompt: int, wishes: Wishes, limits: Limits, field: str, default: int | None) -> int:
    """How many tokens may be sampled after a prompt of ``prompt`` tokens.

    Raises ``InvalidRequest`` when the prompt, or prompt and ``max_tokens`` together, exceed the context.
    """
    if prompt == 0:
        _fail(field, f"'{field}' is empty; at least one token is needed.")
    left = limits.context - prompt
    if left < 1:
        _too_long(
            field,
            f"The prompt has {prompt} tokens; this model's context is {limits.context} tokens, one of which "
            f"is needed for the answer. Remedy: shorten '{field}'.",
        )
    if wishes.max_tokens is None:
        return left if default is None else min(default, left)
    if wishes.max_tokens > left:
        name = wishes.max_tokens_field
        _too_long(
            name,
            f"This model's context is {limits.context} tokens; the prompt has {prompt} and '{name}' asks for "
            f"{wishes.max_tokens} more. Remedy: '{name}' of at most {left}, or a shorter '{field}'.",
        )
    return wishes.max_tokens


def _check_common(
    body: AskedBase, limits: Limits, seed: int, logprobs: int | None, max_tokens: int | None, name: str
) -> Wishes:
    stream = bool(body.stream)
    if body.stream_options is not None and not stream:
        _fail("stream_options", "'stream_options' is only allowed when 'stream' is true.")
    if max_tokens is not None and max_tokens < 1:
        _fail(name, f"'{name}' is {max_tokens}; at least 1 is needed.")
    n = 1 if body.n is None else body.n
    _check_range("n", n, 1, MAX_CHOICES)
    if body.priority is not None:
        _check_range("priority", body.priority, -_PRIORITIES, _PRIORITIES - 1)
    if body.cache_salt == "":
        _fail("cache_salt", "'cache_salt' is empty; leave it out to share the cache.")
    sampling = SamplingParams(
        max_tokens=1,
        temperature=_check_range("temperature", _or(body.temperature, 1.0), 0, 2),
        top_p=_check_top_p(_or(body.top_p, 1.0)),
        top_k=_check_top_k(0 if body.top_k is None else body.top_k, limits),
        seed=_check_seed(seed if body.seed is None else body.seed),
        stop_token_ids=_stop_tokens(body, limits),
        logprobs=logprobs,
    )
    options = body.stream_options
    usage = bool(options is not None and options.include_usage)
    return Wishes(n, _check_stop(body.stop), max_tokens, name, sampling, stream, usage)


def _check_stop(stop: Stop) -> tuple[str, ...]:
    given = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(given) > MAX_STOPS:
        _fail("stop", f"'stop' has {len(given)} strings; at most {MAX_STOPS} are possible.")
    for text in given:
        if not text:
            _fail("stop", "'stop' has an empty string, which would stop everywhere; leave it out.")
        if len(text) > MAX_STOP_LENGTH:
            _fail("stop", f"'stop' has a string of {len(text)} characters; at most {MAX_STOP_LENGTH}.")
    return given


def _stop_tokens(body: AskedBase, limits: Limits) -> tuple[int, ...]:
    asked = body.stop_token_ids or []
    check_token_ids(asked, limits, "stop_token_ids")
    eos = () if body.ignore_eos else limits.eos_tokens
    return tuple(dict.fromkeys((*eos, *asked)))


def _check_top_p(value: float) -> float:
    if not 0 < value <= 1:
        _fail("top_p", f"'top_p' is {value}; it must be greater than 0 and at most 1.")
    return value


def _check_top_k(value: int, limits: Limits) -> int:
    if value < -1:
        _fail("top_k", f"'top_k' is {value}; it must be at least 1, or 0 or -1 for all tokens.")
    return 0 if value >= limits.vocabulary else max(value, 0)


def _check_seed(value: int) -> int:
    if not -_SEEDS <= value < _SEEDS:
        _fail("seed", f"'seed' is {value}; it must fit into 64 bits.")
    return value % _SEEDS


def _check_range(field: str, value: N, low: float, high: float) -> N:
    if not low <= value <= high:
        _fail(field, f"'{field}' is {value}; it must be from {low} to {high}.")
    return value


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _fail(field: str, message: str) -> NoReturn:
    raise InvalidRequest(message, field=field)


def _too_long(field: str, message: str) -> NoReturn:
    raise InvalidRequest(message, field=field, code="context_length_exceeded")

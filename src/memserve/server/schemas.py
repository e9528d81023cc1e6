"""The bodies of the OpenAI API: what may be asked, and what is answered. Types only.

Every optional field of a request also takes null, which means the default. Limits are checked in
``validation``, so that their messages can name a remedy.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

Stop = str | list[str] | None


class StreamOptions(msgspec.Struct, frozen=True):
    """``include_usage``: one more chunk with the usage before the stream ends."""

    include_usage: bool | None = None


class AskedBase(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of completion take."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    priority: int | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; only text can be read."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatBody(AskedBase, frozen=True, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(AskedBase, frozen=True, kw_only=True):
    """Body of ``POST /v1/completions``. A prompt is text or token ids; several prompts make a batch."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None


# --- answers ------------------------------------------------------------------------------------------


class LedgerCounts(msgspec.Struct, frozen=True):
    """Where the prompt tokens' KV came from; the counts add up to ``prompt_tokens``."""

    computed: int = 0
    local: int = 0
    host: int = 0
    disk: int = 0
    peer: int = 0
    backflow: int = 0


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    memserve: LedgerCounts


class Usage(msgspec.Struct, frozen=True):
    """Tokens. The prompt counts once however many choices were asked for."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob]
    refusal: None = None


class ChatAnswer(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatAnswer
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    system_fingerprint: str | None = None


class ChatDelta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    """``usage`` is null in all chunks but the last when it was asked for, and absent otherwise."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"
    system_fingerprint: str | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """One entry per token; ``text_offset`` counts characters from the start of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(msgspec.Struct, frozen=True):
    """Whole answers and stream chunks have the same shape."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"
    system_fingerprint: str | None = None


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "memserve"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: str = "list"

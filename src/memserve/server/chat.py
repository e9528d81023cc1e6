"""``POST /v1/chat/completions``: messages in, one or more answers out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from memserve.core.errors import InvalidRequest
from memserve.engine.models.chat_template import ChatMessage
from memserve.engine.models.tokenizer import Tokenizer
from memserve.server.body import parse_body, read_body
from memserve.server.door import Asked, Door, Prompt, new_id, new_seed, now
from memserve.server.generation import Generation, Piece, collect
from memserve.server.responses import encode_event
from memserve.server.schemas import (
    ChatAnswer,
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    Message,
    TopLogprob,
)
from memserve.server.text import ShownToken
from memserve.server.unsupported import CHAT
from memserve.server.validation import check_chat, check_model, room_for_answer

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ChatEndpoint:
    """The endpoint; ``door`` is all it works with."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def create(self, request: Request) -> Response:
        """Answer a conversation."""
        asked = await self._read(request)
        generation = self._door.prepare(request, asked)
        return self._door.respond(
            asked,
            answer=lambda: self._answer(asked, generation),
            events=lambda: self._stream(asked, generation),
        )

    async def _read(self, request: Request) -> Asked:
        raw = await read_body(request, self._door.config.max_body)
        parsed = parse_body(raw, ChatBody, CHAT)
        body, limits = parsed.body, self._door.limits
        model = check_model(body.model, self._door.served)
        wishes = check_chat(body, limits, new_seed())
        messages = read_messages(body.messages)
        if self._door.template is None:
            raise InvalidRequest(
                f"The model {model!r} has no chat template. Remedy: use /v1/completions.", field="messages"
            )
        text = self._door.template.render(messages, add_generation_prompt=True)
        tokens = await self._door.encode(text, bos=False)
        room = room_for_answer(len(tokens), wishes, limits, "messages", default=None)
        prompts = (Prompt(tokens, room),)
        return Asked(new_id("chatcmpl"), now(), model, body, wishes, prompts, parsed.ignored)

    async def _answer(self, asked: Asked, generation: Generation) -> ChatCompletion:
        async with aclosing(generation.run(self._door.backend)) as pieces:
            answers = await collect(pieces, len(generation.choices))
        choices = [
            ChatChoice(index, ChatAnswer(one.text), one.finish.value, self._logprobs(asked, one.tokens))
            for index, one in enumerate(answers)
        ]
        return ChatCompletion(asked.id, asked.created, asked.model, choices, generation.usage())

    async def _stream(self, asked: Asked, generation: Generation) -> AsyncGenerator[bytes, None]:
        begun: set[int] = set()
        async with aclosing(generation.run(self._door.backend)) as pieces:
            async for piece in pieces:
                if piece.choice not in begun:
                    begun.add(piece.choice)
                    yield _chunk(asked, piece, ChatDelta(role="assistant", content=""))
                if piece.text or piece.tokens:
                    logprobs = self._logprobs(asked, piece.tokens)
                    yield _chunk(asked, piece, ChatDelta(content=piece.text), logprobs)
                if piece.finish is not None:
                    yield _chunk(asked, piece, ChatDelta(), finish=piece.finish.value)
        if asked.wishes.include_usage:
            yield encode_event(ChatChunk(asked.id, asked.created, asked.model, [], generation.usage()))

    def _logprobs(self, asked: Asked, tokens: Sequence[ShownToken]) -> ChatLogprobs | None:
        if asked.wishes.sampling.logprobs is None:
            return None
        return ChatLogprobs([show_logprob(self._door.tokenizer, token) for token in tokens])


def read_messages(messages: Sequence[Message]) -> list[ChatMessage]:
    """Check a conversation's messages. Raises ``InvalidRequest`` naming the message and its field."""
    if not messages:
        raise InvalidRequest("'messages' is empty; at least one message is needed.", field="messages")
    return [_read_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def show_logprob(tokenizer: Tokenizer, shown: ShownToken) -> ChatLogprob:
    """A token's log probability and its alternatives, as OpenAI writes them."""
    assert shown.logprob is not None, "the backend reports log probabilities when they are asked for"
    alternatives = [
        TopLogprob(tokenizer.token_text(token), logprob, list(tokenizer.token_bytes(token)))
        for token, logprob in shown.logprob.top
    ]
    text, raw = tokenizer.token_text(shown.token), list(tokenizer.token_bytes(shown.token))
    return ChatLogprob(text, shown.logprob.logprob, raw, alternatives)


def _chunk(
    asked: Asked,
    piece: Piece,
    delta: ChatDelta,
    logprobs: ChatLogprobs | None = None,
    finish: str | None = None,
) -> bytes:
    choice = ChatChunkChoice(piece.choice, delta, finish, logprobs)
    usage = None if asked.wishes.include_usage else UNSET
    return encode_event(ChatChunk(asked.id, asked.created, asked.model, [choice], usage))


def _read_message(message: Message, where: str) -> ChatMessage:
    if message.tool_calls or message.function_call is not None:
        field = f"{where}.{'tool_calls' if message.tool_calls else 'function_call'}"
        raise InvalidRequest(
            f"'{field}' is not supported. Remedy: write the call into the message's content.",
            field=field,
            code="unsupported_parameter",
        )
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"'{where}.role' is {message.role!r}; accepted: {', '.join(_ROLES)}.", field=f"{where}.role"
        )
    return ChatMessage(role, _read_content(message, f"{where}.content"))


def _read_content(message: Message, where: str) -> str:
    if message.content is None:
        raise InvalidRequest(f"'{where}' is required; send a string.", field=where)
    if isinstance(message.content, str):
        return message.content
    texts = []
    for place, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"'{where}[{place}]' is of type {part.type!r}; only parts of type 'text' with a 'text' "
                "can be read.",
                field=f"{where}[{place}].type",
                code="unsupported_parameter",
            )
        texts.append(part.text)
    return "\n".join(texts)

"""``POST /v1/completions``: one or several prompts, as text or token ids, each continued ``n`` times."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from memserve.core.errors import InvalidRequest
from memserve.core.types import Tokens
from memserve.engine.models.tokenizer import Tokenizer
from memserve.server.body import parse_body, read_body
from memserve.server.door import Asked, Door, Prompt, as_prompt, new_id, new_seed, now
from memserve.server.generation import Generation, collect
from memserve.server.responses import encode_event
from memserve.server.schemas import Completion, CompletionBody, CompletionChoice, CompletionLogprobs
from memserve.server.text import ShownToken
from memserve.server.unsupported import COMPLETION
from memserve.server.validation import (
    COMPLETION_TOKENS,
    MAX_CHOICES,
    check_completion,
    check_model,
    check_token_ids,
    room_for_answer,
)


class CompletionEndpoint:
    """The endpoint; ``door`` is all it works with."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def create(self, request: Request) -> Response:
        """Continue prompts."""
        asked = await self._read(request)
        generation = self._door.prepare(request, asked)
        return self._door.respond(
            asked,
            answer=lambda: self._answer(asked, generation),
            events=lambda: self._stream(asked, generation),
        )

    async def _read(self, request: Request) -> Asked:
        raw = await read_body(request, self._door.config.max_body)
        parsed = parse_body(raw, CompletionBody, COMPLETION)
        body, limits = parsed.body, self._door.limits
        model = check_model(body.model, self._door.served)
        wishes = check_completion(body, limits, new_seed())
        given = split_prompts(body.prompt)
        prompts = []
        for place, prompt in enumerate(given):
            field = "prompt" if len(given) == 1 else f"prompt[{place}]"
            tokens = await self._read_prompt(prompt, field)
            room = room_for_answer(len(tokens), wishes, limits, field, default=COMPLETION_TOKENS)
            prompts.append(Prompt(tokens, room))
        return Asked(new_id("cmpl"), now(), model, body, wishes, prompts, parsed.ignored)

    async def _read_prompt(self, prompt: str | Sequence[int], field: str) -> Tokens:
        if isinstance(prompt, str):
            return await self._door.encode(prompt, bos=True)
        check_token_ids(prompt, self._door.limits, field)
        return as_prompt(prompt)

    async def _answer(self, asked: Asked, generation: Generation) -> Completion:
        async with aclosing(generation.run(self._door.backend)) as pieces:
            answers = await collect(pieces, len(generation.choices))
        choices = [
            CompletionChoice(index, one.text, one.finish.value, self._logprobs(asked, one.tokens))
            for index, one in enumerate(answers)
        ]
        return Completion(asked.id, asked.created, asked.model, choices, generation.usage())

    async def _stream(self, asked: Asked, generation: Generation) -> AsyncGenerator[bytes, None]:
        usage = None if asked.wishes.include_usage else UNSET
        async with aclosing(generation.run(self._door.backend)) as pieces:
            async for piece in pieces:
                finish = None if piece.finish is None else piece.finish.value
                logprobs = self._logprobs(asked, piece.tokens)
                choice = CompletionChoice(piece.choice, piece.text, finish, logprobs)
                yield encode_event(Completion(asked.id, asked.created, asked.model, [choice], usage))
        if asked.wishes.include_usage:
            yield encode_event(Completion(asked.id, asked.created, asked.model, [], generation.usage()))

    def _logprobs(self, asked: Asked, tokens: Sequence[ShownToken]) -> CompletionLogprobs | None:
        count = asked.wishes.sampling.logprobs
        if count is None:
            return None
        return show_logprobs(self._door.tokenizer, tokens, alternatives=count > 0)


def split_prompts(prompt: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts of a request: a string, token ids, or a list of either. Raises ``InvalidRequest``."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [entry for entry in prompt if isinstance(entry, int)]
    if ids and len(ids) == len(prompt):
        return [ids]
    if not prompt or ids:
        problem = "mixes token ids with other prompts" if ids else "is empty"
        raise InvalidRequest(
            f"'prompt' {problem}; send a string, a list of strings, a list of token ids, or a list of lists "
            "of token ids.",
            field="prompt",
        )
    if len(prompt) > MAX_CHOICES:
        raise InvalidRequest(
            f"'prompt' has {len(prompt)} prompts; at most {MAX_CHOICES} are possible.", field="prompt"
        )
    return [entry for entry in prompt if not isinstance(entry, int)]


def show_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[ShownToken], *, alternatives: bool
) -> CompletionLogprobs:
    """Log probabilities in the columns of the old completions API."""
    known = [(shown, shown.logprob) for shown in tokens if shown.logprob is not None]
    assert len(known) == len(tokens), "the backend reports log probabilities when they are asked for"
    top = [
        {
            tokenizer.token_text(token): value
            for token, value in (*logprob.top, (shown.token, logprob.logprob))
        }
        for shown, logprob in known
    ]
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(shown.token) for shown in tokens],
        token_logprobs=[logprob.logprob for _, logprob in known],
        top_logprobs=top if alternatives else None,
        text_offset=[shown.offset for shown in tokens],
    )

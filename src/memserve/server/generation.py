"""Runs the choices of one HTTP request on the backend and yields their text as it comes, in one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from memserve.core.errors import RequestFailed
from memserve.core.types import FinishReason, Ledger
from memserve.server.backend import Backend, Generated, GenerationRequest
from memserve.server.metrics import Meter
from memserve.server.schemas import LedgerCounts, PromptTokensDetails, Usage
from memserve.server.text import Shown, ShownToken, TextStream, TokenDecoder


@dataclass(frozen=True, slots=True)
class Piece:
    """What one choice shows next; ``finish`` comes with its last piece."""

    choice: int
    text: str
    tokens: tuple[ShownToken, ...] = ()
    finish: FinishReason | None = None


@dataclass(slots=True)
class Choice:
    """One answer being generated, and what it has cost so far.

    ``leads``: it is the first of its prompt; its ``ledger`` stands for the prompt, the others' are not kept.
    """

    index: int
    leads: bool
    request: GenerationRequest
    ledger: Ledger | None = None
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """All choices of one HTTP request."""

    choices: tuple[Choice, ...]
    stop: tuple[str, ...]
    make_decoder: Callable[[], TokenDecoder]
    meter: Meter = field(repr=False)

    async def run(self, backend: Backend) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all choices; each choice's own are in order. Close it to cancel them all."""
        sources = [self._run_choice(backend, choice) for choice in self.choices]
        merged = sources[0] if len(sources) == 1 else merge(sources)
        async with aclosing(merged):
            async for piece in merged:
                yield piece

    def usage(self) -> Usage:
        """Tokens of all choices; each prompt counts once, with the ledger of its first choice."""
        leaders = [choice for choice in self.choices if choice.leads]
        ledgers = [choice.ledger for choice in leaders if choice.ledger is not None]
        assert len(ledgers) == len(leaders), "a finished answer has its ledger"
        counts = LedgerCounts(
            computed=sum(ledger.computed for ledger in ledgers),
            local=sum(ledger.local for ledger in ledgers),
            host=sum(ledger.host for ledger in ledgers),
            disk=sum(ledger.disk for ledger in ledgers),
            peer=sum(ledger.peer for ledger in ledgers),
            backflow=sum(ledger.backflow for ledger in ledgers),
        )
        prompt = sum(len(choice.request.tokens) for choice in leaders)
        completion = sum(choice.completion_tokens for choice in self.choices)
        details = PromptTokensDetails(sum(ledger.cached for ledger in ledgers), counts)
        return Usage(prompt, completion, prompt + completion, details)

    async def _run_choice(self, backend: Backend, choice: Choice) -> AsyncGenerator[Piece, None]:
        stream = TextStream(self.make_decoder(), self.stop)
        watch = self.meter.start()
        async with aclosing(backend.generate(choice.request)) as chunks:
            async for chunk in chunks:
                piece = self._read(choice, stream, chunk)
                watch.count(choice.completion_tokens)
                if choice.leads and choice.ledger is None and chunk.ledger is not None:
                    choice.ledger = chunk.ledger
                    self.meter.count_prompt(chunk.ledger)
                if piece.finish is not None:
                    break
                if piece.text or piece.tokens:
                    yield piece
            else:
                raise RequestFailed(f"{choice.request.request} ended before its last token")
            if stream.stopped:
                backend.stop(choice.request.request)
        if piece.finish is FinishReason.CANCELLED:
            raise RequestFailed(f"{choice.request.request} was cancelled by the server")
        watch.finish(piece.finish)
        yield piece

    def _read(self, choice: Choice, stream: TextStream, chunk: Generated) -> Piece:
        hidden = _hidden_tokens(chunk, choice.request.sampling.stop_token_ids)
        shown = stream.push(chunk.tokens[: len(chunk.tokens) - hidden], chunk.logprobs)
        finish = FinishReason.STOP if stream.stopped else chunk.finish
        if finish is not None and not stream.stopped:
            stream.skip(hidden)
            shown = _join(shown, stream.finish())
            finish = FinishReason.STOP if stream.stopped else finish
        choice.completion_tokens = stream.tokens_read
        return Piece(choice.index, shown.text, shown.tokens, finish)


async def merge(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Iterate all sources at once and yield what comes, as it comes; the first error ends them all."""
    queue: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(source, queue)) for source in sources]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    running = len(tasks)
    try:
        while running:
            entry = await queue.get()
            if isinstance(entry, Piece):
                yield entry
            else:
                entry.result()
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    source: AsyncGenerator[Piece, None], queue: asyncio.Queue[Piece | asyncio.Task[None]]
) -> None:
    async with aclosing(source):
        async for piece in source:
            queue.put_nowait(piece)


def _hidden_tokens(chunk: Generated, stop_tokens: Sequence[int]) -> int:
    """1 if the chunk ends with the stop token that ended the request, else 0."""
    ended = chunk.finish is FinishReason.STOP and bool(chunk.tokens)
    return int(ended and chunk.tokens[-1] in stop_tokens)


def _join(first: Shown, second: Shown) -> Shown:
    return Shown(first.text + second.text, first.tokens + second.tokens, second.stopped)


class Collected:
    """One whole answer."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.tokens: list[ShownToken] = []
        self.finish = FinishReason.LENGTH

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self.tokens += piece.tokens
        self.finish = piece.finish or self.finish


async def collect(pieces: AsyncIterator[Piece], count: int) -> list[Collected]:
    """Put the pieces of ``count`` choices together."""
    collected = [Collected() for _ in range(count)]
    async for piece in pieces:
        collected[piece.choice].add(piece)
    return collected

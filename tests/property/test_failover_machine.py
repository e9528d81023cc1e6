"""Requests under any order of chunks, losses and returns: each gets exactly the tokens it would have got."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatching import Outbox, add, cluster
from memserve.core.errors import PeerLost
from memserve.core.messages import Cancel, RequestClosed, RequestError, Submit, TokenChunk
from memserve.core.types import FinishReason, InstanceId, Ledger, RequestId, SamplingParams, unpack_tokens
from memserve.server.backend import GenerationRequest
from memserve.server.dispatch import Dispatcher
from memserve.server.placement import MAX_ATTEMPTS

NAMES = tuple(InstanceId(name) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"))
SEED = 7


def next_token(tokens: list[int], index: int) -> int:
    """The model: a token is a function of all before it and of the random number of its index."""
    return (sum((at + 1) * token for at, token in enumerate(tokens)) + 31 * index * SEED) % 997


def whole_answer(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for index in range(count):
        tokens.append(next_token(tokens, index))
    return tokens[len(prompt) :]


@dataclass
class Running:
    """An attempt in the instances' hands; its chunks come from P first and from D afterwards."""

    submit: Submit
    prefill: InstanceId
    sent: int = 0
    over: bool = False

    @property
    def place(self) -> InstanceId:
        assert self.submit.decode_on is not None
        return self.submit.decode_on if self.sent else self.prefill

    def chunk(self) -> TokenChunk:
        prompt, sampling = unpack_tokens(self.submit.tokens).tolist(), self.submit.sampling
        tokens = [*prompt, *self.answer(self.sent)]
        token = next_token(tokens, sampling.first_index + self.sent)
        self.sent += 1
        self.over = self.sent == sampling.max_tokens
        ledger = Ledger(computed=len(prompt)) if self.sent == 1 else None
        finish = FinishReason.LENGTH if self.over else None
        return TokenChunk(self.submit.request, self.sent - 1, (token,), (), finish, ledger)

    def answer(self, count: int) -> list[int]:
        prompt, first = unpack_tokens(self.submit.tokens).tolist(), self.submit.sampling.first_index
        tokens = list(prompt)
        for index in range(count):
            tokens.append(next_token(tokens, first + index))
        return tokens[len(prompt) :]


@dataclass
class World:
    """Two instances of each kind that run what they are sent, one chunk at a time."""

    dispatcher: Dispatcher
    outbox: Outbox
    running: list[Running] = field(default_factory=list)
    late: deque[TokenChunk] = field(default_factory=deque)
    incarnation: int = 1
    losses: int = 0

    def read_outbox(self) -> None:
        for name, message in self.outbox.sent:
            if isinstance(message, Submit):
                self.running.append(Running(message, name))
            elif isinstance(message, Cancel):
                for one in self.running:
                    one.over = one.over or one.submit.request == message.request
        self.outbox.sent.clear()

    def speak(self, choice: int) -> None:
        speaking = [one for one in self.running if not one.over and one.place not in self.outbox.gone]
        if not speaking:
            return
        one = speaking[choice % len(speaking)]
        place, chunk = one.place, one.chunk()
        self.late.append(chunk)
        self.dispatcher.on_message(place, chunk)
        if one.over:
            self.dispatcher.on_message(place, RequestClosed(one.submit.request, place))

    def lose(self, choice: int) -> None:
        name = NAMES[choice % len(NAMES)]
        if name in self.outbox.gone:
            self.outbox.gone.discard(name)
            self.incarnation += 1
            add(self.dispatcher, name, self.incarnation)
        elif not any(other in self.outbox.gone for other in NAMES if other[0] == name[0]):
            # Whoever hands over to it hears of the loss before the server does, or after.
            if choice % 3 == 0:
                self.complain(name)
            self.losses += 1
            self.outbox.gone.add(name)
            self.dispatcher.on_lost(name, "it died")

    def complain(self, lost: InstanceId) -> None:
        for one in self.running:
            if one.submit.decode_on == lost and one.sent == 1 and not one.over:
                self.dispatcher.on_message(one.prefill, RequestError(one.submit.request, "PeerLost", "gone"))
                one.over = True

    def repeat(self) -> None:
        if self.late:
            self.dispatcher.on_message(NAMES[0], self.late.popleft())


async def play(prompts: list[list[int]], steps: list[tuple[str, int]]) -> None:
    dispatcher, outbox = cluster()
    for name in NAMES[1::2]:
        add(dispatcher, name)
    world = World(dispatcher, outbox)
    tasks = [asyncio.create_task(ask(dispatcher, at, prompt)) for at, prompt in enumerate(prompts)]
    waiting = deque(steps)
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        world.read_outbox()
        what, choice = waiting.popleft() if waiting else ("speak", 0)
        if what == "speak":
            world.speak(choice)
        elif what == "lose":
            world.lose(choice)
        else:
            world.repeat()
    for task, prompt in zip(tasks, prompts, strict=True):
        found = task.result()
        if found is None:
            assert world.losses >= MAX_ATTEMPTS - 1, "given up although little was lost"
        else:
            assert found == (whole_answer(prompt, 6), len(prompt))
    # What was cancelled is closed by instances in their own time; nothing of it may be booked twice.
    dispatcher._scheduler.state.check()


async def ask(dispatcher: Dispatcher, number: int, prompt: list[int]) -> tuple[list[int], int] | None:
    """The answer and what the ledgers add up to; None when it was given up."""
    request = GenerationRequest(
        RequestId(f"r{number}"), np.array(prompt, np.int32), SamplingParams(max_tokens=6, seed=SEED)
    )
    tokens: list[int] = []
    accounted = 0
    try:
        async for piece in dispatcher.generate(request):
            tokens += piece.tokens
            accounted += piece.ledger.prompt if piece.ledger is not None else 0
    except PeerLost:
        return None
    return tokens, accounted


STEPS = st.lists(
    st.tuples(st.sampled_from(["speak", "speak", "speak", "lose", "repeat"]), st.integers(0, 11)),
    max_size=60,
)
PROMPTS = st.lists(st.lists(st.integers(0, 900), min_size=1, max_size=20), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(prompts=PROMPTS, steps=STEPS)
def test_each_request_gets_its_tokens_once_whatever_dies(
    prompts: list[list[int]], steps: list[tuple[str, int]]
) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await play(prompts, steps)

    asyncio.run(bounded())

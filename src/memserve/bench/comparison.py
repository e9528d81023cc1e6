"""Runs the same workload against several targets in turns (A B A B ...), and keeps what was measured."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Protocol

from memserve.bench.client import Asking, OpenAIClient
from memserve.bench.content import Run, Text
from memserve.bench.load import run_load
from memserve.bench.records import Record, Round
from memserve.bench.target import Target, open_target
from memserve.bench.timeline import Pace, Timeline
from memserve.bench.workload import Endpoint, Message, Workload, salt_workload
from memserve.core.errors import ConfigError, MemServeError, NoInstance

_WARM_KEY = 7
_WARM_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """How a workload is run.

    ``context``: tokens that the workload was made for; ``salt``: what makes prompts differ from those of
    other benchmarks of the same server; ``real_answers``: prompts contain the given answers, not the
    recorded ones; ``timeout``, ``duration``: seconds for a turn and for a round; ``vocabulary``: token ids
    that may be sent.
    """

    workload: Workload
    context: int
    pace: Pace
    seed: int = 0
    rounds: int = 1
    salt: str = ""
    endpoint: Endpoint | None = None
    fixed: bool | None = None
    real_answers: bool = True
    temperature: float = 0.0
    timeout: float = 120.0
    duration: float | None = None
    model: str | None = None
    vocabulary: int = 32000
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.way is Endpoint.TOKENS and _contains_text(self.workload):
            raise ConfigError(
                f"--endpoint tokens cannot send the text of workload {self.workload.name}; accepted: chat, "
                "completions"
            )

    @property
    def way(self) -> Endpoint:
        """How prompts are sent."""
        return self.endpoint or self.workload.endpoint


class Watcher(Protocol):
    """Is told how a comparison goes."""

    def starting(self, target: str, number: int) -> None:
        """A target is started or asked for, for round ``number``."""

    def running(self, target: str, number: int) -> None:
        """Its load begins."""

    def turn_ended(self, record: Record) -> None:
        """A turn was answered, or failed."""


@dataclass(frozen=True, slots=True)
class Result:
    """A target, the model it served and what was measured."""

    target: Target
    model: str
    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was measured, and why it ended before its time, if it did."""

    results: tuple[Result, ...]
    failure: MemServeError | None = None


async def compare_targets(
    targets: Sequence[Target], plan: Plan, watcher: Watcher, stop: asyncio.Event
) -> Comparison:
    """Run every round against every target; ends early, with what there is, when ``stop`` is set or a target
    cannot be benchmarked."""
    done: dict[Target, list[_Done]] = {target: [] for target in targets}
    failure: MemServeError | None = None
    try:
        for number, target in product(range(plan.rounds), targets):
            if stop.is_set():
                break
            if (one := await _run_target(target, plan, number, watcher, stop)) is not None:
                done[target].append(one)
    except MemServeError as error:
        failure = error
    results = tuple(
        Result(target, of_one[-1].model, tuple(one.measured for one in of_one))
        for target, of_one in done.items()
        if of_one
    )
    return Comparison(results, failure)


@dataclass(frozen=True, slots=True)
class _Done:
    model: str
    measured: Round


async def _run_target(
    target: Target, plan: Plan, number: int, watcher: Watcher, stop: asyncio.Event
) -> _Done | None:
    """One round; None if ``stop`` was set before the load began."""
    watcher.starting(target.name, number)
    async with open_target(target, stop) as url:
        if url is None or stop.is_set():
            return None
        return await _run_round(url, target, plan, number, watcher, stop)


async def _run_round(
    url: str, target: Target, plan: Plan, number: int, watcher: Watcher, stop: asyncio.Event
) -> _Done:
    workload = salt_workload(plan.workload, f"{plan.salt}.{number}")
    fixed = workload.fixed if plan.fixed is None else plan.fixed
    async with OpenAIClient(url, plan.api_key) as client:
        model = await _choose_model(client, plan, target.name)
        asking = Asking(plan.way, fixed, model, plan.temperature, plan.timeout, plan.vocabulary)
        await _run_unless(stop, _warm_up(client, asking, target.name))
        watcher.running(target.name, number)
        timeline = Timeline(workload, plan.pace, plan.seed, real_answers=plan.real_answers)
        measured = await run_load(
            client,
            asking,
            timeline,
            number=number,
            turns=workload.turns,
            stop=stop,
            duration=plan.duration,
            progress=watcher,
        )
    return _Done(model, measured)


async def _choose_model(client: OpenAIClient, plan: Plan, name: str) -> str:
    served = (await client.models()).data
    names = ", ".join(model.id for model in served)
    chosen = next((model for model in served if plan.model in (None, model.id)), None)
    if chosen is None:
        raise ConfigError(f"--model {plan.model} is not served by {name}; it has: {names or 'nothing'}")
    if chosen.max_model_len is not None and chosen.max_model_len < plan.context:
        raise ConfigError(
            f"--context is {plan.context} and {chosen.id} at {name} takes {chosen.max_model_len} tokens; "
            f"give --context {chosen.max_model_len}"
        )
    return chosen.id


async def _warm_up(client: OpenAIClient, asking: Asking, name: str) -> None:
    """One small request that is not measured: whoever cannot answer it cannot be benchmarked."""
    prompt = (Message("user", (Run(_WARM_KEY, _WARM_TOKENS),)),)
    answer = await client.ask(asking, prompt, 4, "warm-up")
    if answer.error:
        raise NoInstance(f"{name} did not answer a first small request: {answer.error}")


async def _run_unless(stop: asyncio.Event, work: Coroutine[None, None, None]) -> None:
    """Run ``work``, but no longer than until ``stop`` is set."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        working.result()
    else:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def _contains_text(workload: Workload) -> bool:
    opening = (one for session in workload.sessions for one in session.opening)
    asked = (one for session in workload.sessions for turn in session.turns for one in turn.asked)
    return any(isinstance(piece, Text) for one in chain(opening, asked) for piece in one.content)

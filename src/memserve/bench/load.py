"""The load generator: sends turns when the timeline says so, and measures the answers and itself."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Protocol

from memserve.bench.client import Answer, Asking, OpenAIClient
from memserve.bench.content import Text
from memserve.bench.records import ClientLoad, Record, Round, Sent
from memserve.bench.timeline import Due, Timeline
from memserve.bench.wire import Usage

_LAG_SECONDS = 0.02


class Progress(Protocol):
    """Is told how a run goes."""

    def turn_ended(self, record: Record) -> None:
        """A turn was answered, or failed."""


async def run_load(
    client: OpenAIClient,
    asking: Asking,
    timeline: Timeline,
    *,
    number: int,
    turns: int,
    stop: asyncio.Event,
    progress: Progress,
    duration: float | None = None,
) -> Round:
    """Run a workload of ``turns`` turns once, and return what was measured as round ``number``.

    Ends early when ``stop`` is set or after ``duration`` seconds; what is then in flight is cancelled.
    """
    before = await client.sent_bytes()
    run = _Run(client, asking, timeline, progress, f"bench-{number}")
    records, unfinished, seconds, load = await run.until(stop, duration)
    sent = _difference(before, await client.sent_bytes())
    never = turns - len(records) - unfinished
    return Round(number, seconds, records, unfinished, never, load, sent)


class _Run:
    def __init__(
        self, client: OpenAIClient, asking: Asking, timeline: Timeline, progress: Progress, name: str
    ) -> None:
        self._client = client
        self._asking = asking
        self._timeline = timeline
        self._progress = progress
        self._name = name
        self._records: list[Record] = []
        self._in_flight = 0
        self._changed = asyncio.Event()
        self._lag = _LagWatch()
        self._start = 0.0

    async def until(
        self, stop: asyncio.Event, duration: float | None
    ) -> tuple[tuple[Record, ...], int, float, ClientLoad]:
        """Send until all is answered, ``stop`` or ``duration``: records, turns cut off, seconds, own load."""
        self._start, cpu = time.perf_counter(), time.process_time()
        watching = asyncio.create_task(self._lag.watch())
        sending = asyncio.create_task(self._send_all())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((sending, stopping), timeout=duration, return_when=asyncio.FIRST_COMPLETED)
        seconds, unfinished = self._now(), self._in_flight
        self._timeline.stop()
        bug = sending.exception() if sending.done() else None
        for task in (sending, stopping, watching):
            task.cancel()
        await asyncio.gather(sending, stopping, watching, return_exceptions=True)
        if bug is not None:
            raise bug
        late = max((record.sent - record.due for record in self._records), default=0.0)
        load = self._lag.load(late, (time.process_time() - cpu) / max(seconds, 1e-9))
        return tuple(self._records), unfinished, seconds, load

    async def _send_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            while not self._timeline.done:
                self._changed.clear()
                for due in self._timeline.take_due(self._now()):
                    group.create_task(self._send(due))
                    self._in_flight += 1
                await self._wait()

    async def _wait(self) -> None:
        """Until the next turn is due or an answer has ended."""
        at = self._timeline.next_at()
        if self._timeline.done:
            return
        try:
            async with asyncio.timeout(None if at is None else max(0.0, at - self._now())):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _send(self, due: Due) -> None:
        sent = self._now()
        session = f"{self._name}-{due.session}"
        answer = await self._client.ask(self._asking, due.prompt, due.max_tokens, session)
        ended = self._now()
        record = make_record(due, answer, sent=sent, ended=ended, start=self._start)
        self._records.append(record)
        self._progress.turn_ended(record)
        self._timeline.finish(due, ended, None if answer.error else (Text(answer.text),))
        self._in_flight -= 1
        self._changed.set()

    def _now(self) -> float:
        return time.perf_counter() - self._start


def make_record(due: Due, answer: Answer, *, sent: float, ended: float, start: float) -> Record:
    """What was measured of a turn; the answer's times are made relative to ``start``."""
    usage = answer.usage or Usage()
    return Record(
        session=due.session,
        turn=due.turn,
        due=due.at,
        sent=sent,
        ended=ended,
        arrivals=tuple(at - start for at in answer.arrivals),
        prompt_tokens=usage.prompt_tokens,
        output_tokens=answer.output_tokens,
        sources=usage.sources,
        exact=usage.sources.total == usage.prompt_tokens,
        answer=hashlib.sha256(answer.text.encode()).hexdigest()[:16],
        error=answer.error,
    )


class _LagWatch:
    """How late the event loop wakes a sleeper."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lags: list[float] = []

    async def watch(self) -> None:
        while True:
            due = self._clock() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self._lags.append(self._clock() - due)

    def load(self, late: float, cpu_share: float) -> ClientLoad:
        lags = self._lags or [0.0]
        return ClientLoad(sum(lags) / len(lags), max(lags), late, cpu_share)


def _difference(before: tuple[Sent, ...] | None, after: tuple[Sent, ...] | None) -> tuple[Sent, ...] | None:
    if before is None or after is None:
        return None
    earlier = {one.role: one.bytes for one in before}
    return tuple(Sent(one.role, one.bytes - earlier.get(one.role, 0)) for one in after)

"""When which turn is to be sent, given when answers ended. Pure: time is an argument."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from memserve.bench.content import Content, draw_exponential
from memserve.bench.workload import Message, Workload, compose_prompt
from memserve.core.errors import ConfigError

_ARRIVALS = 1
"""The stream of random numbers that arrivals are drawn from."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How sessions begin.

    ``rate``: sessions per second whatever happens (open loop); ``concurrency``: so many at a time, the next
    when one ends (closed loop). Neither: at their recorded arrivals, ``speed`` times as fast.
    """

    rate: float | None = None
    concurrency: int | None = None
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class Due:
    """A turn that is to be sent at ``at`` (s since the start)."""

    session: int
    turn: int
    at: float
    prompt: tuple[Message, ...]
    max_tokens: int


def plan_arrivals(workload: Workload, pace: Pace, seed: int) -> tuple[float, ...] | None:
    """Seconds at which the sessions begin; None in a closed loop. Raises ``ConfigError``.

    Recorded arrivals keep their pattern when a rate is asked for; others are a Poisson process.
    """
    check_pace(pace)
    if pace.concurrency is not None:
        return None
    recorded = [session.arrival for session in workload.sessions if session.arrival is not None]
    if len(recorded) == len(workload.sessions):
        return _replay(recorded, pace)
    if pace.rate is None:
        raise ConfigError(
            f"workload {workload.name} has no recorded arrivals; give --rate (sessions per second) or "
            "--concurrency (sessions at a time)"
        )
    gaps = draw_exponential(seed, _ARRIVALS, len(workload.sessions), 1.0 / pace.rate)
    return tuple(accumulate(gaps))


def check_pace(pace: Pace) -> None:
    """Raise ``ConfigError`` where a pace makes no sense."""
    if pace.rate is not None and pace.concurrency is not None:
        raise ConfigError("--rate and --concurrency exclude each other: open loop or closed loop")
    if pace.rate is not None and not pace.rate > 0:
        raise ConfigError(f"--rate is {pace.rate:g}; accepted: more than 0 sessions per second")
    if pace.concurrency is not None and pace.concurrency < 1:
        raise ConfigError(f"--concurrency is {pace.concurrency}; accepted: at least 1 session at a time")
    if not pace.speed > 0:
        raise ConfigError(f"--speed is {pace.speed:g}; accepted: more than 0")


def _replay(recorded: list[float], pace: Pace) -> tuple[float, ...]:
    start, span = min(recorded), max(recorded) - min(recorded)
    if pace.rate is None:
        factor = 1.0 / pace.speed
    else:
        factor = (len(recorded) - 1) / pace.rate / span if span else 0.0
    return tuple((arrival - start) * factor for arrival in recorded)


class Timeline:
    """Which turns are due. Tell it of every answer's end; ask it what comes next.

    ``real_answers``: prompts contain the answers that were given, else the recorded ones.
    """

    def __init__(self, workload: Workload, pace: Pace, seed: int, *, real_answers: bool = True) -> None:
        self._workload = workload
        self._real = real_answers
        self._answers: list[list[Content]] = [[] for _ in workload.sessions]
        arrivals = plan_arrivals(workload, pace, seed)
        self._waiting: deque[int] = deque()
        self._heap: list[tuple[float, int]] = []
        self._open = 0
        self._stopped = False
        if arrivals is None:
            self._waiting.extend(range(len(workload.sessions)))
            for _ in range(min(pace.concurrency or 1, len(self._waiting))):
                self._begin_next(0.0)
        else:
            self._heap = [(at, session) for session, at in enumerate(arrivals)]
            heapq.heapify(self._heap)

    @property
    def done(self) -> bool:
        """Whether nothing is due any more and no answer is awaited."""
        return not self._heap and not self._open

    def next_at(self) -> float | None:
        """When the next turn is due, s; None: not before an answer ends."""
        return self._heap[0][0] if self._heap else None

    def take_due(self, now: float) -> tuple[Due, ...]:
        """The turns due by ``now``, earliest first; each awaits :meth:`finish`."""
        taken: list[Due] = []
        while self._heap and self._heap[0][0] <= now:
            taken.append(self._take(*heapq.heappop(self._heap)))
        self._open += len(taken)
        return tuple(taken)

    def finish(self, due: Due, now: float, answer: Content | None) -> None:
        """The answer to ``due`` ended at ``now``; None if it failed, which ends the session."""
        self._open -= 1
        assert self._open >= 0, "a turn was finished that was never taken"
        turns = self._workload.sessions[due.session].turns
        if self._stopped:
            return
        if answer is not None and due.turn + 1 < len(turns):
            self._answers[due.session].append(answer if self._real else turns[due.turn].reply)
            heapq.heappush(self._heap, (now + turns[due.turn + 1].think, due.session))
        elif self._waiting:
            self._begin_next(now)

    def stop(self) -> None:
        """Let nothing more begin."""
        self._stopped = True
        self._heap.clear()
        self._waiting.clear()

    def _begin_next(self, now: float) -> None:
        heapq.heappush(self._heap, (now, self._waiting.popleft()))

    def _take(self, at: float, session: int) -> Due:
        answers = self._answers[session]
        asked = self._workload.sessions[session]
        prompt = compose_prompt(self._workload, asked, answers)
        return Due(session, len(answers), at, prompt, asked.turns[len(answers)].max_tokens)

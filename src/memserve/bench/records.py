"""What is measured of one turn and of one run. Types; times in seconds since the run began."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the KV of prompt tokens came from.

    The first six are MemServe's ledger. ``cached``: said to be cached by a server without a ledger;
    ``unknown``: nothing was said.
    """

    computed: int = 0
    local: int = 0
    host: int = 0
    disk: int = 0
    peer: int = 0
    backflow: int = 0
    cached: int = 0
    unknown: int = 0

    @property
    def total(self) -> int:
        """All prompt tokens."""
        return sum(getattr(self, name) for name in SOURCES)

    @property
    def reused(self) -> int:
        """All that is known to have been cached."""
        return self.total - self.computed - self.unknown

    def __add__(self, other: Sources) -> Sources:
        return Sources(*(getattr(self, name) + getattr(other, name) for name in SOURCES))


SOURCES = ("computed", "local", "host", "disk", "peer", "backflow", "cached", "unknown")


@dataclass(frozen=True, slots=True)
class Record:
    """One turn.

    ``due``: when it was to be sent, ``sent``: when it was; ``arrivals``: when pieces of the answer came.
    ``error`` is empty for a turn that was answered in full. ``answer``: a digest of the answer's text.
    ``exact``: the sources add up to the prompt.
    """

    session: int
    turn: int
    due: float
    sent: float
    ended: float
    arrivals: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    sources: Sources = Sources()
    exact: bool = True
    answer: str = ""
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds from due to the first piece of the answer."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.due

    @property
    def jct(self) -> float:
        """Seconds from due to the answer's end."""
        return self.ended - self.due

    @property
    def tpot(self) -> float | None:
        """Mean seconds per output token after the first; None where there is no second one."""
        if self.output_tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> tuple[float, ...]:
        """Seconds between consecutive pieces of the answer."""
        return tuple(after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False))


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """What the load generator itself took, s: how late its event loop and its sending were, and processor
    time as a share of one core."""

    loop_lag_mean: float = 0.0
    loop_lag_max: float = 0.0
    late_max: float = 0.0
    cpu_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes of KV that instances of one role sent to others."""

    role: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Round:
    """One run of the workload against one target. ``unfinished``: turns in flight when it was stopped."""

    number: int
    seconds: float
    records: tuple[Record, ...]
    unfinished: int = 0
    never_sent: int = 0
    client: ClientLoad = ClientLoad()
    sent: tuple[Sent, ...] | None = None

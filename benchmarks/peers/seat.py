"""An engine's seat at the table: its process, what it refused, how it behaves between its turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from peers.driver import Driver, DriverError, EngineRefused
from peers.figures import Figure, deadline_of
from peers.protocol import Answer, Decode, Load, Loaded, MixedTimed, Prefill, Timed

LOAD_SECONDS = 900.0
RESTARTS = 2


@dataclass(slots=True)
class Behaviour:
    """Seconds from start to ready, of each start; bytes of memory; share of a core used between turns."""

    ready_seconds: list[float] = field(default_factory=list)
    loaded_bytes: int = 0
    resident_bytes: int = 0
    idle_processor: float = 0.0
    idle_seconds: float = 0.0

    @property
    def idle_share(self) -> float:
        return self.idle_processor / self.idle_seconds if self.idle_seconds else 0.0


class Seat:
    """Asks one engine, starts it again after it died, and remembers what it would not do.

    ``start`` makes a fresh process. No method raises for what the engine does wrong: reasons go to
    ``refusals``, by figure; the empty name stands for all figures.
    """

    def __init__(
        self, label: str, start: Callable[[], Driver], load: Load, warm_up: Sequence[Prefill | Decode]
    ) -> None:
        self.label = label
        self.about: dict[str, str] = {}
        self.refusals: dict[str, str] = {}
        self.behaviour = Behaviour()
        self._start = start
        self._load = load
        self._warm_up = warm_up
        self._driver: Driver | None = None
        self._starts = 0
        self._left_at: tuple[float, float] | None = None

    @property
    def out(self) -> bool:
        return "" in self.refusals

    def open(self) -> None:
        """Start, load and warm up, unless that is done; refusals say what went wrong."""
        if self._driver is not None or self.out:
            return
        if self._starts > RESTARTS:
            self.refusals[""] = f"died {self._starts} times; the last reason is with the figure"
            return
        self._starts += 1
        driver = self._start()
        try:
            loaded = driver.ask(self._load, LOAD_SECONDS)
            assert isinstance(loaded, Loaded), "a load is answered so"
            self.behaviour.ready_seconds.append(driver.age)
            self.behaviour.loaded_bytes = driver.resident_bytes()
            self._run_warm_up(driver)
        except (DriverError, EngineRefused) as error:
            self.refusals[""] = str(error)
            driver.close()
            return
        self.about, self._driver = loaded.about, driver
        self._leave()

    def _run_warm_up(self, driver: Driver) -> None:
        for request in self._warm_up:
            try:
                driver.ask(request, deadline_of(request))
            except EngineRefused:
                # It will say so again, with the figure's name, when it is measured.
                continue

    def measure(self, figure: Figure) -> Timed | MixedTimed | None:
        """The engine's answer; None if it refuses this figure, now or earlier."""
        if figure.name in self.refusals:
            return None
        self.open()
        driver = self._driver
        if driver is None:
            return None
        self._return(driver)
        answer: Answer | None = None
        try:
            answer = driver.ask(figure.request, deadline_of(figure.request))
        except EngineRefused as refused:
            self.refusals[figure.name] = str(refused)
        except DriverError as died:
            self.refusals[figure.name] = str(died)
            self._driver = None
            return None
        self._leave()
        return answer if isinstance(answer, Timed | MixedTimed) else None

    def _leave(self) -> None:
        driver = self._driver
        assert driver is not None, "somebody must be there to leave"
        self.behaviour.resident_bytes = max(self.behaviour.resident_bytes, driver.resident_bytes())
        self._left_at = time.monotonic(), driver.processor_seconds()

    def _return(self, driver: Driver) -> None:
        if self._left_at is not None:
            then, used = self._left_at
            self.behaviour.idle_seconds += time.monotonic() - then
            self.behaviour.idle_processor += driver.processor_seconds() - used
            self._left_at = None

    def close(self) -> None:
        if self._driver is not None:
            self._return(self._driver)
            self._driver.close()
            self._driver = None

"""Drivers as processes: what goes wrong ends in a reason, never in a process left or a wait without end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import stand_in_peer
from peers.driver import Driver, DriverError, EngineRefused
from peers.engines import BENCHMARKS
from peers.figures import Figure, decode, prefill
from peers.protocol import Decode, Load, Loaded, Prefill, Timed
from peers.seat import RESTARTS, Seat

pytestmark = pytest.mark.processes

SECONDS = 30.0
SHORT = 1.0  # for answers that never come


def load(behaviour: str) -> Load:
    return Load(behaviour, "4bit", 1, 1024, 4096, 49152)


def start(folder: Path) -> Driver:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    return Driver([sys.executable, str(stand_in_peer.__file__)], environment, folder / "driver.log")


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    with start(tmp_path) as started:
        yield started
    assert not started.alive


def test_a_good_driver_measures_and_quits(driver: Driver) -> None:
    assert driver.ask(load("good"), SECONDS) == Loaded({"version": "1"})
    timed = driver.ask(Prefill(16, 2), SECONDS)
    assert isinstance(timed, Timed)
    assert len(timed.seconds) == 2
    assert driver.resident_bytes() > 1 << 20
    assert driver.processor_seconds() > 0
    driver.close()
    assert not driver.alive


def test_what_an_engine_prints_is_no_answer(driver: Driver) -> None:
    driver.ask(load("noisy"), SECONDS)
    assert isinstance(driver.ask(Prefill(16), SECONDS), Timed)


def test_a_refusal_leaves_the_driver_to_be_asked_again(driver: Driver) -> None:
    with pytest.raises(EngineRefused, match="nothing is loaded"):
        driver.ask(Prefill(8), SECONDS)
    with pytest.raises(EngineRefused, match="no such weights"):
        driver.ask(load("refuses"), SECONDS)
    driver.ask(load("fails"), SECONDS)
    with pytest.raises(EngineRefused, match="7 tokens are not to its taste"):
        driver.ask(Prefill(7), SECONDS)
    assert isinstance(driver.ask(Prefill(8), SECONDS), Timed)


def test_a_death_is_told_with_signal_and_last_words(driver: Driver) -> None:
    driver.ask(load("dies"), SECONDS)
    with pytest.raises(DriverError, match="killed by SIGSEGV during decode: something is very wrong"):
        driver.ask(Decode(2, 16, 4), SECONDS)
    assert not driver.alive
    with pytest.raises(DriverError, match="has been ended"):
        driver.ask(Prefill(8), SECONDS)


def test_silence_ends_with_the_deadline(driver: Driver) -> None:
    driver.ask(load("hangs"), SECONDS)
    with pytest.raises(DriverError, match="no answer to decode within 1 s"):
        driver.ask(Decode(2, 16, 4), SHORT)
    assert not driver.alive


def test_a_program_that_speaks_no_protocol_is_ended(tmp_path: Path) -> None:
    talker = [sys.executable, "-c", "input(); print('hello', flush=True); input()"]
    with Driver(talker, os.environ, tmp_path / "log") as driver:
        with pytest.raises(DriverError, match=r"not a message.*hello"):
            driver.ask(Prefill(8), SECONDS)
        assert not driver.alive


def test_a_program_that_ends_at_once_is_told_with_its_code(tmp_path: Path) -> None:
    with (
        Driver([sys.executable, "-c", "raise SystemExit(3)"], os.environ, tmp_path / "log") as driver,
        pytest.raises(DriverError, match="ended with exit code 3 during load"),
    ):
        driver.ask(load("good"), SECONDS)


def make_seat(behaviour: str, folder: Path) -> Seat:
    return Seat("peer", partial(start, folder), load(behaviour), [Prefill(4)])


def test_a_seat_goes_on_after_a_death_without_the_deadly_figure(tmp_path: Path) -> None:
    seat = make_seat("dies", tmp_path)
    deadly, harmless = decode(2, 16, 4), prefill(8)
    try:
        assert seat.measure(harmless) is not None
        assert seat.measure(deadly) is None
        assert seat.measure(deadly) is None
        assert seat.measure(harmless) is not None
    finally:
        seat.close()
    assert list(seat.refusals) == [deadly.name]
    assert "SIGSEGV" in seat.refusals[deadly.name]
    assert len(seat.behaviour.ready_seconds) == 2, "it was started once more"
    assert seat.behaviour.loaded_bytes > 0
    assert seat.behaviour.idle_seconds > 0


def test_a_seat_gives_up_on_an_engine_that_keeps_dying(tmp_path: Path) -> None:
    seat = make_seat("dies", tmp_path)
    deadly = [Figure(f"deadly {at}", Decode(2, 16, 4)) for at in range(RESTARTS + 1)]
    try:
        for figure in deadly:
            assert seat.measure(figure) is None
        assert seat.measure(prefill(8)) is None
    finally:
        seat.close()
    assert seat.out
    assert all("SIGSEGV" in seat.refusals[figure.name] for figure in deadly)


def test_a_seat_keeps_the_reason_of_a_refused_load(tmp_path: Path) -> None:
    seat = make_seat("refuses", tmp_path)
    seat.open()
    assert seat.refusals == {"": "no such weights"}
    assert seat.measure(prefill(8)) is None
    seat.close()

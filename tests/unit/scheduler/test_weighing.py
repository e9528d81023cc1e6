"""What places cost: the native pass beside the same formulas in numpy, to the last bit."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve._native import weigh_places
from memserve.core.types import StepPrices
from memserve.scheduler.costs import prefill_work, use_lowered_at
from memserve.scheduler.fleet import Columns, Floats
from memserve.scheduler.policies import Figures, Weighed
from memserve.scheduler.policies.cost import Weights

FETCHED_LENGTHS = 3
LEAST_GAIN = 0.9


@dataclass(frozen=True)
class Case:
    """The arguments of ``weigh_places``; ``held``, of it ``above`` on the device, ``there``: by slot."""

    table: Floats
    start: list[int]
    decodes: list[bool]
    decode: list[int]
    held: list[int]
    above: list[int]
    there: list[int]
    prompt: int
    answer: float
    now: float
    behind: float
    latency: float
    token: float

    def weigh(self, starts: int = 100, decodes: int = 100):
        starts_found, decodes_found, *seconds = weigh_places(
            self.table,
            np.array(self.start, np.intp),
            np.array(self.decodes, np.bool_),
            ~np.array(self.decodes, np.bool_),
            np.array(self.decode, np.intp),
            tiers_of(self.held),
            self.lowered(),
            tiers_of(self.there)[:FETCHED_LENGTHS],
            (self.prompt, self.answer, self.now, self.behind, self.latency, self.token),
            astuple(Weights()),
            starts,
            decodes,
        )
        return rows(*starts_found), rows(*decodes_found), *seconds

    def lowered(self) -> list[tuple[int, bytes]]:
        """Of the instances that have something below their device, what is on it."""
        some = [above if above < held else None for above, held in zip(self.above, self.held, strict=True)]
        return tiers_of(some)

    def at(self, slots: list[int]) -> Columns:
        return Columns(*self.table[:, slots])


def rows(numbers: list[int], packed: bytes) -> list[tuple[int, Figures]]:
    return list(zip(numbers, Weighed(numbers, packed).figures(), strict=True))


def tiers_of(held: list[int] | list[int | None]) -> list[tuple[int, bytes]]:
    """One per length, but for nobody's."""
    lengths = sorted({n for n in held if n is not None}, reverse=True)
    return [(length, mask_of(slot for slot, n in enumerate(held) if n == length)) for length in lengths]


def mask_of(slots) -> bytes:
    mask = sum(1 << slot for slot in slots)
    return mask.to_bytes(mask.bit_length() // 8 + 1, "little")


class Prefill(NamedTuple):
    """One entry per place: seconds."""

    wait: Floats
    fetch: Floats
    work: Floats
    prefill: Floats

    @property
    def ttft(self) -> Floats:
        return self.wait + self.prefill


def prefill_at(places: Columns, case: Case, computed: Floats, fetch: Floats, swap: Floats) -> Prefill:
    context = places.token_context * (0.5 * (case.prompt + computed))
    work = (case.prompt - computed) * (places.token + context)
    wait = np.maximum(places.free_at - case.now, fetch)
    return Prefill(wait, fetch, work + swap, work * places.stretch + swap)


def use_lowered(places: Columns, held: Floats, above: Floats) -> tuple[Floats, Floats]:
    """Tokens used, and seconds to swap in: all that is held, or what is on the device."""
    below = held - above
    seconds = places.swap * below
    leave = seconds > below * (places.token + places.token_context * (0.5 * (held + above)))
    return np.where(leave, above, held), np.where(leave, 0.0, seconds)


def decode_at(places: Columns, case: Case, weights: Weights) -> tuple[Floats, Floats]:
    alone = places.row + places.row_context * (case.prompt + case.answer / 2)
    before = places.step + places.row * places.streams + places.row_context * places.context
    own = (weights.decode * case.answer) * (before + alone)
    return own, (weights.streams * case.answer * places.streams) * alone


def spread(case: Case, slots: list[int]) -> tuple[Floats, Floats]:
    """Tokens held, and held on the device."""
    held = np.array(case.held, float)[slots]
    above = np.minimum(np.array(case.above, float)[slots], held)
    return np.minimum(held, case.prompt - 1), np.minimum(above, case.prompt - 1)


def expected_start(case: Case, handed: float) -> tuple[Prefill, np.ndarray, Floats]:
    weights, places = Weights(), case.at(case.start)
    held, above = spread(case, case.start)
    used, swap = use_lowered(places, held, above)
    costs, fetched = prefill_at(places, case, used, np.zeros(len(held)), swap), np.full(len(held), -1)
    swap = places.swap * (held - above)
    lengths = FETCHED_LENGTHS if case.token > places.token.min() else 1
    for number, (length, _) in enumerate(tiers_of(case.there)[:lengths]):
        missing = np.maximum(min(length, case.prompt - 1) - held, 0.0)
        other = prefill_at(places, case, held + missing, case.latency + case.token * missing, swap)
        better = (missing > 0) & (other.ttft < LEAST_GAIN * costs.ttft)
        costs = Prefill(*(np.where(better, new, old) for old, new in zip(costs, other, strict=True)))
        fetched = np.where(better, number, fetched)
    decodes = np.array(case.decodes)
    behind = np.where(decodes, weights.append, case.behind)
    behind = weights.opportunity + behind + weights.line * places.line
    others = (behind + weights.streams * places.streams) * costs.work
    own, beside = decode_at(places, case, weights)
    return costs, fetched, costs.ttft + others + np.where(decodes, own + beside, handed)


def expected_decode(case: Case) -> tuple[Floats, Floats, Floats]:
    places = case.at(case.decode)
    own, others = decode_at(places, case, Weights())
    held, above = spread(case, case.decode)
    missing = case.prompt - held
    moved = case.latency + case.token * missing + places.swap * (held - above)
    return moved, own, moved + own + others + np.where(places.room < missing, own, 0.0)


def expected_source(case: Case, fetched: int) -> int:
    if fetched < 0:
        return -1
    length, _ = tiers_of(case.there)[fetched]
    free = Columns(*case.table).free_at
    return min((slot for slot, n in enumerate(case.there) if n == length), key=lambda slot: free[slot])


def order(totals: Floats) -> list[int]:
    return np.argsort(totals, kind="stable").tolist()


@st.composite
def cases(draw) -> Case:
    slots = draw(st.integers(1, 20))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coarse = draw(st.booleans())
    table = (
        random.integers(0, 3, (len(Columns._fields), slots))
        if coarse
        else random.random((len(Columns._fields), slots))
    )
    scales = [1e-2, 1e-3, 1e-6, 1e-3, 1e-6, 2.0, 5.0, 4.0, 1e3, 1e4, 2e-3, 9.0]
    chosen = draw(st.lists(st.integers(0, slots - 1), min_size=1, unique=True))
    lengths = st.integers(0, 60)
    held = draw(st.lists(lengths, min_size=slots, max_size=slots))
    return Case(
        table * np.array(scales)[:, None],
        chosen,
        draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen))),
        draw(st.lists(st.integers(0, slots - 1), unique=True)),
        held,
        draw(st.just(held) | st.lists(lengths, min_size=slots, max_size=slots)),
        draw(st.lists(lengths, min_size=slots, max_size=slots)),
        draw(st.integers(1, 50)),
        draw(st.floats(1, 300)),
        draw(st.floats(0, 5)),
        draw(st.sampled_from([0.0, 1.0, 7 / 3])),
        draw(st.sampled_from([0.0, 2e-3])),
        draw(st.sampled_from([0.0, 1e-5, 3e-3])),
    )


@given(cases())
def test_weighs_as_numpy_does(case: Case) -> None:
    starts, decodes, wait, prefill, answering, source = case.weigh()
    handed = np.inf
    if case.decode:
        moved, own, total = expected_decode(case)
        ranked = order(total)
        assert decodes == [(n, (moved[n], total[n], -1)) for n in ranked]
        assert answering == own[ranked[0]]
        handed = total[ranked[0]]
    costs, fetched, totals = expected_start(case, handed)
    ranked = order(totals)
    assert starts == [(n, (costs.fetch[n], totals[n], fetched[n])) for n in ranked]
    assert (wait, prefill) == (costs.wait[ranked[0]], costs.prefill[ranked[0]])
    assert source == expected_source(case, fetched[ranked[0]])


@given(cases())
def test_one_place_is_priced_alike_in_python(case: Case) -> None:
    ranked, _, _, prefill, _, _ = replace(case, there=[0] * len(case.held)).weigh()
    slot, most = case.start[ranked[0][0]], case.prompt - 1
    column = Columns(*case.table[:, slot].tolist())
    prices = StepPrices(step=0.0, token=column.token, token_context=column.token_context)
    held, above = case.held[slot], min(case.above[slot], case.held[slot])
    used, swap = use_lowered_at(prices, 1, column.swap, min(held, most), min(above, most), 0)
    assert prefill == prefill_work(prices, 1, case.prompt, used) * column.stretch + swap


@given(cases(), st.integers(0, 5), st.integers(0, 5))
def test_shows_as_many_as_are_asked_for_and_the_same_ones(case: Case, starts: int, decodes: int) -> None:
    whole, part = case.weigh(), case.weigh(starts, decodes)
    assert part[0] == whole[0][: max(1, starts)]
    assert part[1] == whole[1][: max(1, decodes)]
    assert part[2:] == whole[2:]


def some_case(**changes) -> Case:
    given = {
        "table": np.ones((12, 2)),
        "start": [0, 1],
        "decodes": [True, True],
        "decode": [],
        "held": [0, 0],
        "above": [0, 0],
        "there": [0, 0],
        "prompt": 10,
        "answer": 1.0,
        "now": 0.0,
        "behind": 0.0,
        "latency": 0.0,
        "token": 0.0,
    }
    return Case(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": np.ones((9, 2))}, "9 columns and not 12"),
        ({"start": [0, 2]}, "slot 2 is not one of the fleet's 2"),
        ({"start": [-1, 0]}, "slot -1"),
        ({"decode": [7]}, "slot 7"),
        ({"start": [], "decodes": []}, "no place to start"),
        ({"decodes": [True]}, "as long as start"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        some_case(**changes).weigh()

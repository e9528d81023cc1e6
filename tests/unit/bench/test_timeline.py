"""Order and times of turns, on a virtual timeline."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.bench.content import Text, render_text
from memserve.bench.timeline import Due, Pace, Timeline, plan_arrivals
from memserve.bench.workload import Workload, compose_prompt, salt_workload
from memserve.core.errors import ConfigError
from unit.bench.conftest import make_chats


def play(workload: Workload, pace: Pace, seconds: float, seed: int = 0) -> list[Due]:
    """All turns as they become due when every answer takes ``seconds``."""
    timeline, now, running, seen = Timeline(workload, pace, seed), 0.0, [], []
    while not timeline.done:
        for due in timeline.take_due(now):
            running.append((max(now, due.at) + seconds, due))
            seen.append(due)
        ends = [end for end, _ in running]
        now = min([*ends, *([at] if (at := timeline.next_at()) is not None else [])])
        for ended in [one for one in running if one[0] <= now]:
            running.remove(ended)
            timeline.finish(ended[1], now, (Text(f"a{ended[1].session}.{ended[1].turn}"),))
    assert not running
    return seen


@given(
    st.integers(1, 8),
    st.integers(1, 4),
    st.floats(0, 3),
    st.floats(0, 2),
    st.one_of(st.integers(1, 4), st.floats(0.1, 10)),
)
def test_every_turn_once_and_in_causal_order(
    sessions: int, turns: int, think: float, seconds: float, load: int | float
) -> None:
    pace = Pace(concurrency=load) if isinstance(load, int) else Pace(rate=load)
    workload = make_chats(sessions, turns, think)
    seen = play(workload, pace, seconds)
    assert sorted((due.session, due.turn) for due in seen) == [
        (session, turn) for session in range(sessions) for turn in range(turns)
    ]
    assert [due.at for due in seen] == sorted(due.at for due in seen)
    for session in range(sessions):
        times = [due.at for due in seen if due.session == session]
        assert all(later >= earlier + seconds + think - 1e-9 for earlier, later in itertools.pairwise(times))


def test_a_closed_loop_never_has_more_sessions_than_asked_for() -> None:
    seen = play(make_chats(10, 2, think=1.0), Pace(concurrency=3), 1.0)
    spans = [
        (
            min(due.at for due in seen if due.session == one),
            max(due.at for due in seen if due.session == one) + 1,
        )
        for one in range(10)
    ]
    for begin, _ in spans:
        assert sum(first <= begin < last for first, last in spans) <= 3


def test_poisson_arrivals_have_the_rate_and_the_seed_decides_them() -> None:
    workload = make_chats(4000, 1)
    arrivals = plan_arrivals(workload, Pace(rate=5.0), 1)
    assert arrivals is not None
    gaps = np.diff([0.0, *arrivals])
    assert gaps.mean() == pytest.approx(0.2, rel=0.07)
    # Of an exponential distribution the standard deviation is the mean.
    assert gaps.std() == pytest.approx(0.2, rel=0.1)
    assert arrivals == plan_arrivals(workload, Pace(rate=5.0), 1)
    assert arrivals != plan_arrivals(workload, Pace(rate=5.0), 2)


def test_recorded_arrivals_keep_their_pattern() -> None:
    made = make_chats(3, 1)
    sessions = tuple(replace(one, arrival=at) for one, at in zip(made.sessions, (2.0, 3.0, 6.0), strict=True))
    workload = replace(made, sessions=sessions)
    assert plan_arrivals(workload, Pace(), 0) == (0.0, 1.0, 4.0)
    assert plan_arrivals(workload, Pace(speed=2.0), 0) == (0.0, 0.5, 2.0)
    # Two sessions after the first, at four per second.
    assert plan_arrivals(workload, Pace(rate=4.0), 0) == (0.0, 0.125, 0.5)


def texts(due: Due) -> list[str]:
    return [render_text(message.content) for message in due.prompt]


def test_prompts_hold_real_or_recorded_answers() -> None:
    seen = play(make_chats(1, 3), Pace(concurrency=1), 1.0)
    assert texts(seen[2]) == ["be brief", "q0.0", "a0.0", "q0.1", "a0.1", "q0.2"]
    timeline = Timeline(make_chats(1, 2), Pace(concurrency=1), 0, real_answers=False)
    (first,) = timeline.take_due(0.0)
    timeline.finish(first, 1.0, (Text("real"),))
    (second,) = timeline.take_due(1.0)
    assert texts(second) == ["be brief", "q0.0", "r0.0", "q0.1"]


def test_without_history_only_the_opening_stays() -> None:
    workload = replace(make_chats(1, 2), history=False)
    assert texts(play(workload, Pace(concurrency=1), 1.0)[1]) == ["be brief", "q0.1"]


def test_neighbours_of_one_role_become_one_message() -> None:
    made = make_chats(1, 1)
    opening = tuple(replace(one, role="user") for one in made.sessions[0].opening)
    session = replace(made.sessions[0], opening=opening)
    assert [render_text(one.content) for one in compose_prompt(made, session, ())] == ["be briefq0.0"]


def test_a_failure_ends_its_session_and_lets_the_next_begin() -> None:
    timeline = Timeline(make_chats(2, 3), Pace(concurrency=1), 0)
    (first,) = timeline.take_due(0.0)
    timeline.finish(first, 1.0, None)
    (second,) = timeline.take_due(1.0)
    assert (second.session, second.turn) == (1, 0)


def test_after_a_stop_nothing_begins() -> None:
    timeline = Timeline(make_chats(4, 2), Pace(concurrency=2), 0)
    first, second = timeline.take_due(0.0)
    timeline.stop()
    timeline.finish(first, 1.0, (Text("x"),))
    timeline.finish(second, 1.0, None)
    assert timeline.done
    assert timeline.take_due(9.0) == ()


def test_salts_differ_in_front_and_nowhere_else() -> None:
    plain = make_chats(2, 2)
    one, other = salt_workload(plain, "a"), salt_workload(plain, "b")
    assert one == salt_workload(plain, "a")
    for mine, theirs, was in zip(one.sessions, other.sessions, plain.sessions, strict=True):
        assert mine.opening[0].content[0] != theirs.opening[0].content[0]
        assert mine.opening[0].content[1:] == was.opening[0].content
        assert mine.turns == was.turns
    bare = replace(plain, sessions=tuple(replace(session, opening=()) for session in plain.sessions))
    assert salt_workload(bare, "a").sessions[0].turns[0] != bare.sessions[0].turns[0]


@pytest.mark.parametrize(
    ("pace", "named"),
    [
        (Pace(rate=1.0, concurrency=1), "--rate and --concurrency"),
        (Pace(rate=0.0), "--rate is 0"),
        (Pace(rate=float("nan")), "--rate is nan"),
        (Pace(concurrency=0), "--concurrency is 0"),
        (Pace(speed=0.0, concurrency=1), "--speed is 0"),
        (Pace(), "no recorded arrivals"),
    ],
)
def test_senseless_paces_are_named(pace: Pace, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Timeline(make_chats(), pace, 0)

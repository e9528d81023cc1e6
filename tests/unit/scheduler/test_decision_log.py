"""A decision log replays to the same decisions, byte for byte the same log; damage is named."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.config import POLICIES, TreeSource
from memserve.core.errors import ConfigError, NoInstance
from memserve.core.messages import Member, PoolEvents, Ready, Stored
from memserve.core.types import InstanceId, Namespace, RequestId, Role, StepPrices, Tokens, pack_tokens
from memserve.scheduler.costs import Wire
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.decision_log import AnswerLearnt, Closed, RecordingScheduler, Routed
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.prompt_trees import TreeOptions
from memserve.scheduler.replay import Replayed, read_log, replay
from memserve.sim.journey import InOrder, SimRequest
from memserve.sim.simulation import Simulation
from memserve.sim.site import Loss, RoleChange, Site
from memserve.sim.steps import Speed

PRICES = StepPrices(step=0.01, row=0.002, row_context=1e-7, token=1e-4, token_context=1e-9)
WIRE = Wire(bytes_per_token=1000.0, bandwidth=1e8, latency=0.001)
CHANGES = (
    Loss(InstanceId("prefill-1"), 1.5, back=1.0),
    RoleChange(InstanceId("colocated-0"), Role.DECODE, 3.0),
    Loss(InstanceId("decode-0"), 5.0),
)
ODD_TOKENS = msgspec.json.encode(AnswerLearnt(0.1, RequestId("r0"), Namespace("n"), b"sixbyt")) + b"\n"


def requests() -> Iterator[SimRequest]:
    """Sessions whose prompts grow and share a beginning, a dozen per second."""
    random = np.random.default_rng(5)
    for n in range(80):
        prompt = np.arange(10_000 * (n % 9), 10_000 * (n % 9) + 160 + 48 * (n // 9), dtype=np.int32)
        answer: Tokens = random.integers(0, 9, 5 + n % 30).astype(np.int32)
        yield SimRequest(0.08 * n, prompt, answer, f"s{n % 9}")


def record(policy: str, trees: TreeOptions | None = None) -> list[bytes]:
    """The log of a simulated cluster of five that loses some and changes."""
    lines: list[bytes] = []
    site = Site(2, 2, 1, Speed(PRICES, step_tokens=1000), 400, WIRE)
    simulation = Simulation(
        site, policy_by_name(policy), lambda _: None, trees, CHANGES, explains=True, log=lines.append
    )
    simulation.run(InOrder(requests()))
    simulation.close()
    return lines


def again(lines: list[bytes], policy: str | None = None) -> list[Replayed]:
    opened, news = read_log(lines, "the log")
    return list(replay(opened, news, policy_by_name(policy or opened.policy)))


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_runs_write_equal_logs_and_replay(policy: str) -> None:
    lines = record(policy)
    assert lines == record(policy)
    replayed = again(lines)
    assert len(replayed) >= 80, "requests of lost instances are routed again"
    for one in replayed:
        assert one.then == one.now
        assert isinstance(one.then, Decision)


@pytest.mark.parametrize("source", TreeSource)
def test_trees_are_made_as_they_were(source: TreeSource) -> None:
    lines = record("cost", TreeOptions(source, ttl=2.0, speculative_seconds=0.5, memory=20_000))
    assert all(one.then == one.now for one in again(lines))
    assert any(isinstance(one.now, Decision) and one.now.matched_prefill for one in again(lines))


def test_foresight_counts_as_use_and_replays() -> None:
    lines: list[bytes] = []
    clock = VirtualClock()
    options = TreeOptions(memory=20_000)
    scheduler = RecordingScheduler(policy_by_name("cost"), clock, lines.append, trees=options)
    name = InstanceId("c0")
    member = Member(name, 1, Role.COLOCATED, "@c0")
    space = Namespace("m")

    def asked(at: int, start: int) -> RouteRequest:
        return RouteRequest(RequestId(f"r{at}"), space, np.arange(start, start + 320, dtype=np.int32))

    with pytest.raises(NoInstance):
        scheduler.foresee(asked(0, 0))
    scheduler.member_ready(member, Ready(name, "@c0", "m", 512, 16, 64, 4096, "layout", "reference"))
    for at in range(60):
        clock.advance(0.01)
        tokens = pack_tokens(np.arange(1000 * at, 1000 * at + 320, dtype=np.int32))
        scheduler.on_pool_events(PoolEvents(name, 1, at, (Stored(space, tokens),)))
        # What is asked for stays known, however little room there is.
        assert scheduler.foresee(asked(at, 0)).predicted_ttft > 0
        scheduler.route(asked(at, 1000 * (at // 2)))
    replayed = again(lines)
    assert [one.now for one in replayed] == [one.then for one in replayed]
    without = [line for line in lines if b'"what":"foreseen"' not in line]
    assert len(without) == len(lines) - 61
    assert any(one.now != one.then for one in again(without)), "it was of consequence"


def test_another_policy_differs() -> None:
    lines = record("cost")
    other = again(lines, "round-robin")
    assert sum(one.then != one.now for one in other) > 20


def test_a_changed_log_is_found_out() -> None:
    lines = record("cost")
    decoder = msgspec.json.Decoder(Routed)
    at = next(n for n, line in enumerate(lines) if b'"what":"routed"' in line and n > 200)
    entry = decoder.decode(lines[at])
    lines[at] = msgspec.json.encode(msgspec.structs.replace(entry, tokens=entry.tokens[:-64])) + b"\n"
    first = next(one for one in again(lines) if one.then != one.now)
    assert first.line == at + 1


@pytest.mark.parametrize("left", [20, -1])
def test_what_the_dying_wrote_last_is_left_out(left: int) -> None:
    lines = record("least-load")
    lines[-1] = lines[-1][:left]
    assert again(lines)
    _, news = read_log(lines, "the log")
    number, last = list(news)[-1]
    assert number == len(lines)
    assert isinstance(last, Closed)
    assert "whose end was not written" in last.reason


def test_requests_that_nobody_could_take_are_part_of_it() -> None:
    lines: list[bytes] = []
    site = Site(1, 1, 0, Speed(PRICES, step_tokens=1000), 400, WIRE)
    lost = (Loss(InstanceId("prefill-0"), 0.0),)
    simulation = Simulation(site, policy_by_name("cost"), lambda _: None, changes=lost, log=lines.append)
    simulation.run(
        InOrder(iter([SimRequest(1.0, np.arange(99, dtype=np.int32), np.arange(9, dtype=np.int32))]))
    )
    simulation.close()
    (one,) = again(lines)
    assert one.then == one.now
    assert isinstance(one.now, str)
    assert "no prefill or colocated instance" in one.now


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda lines: [b"{}\n", *lines[1:]], "the log is no decision log"),
        (lambda lines: [], "the log is no decision log"),
        (lambda lines: [lines[0].replace(b'"version":1', b'"version":9'), *lines[1:]], "has version 9"),
        (lambda lines: [*lines[:7], b'{"what":"nonsense"}\n', *lines[8:]], "the log, line 8, cannot be read"),
        (lambda lines: [*lines[:7], lines[7][:-9] + b"\n", *lines[8:]], "the log, line 8, cannot be read"),
        (lambda lines: [*lines[:7], ODD_TOKENS, *lines[8:]], "the log, line 8, cannot be read: 6 bytes"),
    ],
)
def test_damage_is_named(spoil, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        again(spoil(record("least-load")))

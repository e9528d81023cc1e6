"""Chunks from two instances in one order; cancels and errors end a request everywhere, once."""

from __future__ import annotations

import asyncio

import pytest

from dispatching import PROMPT, D, P, R, chunk, cluster, collect, request, run, start, until
from memserve.core.config import TreeSource
from memserve.core.errors import InvalidRequest, NoInstance, Overloaded, RequestFailed
from memserve.core.messages import PoolEvents, RequestClosed, RequestError, Snapshot, Stored
from memserve.core.types import FinishReason, Ledger, Namespace, as_tokens, pack_tokens
from memserve.scheduler.places import Work
from memserve.scheduler.prompt_trees import TreeOptions


def test_chunks_are_put_in_order_whoever_is_first() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        name, submit = outbox.sent[0]
        assert (name, submit.decode_on) == (P, D)  # type: ignore[attr-defined]
        dispatcher.on_message(D, chunk(2, 12))
        dispatcher.on_message(D, chunk(1, 11))
        dispatcher.on_message(P, chunk(0, 10))
        dispatcher.on_message(D, chunk(3, 13, finish=FinishReason.LENGTH))
        pieces = await task
        assert [piece.tokens for piece in pieces] == [(10,), (11,), (12,), (13,)]
        assert pieces[0].ledger == Ledger(computed=64)
        assert pieces[-1].finish is FinishReason.LENGTH
        assert outbox.cancelled() == []

    run(scenario())


def test_a_repeated_chunk_is_not_shown_twice() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        for message in (chunk(0, 10), chunk(0, 10), chunk(1, 11), chunk(0, 10), chunk(1, 11)):
            dispatcher.on_message(P, message)
        dispatcher.on_message(D, chunk(2, finish=FinishReason.STOP))
        assert [piece.tokens for piece in await task] == [(10,), (11,), ()]

    run(scenario())


def test_leaving_cancels_on_both_instances_and_unbooks() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, chunk(0, 10))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        cancelled = FinishReason.CANCELLED
        assert sorted(outbox.cancelled()) == [(D, cancelled), (P, cancelled)]
        dispatcher.on_message(D, chunk(1, 11))
        load = [state.load for state in dispatcher._scheduler.state.instances()]
        assert load == [Work(), Work()]

    run(scenario())


def test_a_stop_string_keeps_the_kv() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        pieces = dispatcher.generate(request())
        asking = asyncio.ensure_future(anext(pieces))
        while not outbox.sent:
            await asyncio.sleep(0)
        dispatcher.on_message(P, chunk(0, 10))
        await asking
        dispatcher.stop(R)
        await pieces.aclose()
        assert sorted(outbox.cancelled()) == [(D, FinishReason.STOP), (P, FinishReason.STOP)]
        dispatcher.stop(R)
        assert len(outbox.cancelled()) == 2

    run(scenario())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("InvalidRequest", InvalidRequest), ("Unheard", RequestFailed), ("Overloaded", Overloaded)],
)
def test_an_instances_error_ends_the_request(kind: str, expected: type[Exception]) -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, RequestError(R, kind, "no good"))
        dispatcher.on_message(P, RequestClosed(R, P))
        with pytest.raises(expected, match="no good"):
            await task

    run(scenario())


def test_nobody_or_twice_is_refused_at_once() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        with pytest.raises(InvalidRequest, match="in use"):
            await collect(dispatcher)
        dispatcher.on_message(P, chunk(0, 10, finish=FinishReason.LENGTH))
        await task
        dispatcher.on_lost(P, "it died")
        with pytest.raises(NoInstance, match="prefill"):
            await collect(dispatcher)

    run(scenario())


def test_closing_ends_requests_and_takes_no_more() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        dispatcher.close()
        for attempt in (task, asyncio.create_task(collect(dispatcher, "late"))):
            with pytest.raises(NoInstance, match="stopping"):
                await attempt

    run(scenario())


def test_a_gap_in_the_events_asks_for_one_snapshot() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        space = Namespace("m")
        path = Stored(space, pack_tokens(PROMPT))
        outbox.snapshot = Snapshot(P, 1, 6, (path,))
        for seq in (4, 5):
            dispatcher.on_message(P, PoolEvents(P, 1, seq, (path,)))
        tree = dispatcher._scheduler.state.tree
        await until(lambda: tree.held_tokens(P) == 64)
        dispatcher._scheduler.state.check()

    run(scenario())


def test_the_ledger_tells_how_true_the_tree_was() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        stored = Stored(Namespace("m"), pack_tokens(PROMPT[:32]))
        dispatcher.on_message(P, PoolEvents(P, 1, 0, (stored,)))
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, chunk(0, 10))
        dispatcher.on_message(D, chunk(1, 11, finish=FinishReason.LENGTH))
        await task
        accuracy = dispatcher._scheduler.state.accuracy
        assert (accuracy.requests, accuracy.believed, accuracy.stale) == (1, 32, 32)

    run(scenario())


def test_without_events_an_answer_is_believed_where_it_was_decoded_and_where_it_came_back_to() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster(trees=TreeOptions(TreeSource.TTL))
        dispatcher.on_message(P, PoolEvents(P, 1, 7, (Stored(Namespace("m"), pack_tokens(PROMPT + 500)),)))
        assert dispatcher._snapshots == {}
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, chunk(0, *range(64, 81)))
        dispatcher.on_message(D, chunk(17, 99, finish=FinishReason.LENGTH))
        await task
        held = dispatcher._scheduler.state.match(Namespace("m"), as_tokens(range(96)))
        assert held.by_instance() == {P: 80, D: 80}
        assert dispatcher._scheduler.state.match(Namespace("m"), PROMPT + 500).by_instance() == {}

    run(scenario())

"""What happens to a request when an instance is lost under it; tests/property tries all orders."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dispatching import PROMPT, D, Outbox, P, R, add, chunk, cluster, collect, request, run, start, until
from memserve.core.errors import NoInstance, PeerLost, RequestFailed
from memserve.core.messages import Heartbeat, LoadReport, RequestClosed, RequestError, Shutdown, TokenChunk
from memserve.core.types import FinishReason, InstanceId, Ledger, RequestId, unpack_tokens
from memserve.scheduler.places import Work
from memserve.scheduler.service import EASING_BEATS
from memserve.server.backend import Generated
from memserve.server.dispatch import Dispatcher
from memserve.server.placement import MAX_ATTEMPTS

P1, D1 = InstanceId("prefill-1"), InstanceId("decode-1")
AGAIN = RequestId("r~1")


def two_of_each() -> tuple[Dispatcher, Outbox]:
    dispatcher, outbox = cluster()
    for name in (P1, D1):
        add(dispatcher, name)
    return dispatcher, outbox


def lose(dispatcher: Dispatcher, outbox: Outbox, name: InstanceId) -> None:
    outbox.gone.add(name)
    dispatcher.on_lost(name, "it died")


def again(offset: int, *tokens: int, finish: FinishReason | None = None) -> TokenChunk:
    """A chunk of the second attempt, which counts from its own first token."""
    return TokenChunk(
        AGAIN, offset, tokens, finish=finish, ledger=Ledger(computed=99) if not offset else None
    )


def tokens_of(pieces: list[Generated]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


@pytest.mark.parametrize(
    ("before", "lost", "moves"),
    [([], P, True), ([], D, True), ([0], P, True), ([0, 1], P, False), ([0, 1], D, True), ([1], P, True)],
)
def test_what_cannot_go_on_is_moved_with_what_was_answered(
    before: list[int], lost: InstanceId, moves: bool
) -> None:
    async def scenario() -> None:
        dispatcher, outbox = two_of_each()
        task = await start(dispatcher, outbox)
        for offset in before:
            dispatcher.on_message(P, chunk(offset, 10 + offset))
        lose(dispatcher, outbox, lost)
        if not moves:
            dispatcher.on_message(D, chunk(2, finish=FinishReason.STOP))
            assert tokens_of(await task) == [10, 11]
            assert outbox.cancelled() == []
            assert (dispatcher.losses[lost], dispatcher.failovers) == (1, 0)
            return
        await until(lambda: len(outbox.submitted()) == 2)
        assert (dispatcher.losses[lost], dispatcher.failovers) == (1, 1)
        assert outbox.cancelled() == [(D if lost == P else P, FinishReason.CANCELLED)]
        name, submit = outbox.submitted()[1]
        kept = [10, 11][: len(before)] if before[:1] == [0] else []
        assert (submit.request, name != lost, submit.decode_on != lost) == (AGAIN, True, True)
        assert unpack_tokens(submit.tokens).tolist() == [*PROMPT.tolist(), *kept]
        assert (submit.sampling.first_index, submit.sampling.max_tokens) == (len(kept), 9 - len(kept))
        dispatcher.on_message(D, chunk(len(before), 666))
        dispatcher.on_message(name, again(0, 20))
        dispatcher.on_message(D1, again(1, 21, finish=FinishReason.LENGTH))
        pieces = await task
        assert tokens_of(pieces) == [*kept, 20, 21]
        computed = 64 if kept else 99
        ledgers = [piece.ledger for piece in pieces if piece.ledger is not None]
        assert ledgers == [Ledger(computed=computed)], "the ledger is that of the first token, and comes once"

    run(scenario())


def test_an_answer_that_is_complete_is_not_moved() -> None:
    async def scenario() -> None:
        dispatcher, outbox = two_of_each()
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, chunk(0, 10, finish=FinishReason.LENGTH))
        lose(dispatcher, outbox, P)
        assert tokens_of(await task) == [10]
        assert len(outbox.submitted()) == 1

    run(scenario())


def test_nobody_left_and_nobody_coming_is_an_error_at_once() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        lose(dispatcher, outbox, D)
        with pytest.raises(NoInstance, match=r"decode-0 was lost .*; no decode or colocated"):
            await task
        assert [state.load for state in dispatcher._scheduler.state.instances()] == [Work()]

    run(scenario())


class Restarting:
    """Stands where the supervisor does: says who is on the way back."""

    def __init__(self) -> None:
        self.restarting: tuple[InstanceId, ...] = ()

    def became_ready(self, instance: InstanceId) -> bool:
        self.restarting = ()
        return True


def test_a_request_waits_for_whoever_is_coming_back() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        supervisor = Restarting()
        dispatcher.supervisor = supervisor  # type: ignore[assignment]
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, chunk(0, 10))
        supervisor.restarting = (D,)
        lose(dispatcher, outbox, D)
        await asyncio.sleep(0)
        assert len(outbox.submitted()) == 1
        outbox.gone.clear()
        add(dispatcher, D, incarnation=2)
        await until(lambda: len(outbox.submitted()) == 2)
        dispatcher.on_message(P, again(0, 11, finish=FinishReason.LENGTH))
        assert tokens_of(await task) == [10, 11]

    run(scenario())


def test_a_restart_that_is_given_up_ends_the_waiting() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        supervisor = Restarting()
        dispatcher.supervisor = supervisor  # type: ignore[assignment]
        task = await start(dispatcher, outbox)
        supervisor.restarting = (D,)
        lose(dispatcher, outbox, D)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        supervisor.restarting = ()
        with pytest.raises(NoInstance):
            await task

    run(scenario())


def test_a_request_that_kills_whoever_runs_it_is_given_up() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        for number in range(1, MAX_ATTEMPTS + 1):
            add(dispatcher, InstanceId(f"prefill-{number}"))
        task = await start(dispatcher, outbox)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            await until(lambda count=attempt: len(outbox.submitted()) == count)  # type: ignore[misc]
            lose(dispatcher, outbox, outbox.submitted()[-1][0])
        with pytest.raises(PeerLost, match=r"was lost .*it died.* attempt 4 without a token"):
            await task
        assert len(outbox.submitted()) == MAX_ATTEMPTS

    run(scenario())


@pytest.mark.parametrize("kind", ["PeerLost", "TransferAborted", "StaleAddress"])
def test_an_error_about_another_instance_moves_the_request(kind: str) -> None:
    async def scenario() -> None:
        dispatcher, outbox = two_of_each()
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, chunk(0, 10))
        dispatcher.on_message(P, RequestError(R, kind, "decode-0 does not answer"))
        dispatcher.on_message(P, RequestClosed(R, P))
        await until(lambda: len(outbox.submitted()) == 2)
        dispatcher.on_message(P, RequestError(R, "RequestFailed", "late, of the first attempt"))
        dispatcher.on_message(P, again(0, 11, finish=FinishReason.LENGTH))
        assert tokens_of(await task) == [10, 11]

    run(scenario())


def test_an_error_of_the_request_itself_is_final_also_when_moved() -> None:
    async def scenario() -> None:
        dispatcher, outbox = two_of_each()
        task = await start(dispatcher, outbox)
        lose(dispatcher, outbox, P)
        await until(lambda: len(outbox.submitted()) == 2)
        dispatcher.on_message(P1, RequestError(AGAIN, "RequestFailed", "not numbers"))
        with pytest.raises(RequestFailed, match="not numbers"):
            await task

    run(scenario())


def test_a_connection_that_breaks_before_the_loss_is_known_moves_the_request() -> None:
    async def scenario() -> None:
        dispatcher, outbox = two_of_each()
        outbox.gone.add(P)
        task = asyncio.create_task(collect(dispatcher))
        await asyncio.sleep(0)
        dispatcher.on_lost(P, "it died")
        await until(lambda: [name for name, _ in outbox.submitted()] == [P1])
        dispatcher.on_message(P1, again(0, 10, finish=FinishReason.LENGTH))
        assert tokens_of(await task) == [10]

    run(scenario())


def test_leaving_while_waiting_for_a_place_leaves_nothing() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        supervisor = Restarting()
        dispatcher.supervisor = supervisor  # type: ignore[assignment]
        task = await start(dispatcher, outbox)
        supervisor.restarting = (D,)
        lose(dispatcher, outbox, D)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert [state.load for state in dispatcher._scheduler.state.instances()] == [Work()]
        add(dispatcher, D, incarnation=2)
        await asyncio.sleep(0)
        assert len(outbox.submitted()) == 1

    run(scenario())


def test_a_stop_string_after_a_move_ends_the_present_attempt() -> None:
    async def scenario() -> None:
        dispatcher, outbox = two_of_each()
        pieces = dispatcher.generate(request())
        asking = asyncio.ensure_future(anext(pieces))
        await until(lambda: len(outbox.submitted()) == 1)
        lose(dispatcher, outbox, P)
        await until(lambda: len(outbox.submitted()) == 2)
        outbox.sent.clear()
        dispatcher.on_message(P1, again(0, 10))
        await asking
        dispatcher.stop(R)
        await pieces.aclose()
        assert sorted(outbox.cancelled()) == [(D, FinishReason.STOP), (P1, FinishReason.STOP)]

    run(scenario())


def test_an_instance_that_asks_to_go_gets_no_new_request_and_leave_when_it_has_finished() -> None:
    async def scenario() -> None:
        dispatcher, outbox = two_of_each()
        task = await start(dispatcher, outbox)
        (name, _), others = outbox.submitted()[0], {P, P1}
        dispatcher.on_draining(name)
        later = asyncio.create_task(collect(dispatcher, "later"))
        await until(lambda: len(outbox.submitted()) == 2)
        assert outbox.submitted()[1][0] in others - {name}
        dispatcher.on_message(name, chunk(0, 10))
        dispatcher.on_message(D, chunk(1, 11, finish=FinishReason.LENGTH))
        assert tokens_of(await task) == [10, 11]
        assert [to for to, message in outbox.sent if isinstance(message, Shutdown)] == [name]
        later.cancel()
        await asyncio.gather(later, return_exceptions=True)

    run(scenario())


def test_one_that_has_come_back_takes_only_what_no_other_can_for_a_while() -> None:
    async def scenario() -> None:
        dispatcher, outbox = two_of_each()
        dispatcher.on_lost(P, "it died")
        add(dispatcher, P, incarnation=2)
        first = await start(dispatcher, outbox)
        assert outbox.submitted()[0][0] == P1
        for _ in range(EASING_BEATS):
            dispatcher.on_suspected(P)
            dispatcher.on_recovered(P)
            dispatcher.on_heartbeat(Heartbeat(P, 2, LoadReport()))
        second = asyncio.create_task(collect(dispatcher, "second", start=1000))
        await until(lambda: len(outbox.submitted()) == 2)
        assert outbox.submitted()[1][0] == P
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)

    run(scenario())


def test_the_prompt_of_a_continuation_is_new_memory() -> None:
    """A client's array must never be what grows."""

    async def scenario() -> None:
        dispatcher, outbox = two_of_each()
        before = np.array(PROMPT)
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, chunk(0, 10))
        lose(dispatcher, outbox, D)
        await until(lambda: len(outbox.submitted()) == 2)
        assert np.array_equal(PROMPT, before)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(scenario())

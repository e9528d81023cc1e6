"""The load generator against a server that answers, fails, stalls and goes away."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from memserve.bench.client import Asking, OpenAIClient
from memserve.bench.comparison import Comparison, Plan, compare_targets
from memserve.bench.load import run_load
from memserve.bench.records import Record, Round
from memserve.bench.target import Target
from memserve.bench.timeline import Pace, Timeline
from memserve.bench.trace import TraceLine, make_replay
from memserve.bench.workload import Endpoint, Workload
from memserve.core.errors import ConfigError, NoInstance, RequestFailed
from memserve.server.stand_in import Script
from stand_in_server import DEADLINE, Server
from unit.bench.conftest import CONTEXT, make_chats


class Watching:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.ended: list[Record] = []
        self.on_end: Callable[[], None] = lambda: None

    def starting(self, target: str, number: int) -> None: ...

    def running(self, target: str, number: int) -> None:
        self.begun.append((target, number))

    def turn_ended(self, record: Record) -> None:
        self.ended.append(record)
        self.on_end()


async def load(
    url: str,
    workload: Workload,
    *,
    stop: asyncio.Event | None = None,
    watching: Watching | None = None,
    timeout: float = DEADLINE,
    duration: float | None = None,
    concurrency: int = 2,
) -> Round:
    asking = Asking(workload.endpoint, workload.fixed, "tiny", timeout=timeout, vocabulary=250)
    async with asyncio.timeout(2 * DEADLINE), OpenAIClient(url) as client:
        return await run_load(
            client,
            asking,
            Timeline(workload, Pace(concurrency=concurrency), 0),
            number=0,
            turns=workload.turns,
            stop=stop or asyncio.Event(),
            duration=duration,
            progress=watching or Watching(),
        )


def test_turns_are_measured_and_later_ones_contain_the_answers(server: Server) -> None:
    server.backend.script = Script(reply=server.tokens("yes!"))
    measured = asyncio.run(load(server.url, make_chats(3, 2)))
    assert (len(measured.records), measured.unfinished, measured.never_sent) == (6, 0, 0)
    for record in measured.records:
        assert record.error == ""
        assert 0 <= record.due <= record.sent <= record.arrivals[0] <= record.ended <= measured.seconds
        assert record.output_tokens == 4
        assert record.exact
        assert record.sources.total == record.prompt_tokens
    assert all(record.sources.local > 0 for record in measured.records if record.turn == 1)
    later = [prompt for prompt in server.asked() if ".1" in prompt]
    assert len(later) == 3
    assert all("yes!" in prompt for prompt in later)
    assert all(request.sampling.max_tokens == 4 for request in server.backend.requests)
    assert measured.client.cpu_share > 0
    assert measured.sent is None


def test_prompts_of_token_ids_arrive_as_they_are(server: Server) -> None:
    replay = make_replay([TraceLine(0, 700, 3, [4, 5]), TraceLine(10, 700, 3, [4, 6])], CONTEXT)
    measured = asyncio.run(load(server.url, replay, concurrency=1))
    assert [record.error for record in measured.records] == ["", ""]
    first, second = (request.tokens.tolist() for request in server.backend.requests)
    assert len(first) == len(second) == 700
    assert first[:512] == second[:512] != second[188:]
    assert first[512:] != second[512:]
    assert measured.records[1].sources.local == 512


def test_completions_send_one_text(server: Server) -> None:
    measured = asyncio.run(load(server.url, replace(make_chats(1, 1), endpoint=Endpoint.COMPLETIONS)))
    assert [record.error for record in measured.records] == [""]
    assert server.asked() == ["be briefq0.0"]


@pytest.mark.parametrize(("after", "named"), [(0, "status 500: the kernel broke"), (2, "in mid-stream")])
def test_failures_are_recorded_and_end_their_session(server: Server, after: int, named: str) -> None:
    server.backend.script = Script(failure=RequestFailed("the kernel broke"), fail_after=after)
    measured = asyncio.run(load(server.url, make_chats(3, 2)))
    assert [record.turn for record in measured.records] == [0, 0, 0]
    assert all(named in record.error for record in measured.records)
    assert measured.never_sent == 3


def test_a_stalling_server_costs_the_timeout_and_no_more(server: Server) -> None:
    server.backend.script = Script(stall_after=1)
    measured = asyncio.run(load(server.url, make_chats(1, 1), timeout=0.2))
    assert [record.error for record in measured.records] == ["not answered within 0.2 s"]


def test_a_duration_cuts_off_what_is_in_flight(server: Server) -> None:
    server.backend.script = Script(stall_after=1)
    measured = asyncio.run(load(server.url, make_chats(3, 1), duration=0.3))
    assert (measured.records, measured.unfinished, measured.never_sent) == ((), 2, 1)


def test_a_stop_keeps_what_was_answered(server: Server) -> None:
    async def stopped() -> Round:
        stop, watching = asyncio.Event(), Watching()
        watching.on_end = stop.set
        return await load(server.url, make_chats(4, 1), stop=stop, watching=watching, concurrency=1)

    measured = asyncio.run(stopped())
    assert 1 <= len(measured.records) < 4
    assert len(measured.records) + measured.unfinished + measured.never_sent == 4


@asynccontextmanager
async def answering(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that does with each connection what ``answer`` does, and closes it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNK = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (HEAD + b"connection: close\r\n\r\n" + CHUNK, "before it was complete"),
        (HEAD + b"content-length: 9999\r\n\r\n" + CHUNK, "connection: "),
        (HEAD + b"connection: close\r\n\r\ndata: {oops\n\n", "no completion chunk"),
        (b"", "connection: "),
        (b"\x00\x01garbage\r\n\r\n", "connection: "),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy", "status 503"),
    ],
)
def test_servers_that_break_off_or_talk_nonsense(said: bytes, named: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()

    async def run() -> Round:
        async with answering(talk) as url:
            return await load(url, make_chats(2, 2))

    measured = asyncio.run(run())
    assert len(measured.records) == 2
    assert all(named in record.error for record in measured.records), measured.records


# --- several targets ----------------------------------------------------------------------------------


def plan(**more: object) -> Plan:
    given = {"workload": make_chats(2, 2), "context": 512, "pace": Pace(concurrency=2), "rounds": 2} | more
    return Plan(**given)  # type: ignore[arg-type]


async def compare(targets: tuple[Target, ...], asked: Plan, watching: Watching) -> Comparison:
    async with asyncio.timeout(2 * DEADLINE):
        return await compare_targets(targets, asked, watching, asyncio.Event())


def test_targets_take_turns_and_rounds_differ_only_in_their_salt(server: Server) -> None:
    targets, watching = (Target("a", server.url), Target("b", f"{server.url}/v1/")), Watching()
    results = asyncio.run(compare(targets, plan(), watching)).results
    assert watching.begun == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [result.model for result in results] == ["tiny", "tiny"]
    assert [[one.number for one in result.rounds] for result in results] == [[0, 1], [0, 1]]
    first = [prompt for prompt in server.asked() if "q0.0" in prompt and "q0.1" not in prompt]
    assert len(first) == 4
    assert len(set(first)) == 2


def test_targets_that_cannot_be_benchmarked_are_named(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for target, asked, kind, named in (
        (Target("a", f"http://127.0.0.1:{port}"), plan(), NoInstance, "no server answers"),
        (Target("a", server.url), plan(model="huge"), ConfigError, "--model huge"),
        (Target("a", server.url), plan(context=1 << 20), ConfigError, "--context is"),
    ):
        ended = asyncio.run(compare((target,), asked, Watching()))
        assert ended.results == ()
        assert isinstance(ended.failure, kind)
        assert named in str(ended.failure)


def test_what_was_measured_before_a_target_broke_is_kept(server: Server) -> None:
    watching = Watching()

    def fail_from_now_on() -> None:
        server.backend.script = Script(failure=RequestFailed("broken"))

    watching.on_end = fail_from_now_on
    ended = asyncio.run(compare((Target("a", server.url),), plan(), watching))
    assert [one.number for one in ended.results[0].rounds] == [0]
    assert "a did not answer a first small request: status 500: broken" in str(ended.failure)


def test_text_cannot_be_sent_as_token_ids() -> None:
    with pytest.raises(ConfigError, match="--endpoint tokens"):
        plan(endpoint=Endpoint.TOKENS)

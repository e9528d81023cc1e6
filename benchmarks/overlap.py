"""What is gained by handing a prompt over while it is computed: one prefill and one decode instance.

    python benchmarks/overlap.py [--lengths N ...] [--rounds N] [--threads N] [--backend shm|tcp] [--output F]

Prompts that neither side has seen, each way of overlap in turns. Per prompt: from the first token, sampled on
P, to the beginning of D's first decode step (``handoff_ms``); time to the first and from there to the second
token; processor time of both sides; bytes. P is this process, D another; both run SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvloop
from numpy.typing import NDArray

from memserve.core.clock import MonotonicClock
from memserve.core.messages import Member, Message, RequestError, Submit, TokenChunk
from memserve.core.types import InstanceId, Namespace, RequestId, Role, SamplingParams, Tokens, pack_tokens
from memserve.engine.batcher import Batcher
from memserve.engine.carrier import PoolCarrier
from memserve.engine.engine import Engine
from memserve.engine.models.loader import open_model
from memserve.engine.overlap import Overlap
from memserve.engine.pace import Pace
from memserve.engine.phases import PHASES
from memserve.engine.runners.base import ForwardBatch, LayerSignal
from memserve.engine.runners.native import NativeRunner
from memserve.mempool import MemPool, TransferEndpoint
from recording import write_result
from transfer_backends import SECURITY

CONTEXT = 4200
BLOCKS = 600
STEP_TOKENS = 512
SPACE = Namespace("bench")
P, D = InstanceId("prefill-0"), InstanceId("decode-0")
DEADLINE = 300.0


class TimedRunner(NativeRunner):
    """Remembers when its last pass began."""

    began = 0.0

    def forward(self, batch: ForwardBatch, signal: LayerSignal | None = None) -> NDArray[np.float32]:
        self.began = time.monotonic()
        return super().forward(batch, signal)


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt, in milliseconds."""

    handoff_ms: float
    ttft_ms: float
    second_token_ms: float
    processor_ms: float
    bytes: int
    chosen: str


@dataclass(slots=True)
class Heard:
    """What has been said about one request; times in seconds of the machine's monotonic clock."""

    first: float = 0.0
    decoded: float = 0.0
    second: float = 0.0
    processor: float = 0.0
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Prefill:
    """P: an engine per way of overlap, all on one pool and runner, of which one works at a time."""

    def __init__(self, runner: NativeRunner, pool: MemPool, carrier: PoolCarrier, vocabulary: int) -> None:
        self.pool = pool
        self.heard: dict[str, Heard] = {}
        self.engines = {
            way: new_engine(P, runner, pool, carrier, vocabulary, self._hear, way) for way in Overlap
        }
        self._vocabulary = vocabulary
        self._turns = 0

    async def ask(self, way: Overlap, length: int, peer: asyncio.StreamWriter) -> Run:
        """Send one new prompt through ``way`` and wait until both sides have forgotten it."""
        self._turns += 1
        prompt = np.random.default_rng(self._turns).integers(0, self._vocabulary, length, dtype=np.int32)
        name = f"{way.value}-{length}-{self._turns}"
        heard = self.heard[name] = Heard()
        before, sent = time.process_time(), self.pool.stats().sent_bytes
        counts = dict(self.engines[way].counters())
        asked = time.monotonic()
        sampling = SamplingParams(max_tokens=4, temperature=0.0)
        self.engines[way].submit(Submit(RequestId(name), SPACE, pack_tokens(prompt), sampling, D))
        async with asyncio.timeout(DEADLINE):
            await heard.done.wait()
        now = self.engines[way].counters()
        chosen = [key for key in now if key.startswith("handoffs_") and now[key] > counts[key]]
        ahead = int(now["handoff_blocks_ahead"] - counts["handoff_blocks_ahead"])
        self.pool.delete(prompt, SPACE)
        peer.write(json.dumps(prompt.tolist()).encode() + b"\n")
        return Run(
            1e3 * (heard.decoded - heard.first),
            1e3 * (heard.first - asked),
            1e3 * (heard.second - heard.first),
            1e3 * (time.process_time() - before + heard.processor),
            self.pool.stats().sent_bytes - sent,
            "+".join(key.removeprefix("handoffs_") for key in chosen) + f", {ahead} ahead",
        )

    def _hear(self, message: Message) -> None:
        if isinstance(message, RequestError):
            raise SystemExit(f"{message.request}: {message.message}")
        if isinstance(message, TokenChunk):
            self.heard[message.request].first = time.monotonic()


def new_engine(
    name: InstanceId,
    runner: NativeRunner,
    pool: MemPool,
    carrier: PoolCarrier,
    vocabulary: int,
    emit: object,
    overlap: Overlap = Overlap.NONE,
) -> Engine:
    return Engine(
        name,
        pool,
        runner,
        Batcher(step_tokens=STEP_TOKENS, max_running=8, pace=Pace()),
        PHASES["pd-caching-2"],
        carrier,
        context=CONTEXT,
        vocabulary=vocabulary,
        clock=MonotonicClock(),
        emit=emit,  # type: ignore[arg-type]
        overlap=overlap,
    )


@contextlib.asynccontextmanager
async def side(
    name: InstanceId, runner: NativeRunner, address: str, backend: str
) -> AsyncIterator[tuple[MemPool, TransferEndpoint, PoolCarrier]]:
    """A pool that peers reach at ``address``, with its pages touched."""
    clock = MonotonicClock()
    pool = MemPool(runner.layout, BLOCKS, instance=name, incarnation=1, clock=clock)
    held = pool.alloc_mem(BLOCKS)
    for number in held.blocks.tolist():
        pool.arena.block_memory(number)[:] = 1
    pool.free_mem(held)
    endpoint = TransferEndpoint(pool, clock, backends=(backend,), security=SECURITY)
    await endpoint.start(address)
    try:
        yield pool, endpoint, PoolCarrier(name, pool, clock, timeout=30.0)
    finally:
        await endpoint.close()


async def measure(
    lengths: list[int], rounds: int, threads: int, backend: str, model: str
) -> dict[str, list[Run]]:
    """All runs by way and length, in turns; the first round only warms up."""
    addresses = [f"@memserve-benchmark-{os.getpid()}-{name}" for name in (P, D)]
    runner, vocabulary = load(model, threads)
    command = [sys.executable, __file__, "--peer", addresses[1], "--backend", backend, "--model", model]
    child = await asyncio.create_subprocess_exec(
        *command,
        f"--threads={threads}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    await child.stdout.readline()
    runs: dict[str, list[Run]] = {}
    async with side(P, runner, addresses[0], backend) as (pool, _, carrier):
        carrier.set_members((Member(D, 1, Role.DECODE, addresses[1]),))
        prefill = Prefill(runner, pool, carrier, vocabulary)
        tasks = [asyncio.create_task(engine.run()) for engine in prefill.engines.values()]
        tasks.append(asyncio.create_task(listen(child.stdout, prefill.heard)))
        for at in range(rounds + 1):
            for length in lengths:
                for way in random.Random(at).sample(list(Overlap), len(Overlap)):
                    run = await prefill.ask(way, length, child.stdin)
                    print(at, way.value, length, run, file=sys.stderr, flush=True)
                    if at:
                        runs.setdefault(f"{way.value}/{length}", []).append(run)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in prefill.engines.values():
            await engine.close()
    child.stdin.close()
    await child.wait()
    runner.close()
    return runs


async def listen(lines: asyncio.StreamReader, heard: dict[str, Heard]) -> None:
    """Read what D says about its second tokens."""
    while line := await lines.readline():
        said = json.loads(line)
        about = heard[said["request"]]
        about.decoded, about.second, about.processor = said["decoded"], said["second"], said["processor"]
        about.done.set()


async def serve_peer(address: str, backend: str, threads: int, model: str) -> None:
    """D: tells of each request when it has its second token, and forgets the prompts that it is told."""
    runner, vocabulary = load(model, threads)
    used = [0.0]

    def emit(message: Message) -> None:
        if isinstance(message, TokenChunk) and message.offset == 1:
            times = {"decoded": runner.began, "second": time.monotonic()}
            processor, used[0] = time.process_time() - used[0], time.process_time()
            print(json.dumps({"request": message.request, "processor": processor} | times), flush=True)

    async with side(D, runner, address, backend) as (pool, endpoint, carrier):
        engine = new_engine(D, runner, pool, carrier, vocabulary, emit)
        endpoint.on_adopt = engine.adopt
        running = asyncio.create_task(engine.run())
        used[0] = time.process_time()
        print("ready", flush=True)
        orders = asyncio.StreamReader(limit=1 << 20)
        reader = asyncio.StreamReaderProtocol(orders)
        await asyncio.get_running_loop().connect_read_pipe(lambda: reader, sys.stdin)
        while line := await orders.readline():
            forget: Tokens = np.array(json.loads(line), np.int32)
            pool.delete(forget, SPACE)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await engine.close()
    runner.close()


def load(model: str, threads: int) -> tuple[TimedRunner, int]:
    source = open_model(model)
    weights = source.stored_weights(lambda done: None)
    return TimedRunner(weights, threads=threads, context=CONTEXT), source.spec.vocabulary


def summarise(runs: list[Run]) -> dict[str, object]:
    """Medians, with the quartiles of what the hand-over took."""
    handoffs = [run.handoff_ms for run in runs]
    lower, median, upper = statistics.quantiles(handoffs, n=4)
    return {
        "handoff_ms": median,
        "handoff_ms_quartiles": [lower, upper],
        **{
            name: statistics.median(getattr(run, name) for run in runs)
            for name in ("ttft_ms", "second_token_ms", "processor_ms", "bytes")
        },
        "chosen": sorted({run.chosen for run in runs}),
        "rounds": len(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", choices=("shm", "tcp"), default="shm")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peer", metavar="ADDRESS", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peer:
        uvloop.run(serve_peer(asked.peer, asked.backend, asked.threads, asked.model))
        return
    runs = uvloop.run(measure(asked.lengths, asked.rounds, asked.threads, asked.backend, asked.model))
    figures = {name: summarise(each) for name, each in runs.items()}
    about = {"backend": asked.backend, "threads": asked.threads, "step_tokens": STEP_TOKENS}
    print(write_result(f"overlap_{asked.backend}", about | {"figures": figures}, asked.output))
    for name, figure in figures.items():
        print(f"{name:14s}", figure)


if __name__ == "__main__":
    main()

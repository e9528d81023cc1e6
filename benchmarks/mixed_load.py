"""Streams that keep their pace while prompts arrive: 8 streams decode, then 4 prompts of 1,000 tokens come.

One engine in this process on the native runner, without HTTP. Every round measures, for each target time, the
prompts alone, then the streams alone (idle), then the streams with the prompts (mixed). Targets are multiples
of the idle time between two tokens just measured; "none" is no pacing.

With --clock processor all times, the engine's own included, are this process's processor time divided by its
threads: what a machine without other load would show, whoever else is busy on this one.

    python benchmarks/mixed_load.py [--clock wall|processor] [--rounds N] [--threads N]
        [--targets none,1.5,2,3,5] [--model M]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from memserve.core.clock import Clock, MonotonicClock
from memserve.core.config import Config, EngineConfig, ModelConfig
from memserve.core.messages import Message, RequestClosed, Submit, TokenChunk
from memserve.core.types import FinishReason, InstanceId, Namespace, RequestId, SamplingParams, pack_tokens
from memserve.engine.batcher import Batcher
from memserve.engine.carrier import NoPeers
from memserve.engine.engine import Engine
from memserve.engine.loading import load_model
from memserve.engine.pace import Pace
from memserve.engine.phases import PHASES
from memserve.engine.runners.base import Runner
from memserve.mempool.pool import MemPool
from recording import summarise, write_result

STREAMS, STREAM_PROMPT = 8, 256
PROMPTS, PROMPT_TOKENS = 4, 1000
IDLE_TOKENS = 40  # tokens per stream over which the idle time is taken
BLOCKS = 900
STEP_TOKENS = 512
PATIENCE = 300.0


class ProcessorClock:
    """Processor time of this process per thread of the model, in seconds."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def now(self) -> float:
        return time.process_time() / self._threads


@dataclass
class Bench:
    """An engine, and when each of its requests got its tokens (seconds)."""

    engine: Engine
    pool: MemPool
    clock: Clock
    vocabulary: int
    times: dict[str, list[float]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0

    def emit(self, message: Message) -> None:
        if isinstance(message, TokenChunk):
            self.times.setdefault(message.request, []).append(self.clock.now())
        elif isinstance(message, RequestClosed):
            self.closed.add(message.request)
        self.heard.set()

    def ask(self, length: int, max_tokens: int) -> str:
        """Submit a prompt that nobody has had before."""
        self.asked += 1
        name = f"r{self.asked}"
        tokens = np.random.default_rng().integers(1000, self.vocabulary, length).astype(np.int32)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.engine.submit(Submit(RequestId(name), Namespace("m"), pack_tokens(tokens), sampling))
        return name

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self.heard.clear()
                await self.heard.wait()

    def got(self, names: Sequence[str], count: int) -> bool:
        return all(len(self.times.get(name, ())) >= count for name in names)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Seconds between two tokens of a stream, without and with prompts; prompt tokens per second."""

    idle: list[float]
    mixed: list[float]
    rate: float
    first_tokens: list[float]


def make_bench(runner: Runner, vocabulary: int, clock: Clock) -> Bench:
    pool = MemPool(runner.layout, BLOCKS, instance=InstanceId("bench"), incarnation=1, clock=clock)
    made: list[Bench] = []
    engine = Engine(
        InstanceId("bench"),
        pool,
        runner,
        Batcher(step_tokens=STEP_TOKENS, max_running=64, pace=Pace()),
        PHASES["colocated"],
        NoPeers(),
        context=2048,
        vocabulary=vocabulary,
        clock=clock,
        emit=lambda message: made[0].emit(message),
    )
    made.append(Bench(engine, pool, clock, vocabulary))
    return made[0]


async def run_prompts(bench: Bench) -> tuple[float, list[float]]:
    """Tokens per second until the last prompt's first token, and each prompt's time to it."""
    started = bench.clock.now()
    names = [bench.ask(PROMPT_TOKENS, 1) for _ in range(PROMPTS)]
    await bench.until(lambda: bench.got(names, 1))
    firsts = [bench.times[name][0] - started for name in names]
    return PROMPTS * PROMPT_TOKENS / max(firsts), firsts


async def run_mixed(bench: Bench, target: str) -> Mixed:
    pace = bench.engine.batcher.pace
    pace.target = None
    streams = [bench.ask(STREAM_PROMPT, 1700) for _ in range(STREAMS)]
    await bench.until(lambda: bench.got(streams, 2))
    begun = {name: len(bench.times[name]) for name in streams}
    await bench.until(lambda: all(bench.got([name], begun[name] + IDLE_TOKENS) for name in streams))
    now = bench.clock.now()
    idle = [gap for name in streams for gap in gaps(bench.times[name][begun[name] :])]
    pace.target = None if target == "none" else float(target) * statistics.median(idle)
    rate, firsts = await run_prompts(bench)
    mixed = [gap for name in streams for gap in gaps([t for t in bench.times[name] if t >= now])]
    for name in streams:
        bench.engine.cancel(RequestId(name), FinishReason.CANCELLED)
    await bench.until(lambda: set(streams) <= bench.closed)
    return Mixed(idle, mixed, rate, firsts)


def gaps(times: Sequence[float]) -> list[float]:
    return [late - early for early, late in pairwise(times)]


async def measure(
    runner: Runner, vocabulary: int, clock: Clock, targets: list[str], rounds: int
) -> dict[str, object]:
    bench = make_bench(runner, vocabulary, clock)
    running = asyncio.create_task(bench.engine.run())
    await run_mixed(bench, "none")
    alone: list[float] = []
    runs: dict[str, list[Mixed]] = {name: [] for name in targets}
    for at in range(rounds):
        for name in targets:
            alone.append((await run_prompts(bench))[0])
            runs[name].append(await run_mixed(bench, name))
            print(f"round {at + 1}: {describe(name, runs[name][-1], alone[-1])}", flush=True)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await bench.engine.close()
    bench.pool.check(())
    bench.pool.close()
    return {
        "alone_tokens_per_second": summarise(alone),
        "targets": {name: record(runs[name], alone[at :: len(targets)]) for at, name in enumerate(targets)},
    }


def record(runs: list[Mixed], alone: list[float]) -> dict[str, object]:
    """Ratios pair what was measured one after the other."""
    return {
        "mixed_p99_of_idle_median": summarise([p99(run.mixed) / statistics.median(run.idle) for run in runs]),
        "mixed_p99_of_idle_p99": summarise([p99(run.mixed) / p99(run.idle) for run in runs]),
        "mixed_mean_of_idle_mean": summarise(
            [statistics.mean(run.mixed) / statistics.mean(run.idle) for run in runs]
        ),
        "prefill_of_alone": summarise([run.rate / rate for run, rate in zip(runs, alone, strict=True)]),
        "idle_p50_seconds": summarise([statistics.median(run.idle) for run in runs]),
        "mixed_p50_seconds": summarise([statistics.median(run.mixed) for run in runs]),
        "mixed_p99_seconds": summarise([p99(run.mixed) for run in runs]),
        "prefill_tokens_per_second": summarise([run.rate for run in runs]),
        "mean_first_token_seconds": summarise([statistics.mean(run.first_tokens) for run in runs]),
    }


def describe(name: str, run: Mixed, alone: float) -> str:
    idle = statistics.median(run.idle)
    return (
        f"target {name:>4}: idle {idle * 1e3:5.1f} ms, p50 {statistics.median(run.mixed) / idle:5.2f}, "
        f"p99 {p99(run.mixed) / idle:5.2f} x idle, prefill {run.rate:4.0f} tok/s, {run.rate / alone:.2f} x"
    )


def p99(values: list[float]) -> float:
    return float(np.quantile(values, 0.99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--targets", default="none,1.5,2,3,5")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    config = Config(
        model=ModelConfig(model=asked.model, context=2048), engine=EngineConfig(weights_cache="off")
    )
    loaded = load_model(config, asked.threads, (), lambda stage, done: None)
    runner = loaded.runner
    clock = MonotonicClock() if asked.clock == "wall" else ProcessorClock(asked.threads)
    try:
        figures = asyncio.run(
            measure(runner, loaded.spec.vocabulary, clock, asked.targets.split(","), asked.rounds)
        )
    finally:
        isa = runner.isa
        runner.close()
    about = {"isa": isa, "threads": asked.threads, "clock": asked.clock}
    path = write_result("mixed_load", about | figures, asked.output)
    print(path)


if __name__ == "__main__":
    main()

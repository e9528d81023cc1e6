"""Speculation by prompt lookup, on and off: tokens per second, time between chunks, share of right guesses.

One engine in this process on the native runner, without HTTP. Prompts are cached before anything is measured,
so that times are decode's. ``--batch`` requests run at a time; a pass runs all tasks of a workload, on and
off by turns, and must give the same tokens. A small model repeats itself more than larger ones do, hence
``recorded``: what prices and guesses would give if the data sets' own answers came.

With --clock processor all times, the engine's own included, are this process's processor time divided by its
threads: what a machine without other load would show, whoever else is busy on this one.

    python benchmarks/speculation.py --data FOLDER [--weights stored,bf16] [--batch 1,8] [--rounds N]
        [--tasks N] [--threads N] [--temperature T] [--clock wall|processor] [--tokens K] [--longest N]
        [--shortest N] [--workloads sharegpt,loogle,react,copy] [--model M] [--output FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from memserve.core.clock import Clock, MonotonicClock
from memserve.core.messages import Message, RequestClosed, Submit, TokenChunk
from memserve.core.types import InstanceId, Namespace, RequestId, SamplingParams, pack_tokens
from memserve.engine.batcher import WORTH, Batcher
from memserve.engine.carrier import NoPeers
from memserve.engine.engine import Engine
from memserve.engine.models.loader import open_model
from memserve.engine.pace import Pace, StepTimes, Work
from memserve.engine.phases import PHASES
from memserve.engine.runners.native import NativeRunner
from memserve.engine.speculation import Draft, Lookup
from memserve.mempool.pool import MemPool
from mixed_load import ProcessorClock
from recording import summarise, write_result
from speculation_tasks import COPIES, RECORDED, Task, TaskMaker

CONTEXT = 2048
TARGET_TPOT = 0.1  # the default
BLOCKS = 2600
RECORDED_TASKS = 32
PATIENCE = 3600.0
HERE = InstanceId("bench")


@dataclass
class Answer:
    """Tokens and when they came; one entry of ``sizes`` and ``times`` per chunk."""

    tokens: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def gaps(self) -> list[float]:
        return np.diff(self.times).tolist()


@dataclass(frozen=True, slots=True)
class Pass:
    """One run over all tasks: tokens/s, ms between chunks, tokens proposed and accepted per token."""

    rate: float
    gap_p50: float
    gap_p99: float
    proposed: float
    accepted: float
    chunk_tokens: float
    answers: tuple[tuple[int, ...], ...]


class Bench:
    """An engine whose speculation can be switched on and off."""

    def __init__(self, runner: NativeRunner, vocabulary: int, eos: tuple[int, ...], clock: Clock) -> None:
        self.clock = clock
        self.pool = MemPool(runner.layout, BLOCKS, instance=HERE, incarnation=1, clock=clock)
        self.engine = Engine(
            HERE,
            self.pool,
            runner,
            Batcher(step_tokens=512, max_running=64, pace=Pace(TARGET_TPOT)),
            PHASES["colocated"],
            NoPeers(),
            context=CONTEXT,
            vocabulary=vocabulary,
            clock=clock,
            emit=self._hear,
        )
        self._eos = eos
        self._answers: dict[str, Answer] = {}
        self._asked = 0

    def _hear(self, message: Message) -> None:
        if isinstance(message, TokenChunk):
            answer = self._answers[message.request]
            answer.tokens += message.tokens
            answer.sizes.append(len(message.tokens))
            answer.times.append(self.clock.now())
        elif isinstance(message, RequestClosed):
            self._answers[message.request].closed.set()

    async def run_pass(
        self, tasks: Sequence[Task], batch: int, lookup: Lookup | None, temperature: float
    ) -> Pass:
        self.engine.batcher.lookup = lookup
        before, started = dict(self.engine.counters()), self.clock.now()
        answers = [Answer() for _ in tasks]
        queue = iter(zip(range(len(tasks)), tasks, answers, strict=True))
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(self._work(queue, temperature) for _ in range(batch)))
        seconds, tokens = self.clock.now() - started, sum(len(answer.tokens) for answer in answers)
        done = {name: value - before[name] for name, value in self.engine.counters().items()}
        gaps = [gap for answer in answers for gap in answer.gaps]
        return Pass(
            tokens / seconds,
            float(np.quantile(gaps, 0.5)) * 1e3,
            float(np.quantile(gaps, 0.99)) * 1e3,
            done["spec_decode_num_draft_tokens"] / tokens,
            done["spec_decode_num_accepted_tokens"] / tokens,
            tokens / sum(len(answer.sizes) for answer in answers),
            tuple(tuple(answer.tokens) for answer in answers),
        )

    async def _work(self, queue: Iterator[tuple[int, Task, Answer]], temperature: float) -> None:
        for seed, task, answer in queue:
            self._asked += 1
            name = RequestId(f"r{self._asked}")
            self._answers[name] = answer
            stop = () if task.fixed else self._eos
            sampling = SamplingParams(
                task.max_tokens, temperature=temperature, seed=seed, stop_token_ids=stop
            )
            self.engine.submit(Submit(name, Namespace("m"), pack_tokens(task.prompt), sampling))
            await answer.closed.wait()


async def compare(
    bench: Bench, tasks: Sequence[Task], batch: int, lookup: Lookup, rounds: int, temperature: float
) -> dict[str, object]:
    """Off and on by turns; every ratio pairs neighbours."""
    plain: list[Pass] = []
    looked: list[Pass] = []
    await bench.run_pass([replace(task, max_tokens=2) for task in tasks], batch, None, temperature)
    for at in range(rounds):
        # Who goes first changes, so that a machine that slows down favours neither.
        for on in (at % 2 == 1, at % 2 == 0):
            (looked if on else plain).append(
                await bench.run_pass(tasks, batch, lookup if on else None, temperature)
            )
    assert all(one.answers == plain[0].answers for one in (*plain, *looked)), "speculation changed an answer"
    pairs = list(zip(looked, plain, strict=True))
    return {
        "ratio": summarise([on.rate / off.rate for on, off in pairs]),
        "gap_p50_ratio": summarise([on.gap_p50 / off.gap_p50 for on, off in pairs]),
        "gap_p99_ratio": summarise([on.gap_p99 / off.gap_p99 for on, off in pairs]),
        "acceptance": statistics.median(on.accepted / on.proposed if on.proposed else 0 for on in looked),
        "proposed_per_token": statistics.median(on.proposed for on in looked),
        "tokens_per_chunk": statistics.median(on.chunk_tokens for on in looked),
        "off": describe(plain),
        "on": describe(looked),
        "tokens": sum(map(len, plain[0].answers)),
    }


def describe(passes: Sequence[Pass]) -> dict[str, object]:
    names = ("rate", "gap_p50", "gap_p99")
    return {name: summarise([getattr(one, name) for one in passes]) for name in names}


def follow_recorded(tasks: Sequence[Task], batch: int, lookup: Lookup, times: StepTimes) -> dict[str, float]:
    """How lookup would do if the data set's own answers came, at the prices that steps have here."""
    context = sum(len(task.prompt) for task in tasks) // len(tasks)
    work = Work()
    for _ in range(batch):
        work = work.decode(context)
    alone, cost = times.seconds_of(work) / batch, times.speculation_seconds(context)
    tokens = steps = rows = 0
    for task in tasks:
        text, at = np.concatenate([task.prompt, task.recorded]), len(task.prompt) + 1
        draft = Draft(lookup)
        tokens += max(0, len(text) - at)
        while at < len(text):
            said = draft.propose(text[:at], len(text) - at - 1, WORTH * cost / alone)
            came = text[at : at + len(said)].tolist()
            agree = next((n for n, (a, b) in enumerate(zip(said, came, strict=True)) if a != b), len(said))
            rows, steps, at = rows + len(said), steps + 1, at + agree + 1
    return {
        "ratio": tokens * alone / (steps * alone + rows * cost),
        "proposed_per_token": rows / tokens,
        "acceptance": (tokens - steps) / max(rows, 1),
        "tokens": tokens,
    }


async def measure(
    asked: argparse.Namespace, weights: str, figures: dict[str, object], record: Callable[[], Path]
) -> None:
    source = open_model(asked.model)
    maker = TaskMaker(source, asked.data, CONTEXT)
    runner = NativeRunner(source.stored_weights(), threads=asked.threads, context=CONTEXT, keep=weights)
    clock = MonotonicClock() if asked.clock == "wall" else ProcessorClock(asked.threads)
    bench = Bench(runner, source.spec.vocabulary, source.tokenizer().eos_tokens, clock)
    lookup = Lookup(asked.tokens, asked.longest, asked.shortest)
    running = asyncio.create_task(bench.engine.run())
    for batch in map(int, asked.batch.split(",")):
        for name in asked.workloads.split(","):
            # A batch must be full most of the time, or a pass measures how it runs dry.
            tasks = maker.make(name, asked.tasks if batch == 1 else max(asked.tasks, 3 * batch))
            found = await compare(bench, tasks, batch, lookup, asked.rounds, asked.temperature)
            times = bench.engine.batcher.pace.times
            found["recorded"] = follow_recorded(maker.make(name, RECORDED_TASKS), batch, lookup, times)
            found["prices"] = msgspec.structs.asdict(times.prices)
            figures[f"b{batch} {name}"] = found
            print(f"{weights} b{batch} {name}: {line(found)}", flush=True)
            record()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await bench.engine.close()
    bench.pool.check(())
    bench.pool.close()
    runner.close()


def line(found: dict[str, object]) -> str:
    figures = [found[name] for name in ("ratio", "gap_p50_ratio", "gap_p99_ratio", "recorded")]
    ratio, p50, p99, recorded = (one for one in figures if isinstance(one, dict))
    return (
        f"{ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f}), gaps p50 {p50['median']:.2f}, "
        f"p99 {p99['median']:.2f}; {found['proposed_per_token']:.2f} proposed per token, "
        f"{found['acceptance']:.2f} right; on the recorded answers {recorded['ratio']:.2f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", default="stored,bf16")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--workloads", default=",".join((*RECORDED, COPIES)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--longest", type=int, default=6)
    parser.add_argument("--shortest", type=int, default=1)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    lookup = Lookup(asked.tokens, asked.longest, asked.shortest)
    figures: dict[str, dict[str, object]] = {weights: {} for weights in asked.weights.split(",")}
    about = {"threads": asked.threads, "clock": asked.clock, "temperature": asked.temperature}
    about |= {"lookup": asdict(lookup)}

    def record() -> Path:
        return write_result("speculation", about | figures, asked.output)

    for weights, found in figures.items():
        asyncio.run(measure(asked, weights, found, record))
    print(record())


if __name__ == "__main__":
    main()

"""kill -9 of the decode instance under a running stream: how long the client waits for its next token.

The real model, one stream at a time. "another": a second decode instance takes over. "restart": the only one
is started again and goes on. Greedy answers must be those of a stream that nobody disturbs. Each round kills
once, in the middle of the answer, and waits until all instances are back; reported is the longest gap between
two tokens, beside the median gap of the undisturbed stream and its first token, which was computed cold.

    python benchmarks/failover.py [--rounds 5] [--prompt 600] [--tokens 120]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from memserve.bench.target import Target, open_target
from memserve.bench.wire import EventReader
from recording import summarise, write_result

CASES = {"another": ("--prefill", "1", "--decode", "2"), "restart": ("--prefill", "1", "--decode", "1")}
COMMON = ("--threads", "1", "--kv-memory", "512MiB")
BACK_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Streamed:
    """A whole answer and when its pieces came, s."""

    text: str
    arrivals: tuple[float, ...]

    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Instance:
    """What is needed of an instance in ``/v1/cluster``."""

    instance: str
    role: str
    state: str
    pid: int
    running: int


@dataclass(frozen=True, slots=True)
class Cluster:
    instances: tuple[Instance, ...]


async def show(http: httpx.AsyncClient) -> tuple[Instance, ...]:
    answer = await http.get("/v1/cluster")
    return msgspec.json.decode(answer.content, type=Cluster).instances


async def stream(http: httpx.AsyncClient, options: argparse.Namespace, kill_after: int | None) -> Streamed:
    """One answer; after ``kill_after`` pieces whoever decodes it is killed."""
    prompt = [2000 + 7 * at for at in range(options.prompt)]
    body = {"model": "smollm2-135m", "prompt": prompt, "max_tokens": options.tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    reader, texts, arrivals = EventReader(), [], []
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for piece in answer.aiter_bytes():
            for event in reader.read(piece):
                if event.text:
                    texts.append(event.text)
                    arrivals.append(time.perf_counter())
            if kill_after is not None and len(arrivals) >= kill_after:
                kill_after = None
                await kill_decoder(http)
    return Streamed("".join(texts), tuple(arrivals))


async def kill_decoder(http: httpx.AsyncClient) -> None:
    decoders = [one for one in await show(http) if one.role == "decode" and one.running]
    os.kill(decoders[0].pid, signal.SIGKILL)


async def until_all_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(BACK_SECONDS):
        while True:
            if all(one.state == "ready" for one in await show(http)):
                return
            await asyncio.sleep(0.05)


async def measure(case: str, options: argparse.Namespace) -> dict[str, object]:
    stop = asyncio.Event()
    pauses, equal = [], 0
    async with (
        open_target(Target(case, None, (*CASES[case], *COMMON)), stop) as url,
        httpx.AsyncClient(base_url=url or "", timeout=300, trust_env=False) as http,
    ):
        started = time.perf_counter()
        calm = await stream(http, options, None)
        first = calm.arrivals[0] - started
        for _ in range(options.rounds):
            disturbed = await stream(http, options, options.tokens // 2)
            pauses.append(max(disturbed.gaps()))
            equal += disturbed.text == calm.text
            await until_all_ready(http)
    return {
        "pause_seconds": summarise(pauses),
        "calm_gap_median": statistics.median(calm.gaps()),
        "cold_first_token": first,
        "answers_equal": equal,
        "kills": options.rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--output", type=Path, help="JSON file instead of results/failover.json")
    options = parser.parse_args()
    figures = {case: asyncio.run(measure(case, options)) for case in CASES}
    shape: dict[str, object] = {"prompt_tokens": options.prompt, "answer_tokens": options.tokens}
    print(write_result("failover", shape | figures, options.output).read_text())


if __name__ == "__main__":
    main()

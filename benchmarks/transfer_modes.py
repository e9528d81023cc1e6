"""What the modes of a transfer cost: calls and time, aggregated and discrete layouts, shm and tcp.

    python benchmarks/transfer_modes.py [--out FILE] [--rounds N]

Pieces cost more than bytes (paper, section 4.3): the same KV goes to another process in whole blocks, in
layers of blocks, and in the 2 x layers pieces per block of the discrete layout. Source blocks are scattered,
as they are in a pool in use. ``calls`` are contiguous pieces; times are whole calls of the API, in turns with
a memcpy of the same bytes in this process.

``exposed`` is what a transfer adds to a prefill: a producer finishes a layer every ``LAYER_SECONDS``, and
the time counts from the last layer to the publication.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import uvloop

from bar_chart import Panel, write_chart
from memserve import _native
from memserve.core.clock import MonotonicClock
from memserve.core.messages import Member
from memserve.core.types import InstanceId, Role
from memserve.mempool import (
    Addresses,
    Arrangement,
    KVLayout,
    LayerGate,
    MemPool,
    TransferEndpoint,
    TransferMode,
    Transferred,
)
from recording import RESULTS, write_result
from transfer_backends import LAYOUT, NS, SECURITY, spread, timed

SIZES = (1, 16, 256)
EXPOSED_SIZES = (1, 4, 16, 64, 256)
LAYER_SECONDS = 0.001
PEER_BLOCKS = 512
PEER = InstanceId("peer")
Figure = dict[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """One way of cutting blocks."""

    arrangement: Arrangement
    mode: TransferMode

    @property
    def name(self) -> str:
        return f"{self.arrangement}/{self.mode}"


CASES = (
    Case(Arrangement.AGGREGATED, TransferMode.BY_REQUEST_AGGREGATED),
    Case(Arrangement.AGGREGATED, TransferMode.BY_LAYER),
    Case(Arrangement.DISCRETE, TransferMode.BY_REQUEST),
    Case(Arrangement.DISCRETE, TransferMode.BY_LAYER),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/transfer_modes.json")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peer", nargs=2, metavar=("ADDRESS", "ARRANGEMENT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        uvloop.run(serve_peer(options.peer[0], Arrangement(options.peer[1])))
        return
    figures, exposed = uvloop.run(measure(options.rounds))
    out = options.out or RESULTS / "transfer_modes.json"
    write_result("transfer_modes", {"isa": _native.isa(), "figures": figures, "exposed": exposed}, out)
    draw(figures, out.with_suffix(".svg"))
    for name, figure in (figures | exposed).items():
        print(f"{name:56s}", "  ".join(f"{key} {value:.4g}" for key, value in figure.items()))


async def measure(rounds: int) -> tuple[dict[str, Figure], dict[str, Figure]]:
    figures: dict[str, Figure] = {}
    exposed: dict[str, Figure] = {}
    for backend in ("shm", "tcp"):
        async with contextlib.AsyncExitStack() as stack:
            sides = {kind: await stack.enter_async_context(connected(backend, kind)) for kind in Arrangement}
            for blocks in SIZES:
                figures |= await one_size(backend, blocks, rounds, sides)
            for blocks in EXPOSED_SIZES:
                exposed |= await one_prefill(backend, blocks, rounds, sides)
    return figures, exposed


async def one_size(
    backend: str, blocks: int, rounds: int, sides: dict[Arrangement, Side]
) -> dict[str, Figure]:
    taken: dict[Case, list[float]] = {case: [] for case in CASES}
    calls: dict[Case, int] = {}
    copied: list[float] = []
    for _ in range(rounds):
        copied.append(timed(lambda: sides[Arrangement.AGGREGATED].memcpy(blocks)))
        for case in CASES:
            started = time.perf_counter()
            done = await sides[case.arrangement].send(blocks, case.mode)
            taken[case].append(time.perf_counter() - started)
            calls[case] = done.calls
    figures = {}
    for case in CASES:
        ratio = spread([one / other for one, other in zip(taken[case], copied, strict=True)])
        times = spread([value * 1e3 for value in taken[case]])
        figures[f"{backend}/{case.name}/{blocks}"] = {
            "calls": calls[case],
            "ms": times["median"],
            "ms_p25": times["p25"],
            "ms_p75": times["p75"],
            "of_memcpy": ratio["median"],
        }
    return figures


async def one_prefill(
    backend: str, blocks: int, rounds: int, sides: dict[Arrangement, Side]
) -> dict[str, Figure]:
    taken: dict[Case, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            gate = LayerGate()
            sending = asyncio.ensure_future(sides[case.arrangement].send(blocks, case.mode, gate))
            for layer in range(LAYOUT.layers):
                await asyncio.sleep(LAYER_SECONDS)
                gate.open(layer + 1)
            finished = time.perf_counter()
            await sending
            taken[case].append((time.perf_counter() - finished) * 1e3)
    return {f"exposed_ms/{backend}/{case.name}/{blocks}": spread(taken[case]) for case in CASES}


def draw(figures: dict[str, Figure], path: Path) -> None:
    groups = [f"{blocks} blocks" for blocks in SIZES]
    panels = []
    for backend in ("shm", "tcp"):
        chosen = {
            case.name: [figures[f"{backend}/{case.name}/{blocks}"] for blocks in SIZES] for case in CASES
        }
        values = {name: [one["ms"] for one in row] for name, row in chosen.items()}
        labels = {name: [f"{one['calls']:g}" for one in row] for name, row in chosen.items()}
        panels.append(Panel(f"{backend}: milliseconds, and calls on the bars", groups, values, labels))
    write_chart(path, "The same KV in pieces and in whole blocks", panels)


class Side:
    """A pool with scattered blocks that go to the peer by one backend."""

    def __init__(self, pool: MemPool, endpoint: TransferEndpoint) -> None:
        self.pool = pool
        self.endpoint = endpoint
        order = np.random.default_rng(1).permutation(max(SIZES))
        src = pool.alloc_mem(max(SIZES))
        self.src = Addresses(src.instance, src.incarnation, src.packed[order])
        self.spare = pool.alloc_mem(max(SIZES))
        self._turns = 0
        for number in (*self.src.blocks.tolist(), *self.spare.blocks.tolist()):
            pool.arena.block_memory(number)[:] = number % 251

    async def send(self, blocks: int, mode: TransferMode, gate: LayerGate | None = None) -> Transferred:
        """A prompt that the peer does not know. By layer even where nothing has to be waited for."""
        self._turns += 1
        seed = (len(self.pool.instance), self._turns)
        prompt = np.random.default_rng(seed).integers(0, 49_152, blocks * 16, dtype=np.int32)
        if gate is None and mode is TransferMode.BY_LAYER:
            gate = LayerGate()
            gate.open(LAYOUT.layers)
        done = await self.pool.transfer_with_insert(
            PEER, prompt, self.src[:blocks], NS, mode=mode, ready=gate
        )
        assert done.sent == blocks, "the peer knew these tokens"
        return done

    def memcpy(self, blocks: int) -> None:
        targets = self.pool.pointers(self.spare[:blocks]).tolist()
        for target, source in zip(targets, self.pool.pointers(self.src[:blocks]).tolist(), strict=True):
            ctypes.memmove(target, source, LAYOUT.block_bytes)


@contextlib.asynccontextmanager
async def connected(backend: str, arrangement: Arrangement) -> AsyncIterator[Side]:
    """A pool here and one in another process, all pages of both touched once."""
    address = f"@memserve-benchmark-{os.getpid()}-{backend}-{arrangement}"
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--peer",
        address,
        arrangement,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    await child.stdout.readline()
    pool = new_pool(f"{backend}-{arrangement}", 2 * max(SIZES), arrangement)
    endpoint = TransferEndpoint(pool, MonotonicClock(), backends=(backend,), security=SECURITY)
    await endpoint.connect(Member(PEER, 1, Role.DECODE, address))
    side = Side(pool, endpoint)
    for _ in range(2 * PEER_BLOCKS // max(SIZES)):
        await side.send(max(SIZES), TransferMode.BY_REQUEST)
    yield side
    await endpoint.close()
    child.stdin.close()
    await child.wait()


async def serve_peer(address: str, arrangement: Arrangement) -> None:
    endpoint = TransferEndpoint(new_pool(PEER, PEER_BLOCKS, arrangement), MonotonicClock(), security=SECURITY)
    await endpoint.start(address)
    print("ready", flush=True)
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    await orders.read()
    await endpoint.close()


def new_pool(name: str, blocks: int, arrangement: Arrangement) -> MemPool:
    layout: KVLayout = replace(LAYOUT, arrangement=arrangement)
    return MemPool(layout, blocks, instance=InstanceId(name), incarnation=1, clock=MonotonicClock())


if __name__ == "__main__":
    main()

"""MemServe behind the protocol: the parts of an instance as the product assembles them, without HTTP.

Options are fields of the configuration, ``SECTION.FIELD`` or, for section ``engine``, ``FIELD`` alone:
whatever the product learns to do can be measured without a change here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import uvloop

from memserve import __version__, _native
from memserve.core.clock import MonotonicClock
from memserve.core.config import Config, check_config
from memserve.core.errors import ConfigError
from memserve.core.messages import Message, RequestClosed, RequestError, Submit, TokenChunk
from memserve.core.types import (
    FinishReason,
    InstanceId,
    Namespace,
    RequestId,
    Role,
    SamplingParams,
    pack_tokens,
)
from memserve.engine.assembly import Assembled, assemble
from memserve.engine.models.loader import open_model
from memserve.engine.models.spec import ModelSpec
from memserve.engine.runners.base import Runner
from memserve.engine.settings import InstanceSettings
from peers.protocol import Load
from peers.serving import Opened, Refused, serve
from peers.stepping import EngineError

PATIENCE = 600.0
_KEPT = {"4bit": "stored", "bf16": "bf16"}
_BLOCK_TOKENS = 16


def configure(load: Load, spec: ModelSpec) -> Config:
    """The product's defaults, but for what the measurement fixes and the options ask for."""
    # A block of room more for each stream, whose last block is filled in part.
    kv_bytes = 4 * spec.layers * spec.kv_heads * spec.head_dim
    sections: dict[str, dict[str, object]] = {
        "model": {"model": load.model, "context": load.context},
        "pool": {"memory": (load.kv_tokens + 32 * _BLOCK_TOKENS) * kv_bytes},
        "engine": {"threads": load.threads, "weights": _KEPT[load.weights], "phases": "colocated"},
        "cluster": {"prefill": 0, "decode": 0, "colocated": 1},
    }
    for name, value in load.options.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section or "engine", {})[field] = value
    try:
        return check_config(msgspec.convert(sections, Config, strict=False))
    except (ConfigError, msgspec.ValidationError) as error:
        raise Refused(f"options {load.options}: {error}") from error


class MemServeEngine:
    """A ``StepEngine``. The event loop runs only inside calls, so that nothing is done between them."""

    def __init__(self, load: Load) -> None:
        self._loop = uvloop.new_event_loop()
        self._heard: asyncio.Event
        self._got: list[int] = []
        self._closed: set[str] = set()
        self._failed: str | None = None
        self._asked = 0
        spec = open_model(load.model).spec
        self.config = configure(load, spec)
        self._assembled = self._loop.run_until_complete(self._start(load.threads))
        self.about = describe(self.config, self._assembled.runner)

    async def _start(self, threads: int) -> Assembled:
        self._heard = asyncio.Event()
        settings = InstanceSettings(
            InstanceId("bench"), 1, Role.COLOCATED, f"benchmark-{os.getpid()}", "", threads, self.config
        )
        assembled = await assemble(
            settings, MonotonicClock(), emit=self._emit, progress=lambda what, done: None
        )
        assembled.warm_up()
        self._stepping = asyncio.create_task(assembled.engine.run())
        return assembled

    def prepare(self, streams: int, longest: int) -> None:
        """Nothing: the pool serves any mix."""

    def add(self, prompt: Sequence[int], max_tokens: int) -> int:
        self._asked += 1
        self._loop.run_until_complete(self._submit(self._asked, prompt, max_tokens))
        return self._asked

    async def _submit(self, number: int, prompt: Sequence[int], max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        tokens = pack_tokens(np.array(prompt, np.int32))
        self._assembled.engine.submit(Submit(RequestId(str(number)), Namespace("bench"), tokens, sampling))

    def step(self) -> Iterable[int]:
        self._loop.run_until_complete(self._until_heard())
        got, self._got = self._got, []
        return got

    async def _until_heard(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while not self._got:
                self._raise_failure()
                self._heard.clear()
                await self._heard.wait()

    def cancel(self, requests: Sequence[int]) -> None:
        self._loop.run_until_complete(self._end([str(request) for request in requests]))
        self._got.clear()

    async def _end(self, names: list[str]) -> None:
        for name in names:
            if name not in self._closed:
                self._assembled.engine.cancel(RequestId(name), FinishReason.CANCELLED)
        async with asyncio.timeout(PATIENCE):
            while not self._closed.issuperset(names):
                self._heard.clear()
                await self._heard.wait()

    def close(self) -> None:
        self._loop.run_until_complete(self._stop())
        self._loop.close()

    async def _stop(self) -> None:
        self._stepping.cancel()
        await asyncio.gather(self._stepping, return_exceptions=True)
        await self._assembled.close()

    def _emit(self, message: Message) -> None:
        match message:
            case TokenChunk(request=request):
                self._got.append(int(request))
            case RequestClosed(request=request):
                self._closed.add(str(request))
            case RequestError(request=request, message=text):
                self._failed = f"request {request}: {text}"
        self._heard.set()

    def _raise_failure(self) -> None:
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise EngineError(failed)


def describe(config: Config, runner: Runner) -> dict[str, str]:
    engine = config.engine
    return {
        "version": __version__,
        "instruction set": runner.isa,
        "weights": f"kept {engine.weights}",
        "inputs of matrix products": "8 bits where weights have 4 or 8, else bf16"
        if runner.layout.model.endswith("-int8-activations")
        else "bf16",
        "KV cache": runner.layout.dtype,
        "step": f"{engine.step_tokens} tokens, target_tpot {engine.target_tpot}",
        "engine configuration": msgspec.json.encode(engine).decode(),
    }


def open_engine(load: Load) -> Opened:
    if load.weights not in _KEPT:
        raise Refused(f"weights {load.weights!r}: expected one of {', '.join(_KEPT)}")
    if isa := load.options.pop("isa", ""):
        _native.set_isa(isa)
    engine = MemServeEngine(load)
    return Opened(engine, engine.about, engine.close)


if __name__ == "__main__":
    serve(open_engine)

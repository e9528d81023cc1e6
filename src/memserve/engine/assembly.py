"""Builds what an instance is made of, in order: model, runner, pool, transfer endpoint, engine."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from memserve.cluster.host import available_memory
from memserve.core.clock import Clock
from memserve.core.config import EngineConfig, PoolConfig
from memserve.core.errors import ConfigError
from memserve.core.messages import LoadReport, Message, PoolResized, Ready, ResizePool, Stats
from memserve.core.types import InstanceId
from memserve.engine.batcher import Batcher
from memserve.engine.carrier import PoolCarrier
from memserve.engine.engine import Engine
from memserve.engine.loading import Progress, load_model
from memserve.engine.overlap import Overlap
from memserve.engine.pace import Pace, StepTimes
from memserve.engine.phases import PHASES
from memserve.engine.prefix_sender import PrefixSender
from memserve.engine.profile import SETTLED, ProfileStore, measure_prices, profile_key
from memserve.engine.runners.base import Runner
from memserve.engine.settings import InstanceSettings
from memserve.engine.speculation import Lookup
from memserve.engine.weights_cache import open_cache
from memserve.mempool import DiskTier, MemPool, Tier, TransferEndpoint

log = logging.getLogger(__name__)

_RESIZE_BYTES = 8 << 20
"""Memory given back at a time, about two milliseconds, so that a shrinking pool holds up no request."""


@dataclass(slots=True)
class Assembled:
    """The parts of a running instance."""

    settings: InstanceSettings
    runner: Runner
    pool: MemPool
    endpoint: TransferEndpoint
    carrier: PoolCarrier
    engine: Engine
    prefixes: PrefixSender
    ready: Ready
    profile: ProfileStore | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    resizing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def read_load(self) -> LoadReport:
        batcher, blocks = self.engine.batcher, self.pool.stats()
        return LoadReport(
            waiting=batcher.waiting,
            running=batcher.running,
            tokens_to_prefill=batcher.tokens_to_prefill,
            free_blocks=blocks.free,
            active_blocks=blocks.active,
            historical_blocks=blocks.historical,
            incoming_blocks=blocks.incoming,
            blocks=blocks.blocks,
            prices=batcher.pace.times.prices,
            swap=self.engine.swap_seconds(
                blocks.host.active + blocks.host.historical, blocks.disk.active + blocks.disk.historical
            ),
        )

    def read_stats(self) -> Stats:
        counters = dict(self.pool.stats().counters())
        counters.update(self.engine.counters())
        return Stats(self.settings.instance, self.read_load(), counters)

    def warm_up(self, first: int = 0) -> None:
        """Touch the pool's memory in the background, from block number ``first`` on."""
        populate = self.pool.arena.populate
        threading.Thread(target=populate, args=(self.stopping, first), daemon=True).start()

    async def resize(self, asked: ResizePool) -> PoolResized:
        """Resize a tier, in steps where it shrinks. Raises ``InvalidRequest`` or ``ConfigError``."""
        pool, tier = self.pool, Tier[asked.tier.upper()]
        blocks = asked.memory // pool.layout.block_bytes
        step = max(1, _RESIZE_BYTES // pool.layout.block_bytes)
        async with self.resizing:
            if tier is not Tier.DISK:
                _require_memory((blocks - pool.size_of(tier)) * pool.layout.block_bytes)
            known = pool.arena.extents[-1]
            while pool.size_of(tier) - blocks > step and blocks > 0:
                pool.resize(tier, pool.size_of(tier) - step)
                await asyncio.sleep(0)
            resized = pool.resize(tier, blocks)
            if pool.arena.extents[-1] != known:
                self.warm_up(known.first + 1)
        self.engine.capacity_changed()
        return PoolResized(resized.blocks, resized.draining, pool.layout.block_bytes)

    async def close(self) -> None:
        """Stop in reverse order; every block is given back before the pool goes, which is checked."""
        self.stopping.set()
        await self.prefixes.close()
        await self.engine.close()
        await self.endpoint.close()
        times = self.engine.batcher.pace.times
        if self.profile is not None and times.seen >= SETTLED:
            self.profile.keep(times.prices)
        self.pool.check(())
        self.pool.persist()
        self.runner.close()
        self.pool.close()


async def assemble(
    settings: InstanceSettings, clock: Clock, *, emit: Callable[[Message], None], progress: Progress
) -> Assembled:
    """Load and start everything. Raises ``ModelError`` or ``ConfigError`` naming what is wrong."""
    config = settings.config
    loaded = await asyncio.get_running_loop().run_in_executor(
        None, load_model, config, settings.threads, settings.cores, progress
    )
    spec, context, runner = loaded.spec, loaded.context, loaded.runner
    pool = MemPool(
        runner.layout,
        config.pool.memory // runner.layout.block_bytes,
        instance=settings.instance,
        incarnation=settings.incarnation,
        clock=clock,
        host_blocks=config.pool.host_memory // runner.layout.block_bytes,
        disk=disk_tier(config.pool, settings.instance, runner.layout.block_bytes),
    )
    batcher = build_batcher(config.engine)
    profile = await _learn_prices(batcher.pace.times, runner, pool, context, settings, progress)
    endpoint = TransferEndpoint(pool, clock)
    address = f"@memserve-{settings.cluster}-{settings.instance}-{settings.incarnation}"
    await endpoint.start(address)
    carrier = PoolCarrier(settings.instance, pool, clock, timeout=config.engine.handoff_timeout)
    engine = Engine(
        settings.instance,
        pool,
        runner,
        batcher,
        PHASES[config.engine.phases],
        carrier,
        context=context,
        vocabulary=spec.vocabulary,
        clock=clock,
        emit=emit,
        cores=settings.cores,
        overlap=Overlap(config.engine.overlap),
        backflow_tokens=config.engine.backflow_tokens,
    )
    endpoint.on_adopt = engine.adopt
    ready = Ready(
        settings.instance,
        address,
        spec.identity,
        context,
        runner.layout.block_tokens,
        pool.blocks,
        runner.layout.block_bytes,
        runner.layout.fingerprint,
        runner.isa,
        config.engine.step_tokens,
        config.engine.target_tpot,
    )
    prefixes = PrefixSender(settings.instance, pool, emit)
    return Assembled(settings, runner, pool, endpoint, carrier, engine, prefixes, ready, profile)


async def _learn_prices(
    times: StepTimes,
    runner: Runner,
    pool: MemPool,
    context: int,
    settings: InstanceSettings,
    progress: Progress,
) -> ProfileStore | None:
    """Let ``times`` begin with what steps cost here; returns where that is kept, if anywhere."""
    config = settings.config
    if config.model.runner != "native":
        return None
    cache = open_cache(config.engine.weights_cache)
    key = profile_key(runner, config.engine.weights, settings.threads)
    store = ProfileStore(cache.folder, key) if cache else None
    prices = store.find() if store else None
    if prices is None:
        progress("measuring step times", 0.0)
        measure = functools.partial(
            measure_prices, runner, pool, context=context, step_tokens=config.engine.step_tokens
        )
        prices = await asyncio.get_running_loop().run_in_executor(None, measure)
        if prices is not None and store is not None:
            store.keep(prices)
    if prices is not None:
        times.assume(prices)
    return store


def _require_memory(more: int) -> None:
    """Raise ``ConfigError`` unless ``more`` bytes are there: all of them are going to be touched."""
    available = available_memory()
    if available is not None and more > available:
        raise ConfigError(
            f"{more} bytes more of memory are asked for and this machine has {available} left; ask for less"
        )


def build_batcher(config: EngineConfig) -> Batcher:
    """The batcher that the configuration asks for."""
    lookup = None
    if config.speculative_method == "ngram":
        lookup = Lookup(
            config.num_speculative_tokens, longest=config.prompt_lookup_max, shortest=config.prompt_lookup_min
        )
    return Batcher(
        step_tokens=config.step_tokens,
        max_running=config.max_running,
        pace=Pace(config.target_tpot or None),
        lookup=lookup,
    )


def disk_tier(config: PoolConfig, instance: InstanceId, block_bytes: int) -> DiskTier | None:
    """The instance's own part of the disk tier: the same again after a restart. None if none is wanted."""
    if config.disk_path is None:
        return None
    return DiskTier(Path(config.disk_path) / instance, config.disk_memory // block_bytes)

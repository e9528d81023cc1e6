"""The composition root of ``memserve serve``: model, manager, launcher, scheduler, HTTP; and its end.

One process holds the HTTP server, the scheduler and the cluster manager; each instance is a child process.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import secrets
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from subprocess import Popen

import msgspec
import uvloop

from memserve.cluster.host import available_memory, count_cores
from memserve.cluster.manager import ClusterManager
from memserve.cluster.membership import MemberState
from memserve.cluster.spawning import INSTANCE_COMMAND
from memserve.cluster.supervisor import Supervisor
from memserve.core.clock import Clock, MonotonicClock
from memserve.core.config import Config, PoolConfig, SchedulerConfig, override_config
from memserve.core.errors import ConfigError, NoInstance
from memserve.core.types import InstanceId, Role
from memserve.engine.context import context_of
from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.loader import ModelSource, open_path
from memserve.engine.models.resolve import resolve_model
from memserve.engine.models.tokenizer import Tokenizer
from memserve.engine.phases import PHASES
from memserve.engine.settings import InstanceSettings
from memserve.scheduler.admission import LineLimits
from memserve.scheduler.decision_log import RecordingScheduler
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.prompt_trees import TreeOptions
from memserve.scheduler.service import GlobalScheduler
from memserve.server.dispatch import Dispatcher
from memserve.server.log_file import LogFile
from memserve.server.overview import ClusterOverview
from memserve.server.progress import StartScreen
from memserve.server.tenants import Tenants


def run(config: Config, screen: StartScreen, spare: list[Popen[bytes]] | None = None) -> None:
    """Serve until interrupted; returns after everything has been stopped.

    ``spare``: instance processes that wait for settings; they are taken before others are started.
    Raises ``ConfigError``, ``ModelError`` or ``NoInstance`` when the cluster cannot be brought up.
    """
    try:
        uvloop.run(_serve(config, screen, spare))
    finally:
        screen.stopped()


def plan_instances(config: Config) -> tuple[tuple[InstanceId, Role], ...]:
    """Names and roles of the instances to start: ``prefill-0``, ``decode-0``, ..."""
    counts = (
        (Role.PREFILL, config.cluster.prefill),
        (Role.DECODE, config.cluster.decode),
        (Role.COLOCATED, config.cluster.colocated),
    )
    return tuple((InstanceId(f"{role}-{at}"), role) for role, count in counts for at in range(count))


def name_of(model: str) -> str:
    """What clients call a model that was given without a name: its reference, or its file's name."""
    path = Path(model)
    return path.stem if path.exists() else model


def plan_threads(asked: int, instances: int) -> int:
    """Threads per instance. Raises ``ConfigError`` when all of them together exceed the cores."""
    cores = count_cores()
    if asked * instances > max(cores, instances):
        raise ConfigError(
            f"engine.threads is {asked} for each of {instances} instances on {cores} cores; "
            f"accepted: at most {max(1, cores // instances)}, or 0 to choose automatically"
        )
    return asked or max(1, cores // instances)


def plan_cores(pin: bool, threads: int, instances: int) -> tuple[tuple[int, ...], ...]:
    """The cores that each instance's threads stay on; empty where the system is to choose.

    It is, unless the instances take all cores anyway: a fixed choice of some would be that of others, too.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not pin or threads * instances != len(cores):
        return ((),) * instances
    return tuple(tuple(cores[at * threads : (at + 1) * threads]) for at in range(instances))


def require_memory(pool: PoolConfig, instances: int) -> None:
    """Raise ``ConfigError`` when the pools of all ``instances`` are more than this machine has."""
    available, asked = available_memory(), pool.memory + pool.host_memory
    if available is not None and asked * instances > available:
        raise ConfigError(
            f"pool.memory and pool.host_memory are {asked} bytes for each of {instances} instances and "
            f"{available} bytes are available; accepted: at most {available // instances} together, less "
            "what the weights take"
        )


def tree_options(config: Config) -> TreeOptions:
    """What the scheduler may believe, given what instances keep."""
    told, phases = config.scheduler, PHASES[config.engine.phases]
    return TreeOptions(
        told.trees,
        told.ttl_seconds,
        told.speculative,
        told.speculative_seconds,
        told.tree_memory,
        prompts_kept=phases.insert_after_prefill,
        answers_kept=phases.insert_after_decode,
        answers_return=phases.backflow,
    )


def line_limits(config: Config) -> LineLimits:
    """How many requests may wait in front of the instances, and how many these run."""
    server = config.server
    return LineLimits(
        server.max_waiting,
        server.max_waiting_tokens,
        server.tenant_max_waiting,
        server.tenant_max_waiting_tokens,
        config.engine.max_running,
    )


async def _serve(config: Config, screen: StartScreen, spare: list[Popen[bytes]] | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with _bind(config.server.host, config.server.port) as listening:
        cluster = _Cluster(config, screen, spare)
        try:
            await _until(cluster.start(), stop)
            if not stop.is_set():
                await cluster.answer(listening, stop)
        finally:
            await cluster.stop()


class _Cluster:
    """What ``serve`` starts and has to stop again."""

    def __init__(self, config: Config, screen: StartScreen, spare: list[Popen[bytes]] | None) -> None:
        self._config = config
        self._screen = screen
        self._instances = plan_instances(config)
        self._threads = plan_threads(config.engine.threads, len(self._instances))
        cores = plan_cores(config.engine.pin, self._threads, len(self._instances))
        names = (instance for instance, _ in self._instances)
        self._cores = dict(zip(names, cores, strict=True))
        require_memory(config.pool, len(self._instances))
        path = resolve_model(config.model.model)
        self._source: ModelSource = open_path(path)
        self._told = override_config(config, "model", model=str(path))
        """What instances are told: where the model lies has been found out already."""
        self._context = context_of(self._source.spec, config.model)
        self._name = secrets.token_hex(6)
        self._address = f"@memserve-{self._name}-control"
        clock = MonotonicClock()
        policy = policy_by_name(config.server.policy)
        self._log = _open_log(config.scheduler, clock)
        self._scheduler = (
            GlobalScheduler(policy, clock, trees=tree_options(config))
            if self._log is None
            else RecordingScheduler(policy, clock, self._log.write, trees=tree_options(config))
        )
        self._dispatcher = Dispatcher(
            self._scheduler,
            clock,
            screen,
            model=self._source.spec.identity,
            limits=line_limits(config),
            weight=Tenants(config.server.api_key, config.server.tenants).weight,
        )
        self._ended: dict[InstanceId, str] = {}
        self._supervisor = Supervisor(
            INSTANCE_COMMAND,
            config.cluster,
            clock,
            self._settings,
            on_exit=self._exited,
            on_given_up=screen.lost,
            spare=spare,
        )
        self._manager = ClusterManager(config.cluster, clock, self._dispatcher, kill=self._supervisor.kill)
        self._dispatcher.manager = self._manager
        self._dispatcher.supervisor = self._supervisor

    async def start(self) -> None:
        """Start all instances and wait until they are ready. Raises ``NoInstance`` if one fails."""
        await self._manager.start(self._address)
        for instance, role in self._instances:
            self._supervisor.start(instance, role)
        front = asyncio.get_running_loop().run_in_executor(None, _load_front, self._source)
        await self._all_ready()
        self._supervisor.restart_lost()
        self._tokenizer, self._template = await front

    async def answer(self, listening: socket.socket, stop: asyncio.Event) -> None:
        """Serve HTTP until ``stop`` is set."""
        from memserve.server.http import HttpServer, create_app

        served_name = self._config.model.served_name or name_of(self._config.model.model)
        overview = ClusterOverview(
            self._dispatcher, self._manager, self._scheduler, self._config, model=served_name
        )
        app = create_app(
            overview,
            self._tokenizer,
            self._template,
            (served_name,),
            self._config.server,
            self._usable_context(),
        )
        http = HttpServer(app)
        serving = asyncio.create_task(http.serve([listening]))
        answering = asyncio.create_task(http.answers.wait())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((serving, answering, stopping), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            self._screen.ready(_url_of(listening), served_name, self._describe())
            gc.collect()
            gc.freeze()
            gc.enable()
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        answering.cancel()
        stopping.cancel()
        self._dispatcher.close()
        http.should_exit = True
        await serving

    async def stop(self) -> None:
        """Stop instances and wait for their processes."""
        self._supervisor.restart_no_more()
        await self._manager.stop()
        await self._supervisor.stop()
        if self._log is not None:
            self._log.close()

    async def _all_ready(self) -> None:
        seconds = self._config.cluster.start_timeout
        try:
            async with asyncio.timeout(seconds):
                while not self._complete():
                    await self._dispatcher.members_changed.wait()
        except TimeoutError:
            raise NoInstance(f"not all instances were ready within {seconds:g} s") from None

    def _complete(self) -> bool:
        """Whether all instances are ready. Raises ``NoInstance`` as soon as one has ended."""
        self._dispatcher.members_changed.clear()
        for instance, reason in self._ended.items():
            told = self._dispatcher.start_failures.get(instance)
            raise NoInstance(f"{instance} did not come up: {told or reason}")
        return sum(link.ready is not None for link in self._manager.links()) == len(self._instances)

    def _settings(self, instance: InstanceId, role: Role, incarnation: int) -> bytes:
        return msgspec.json.encode(
            InstanceSettings(
                instance,
                incarnation,
                role,
                self._name,
                self._address,
                self._threads,
                self._told,
                self._cores[instance],
            )
        )

    def _exited(self, instance: InstanceId, incarnation: int, reason: str) -> Role | None:
        """Tell the others; returns the role in which the instance is missed, None if it had asked to go."""
        self._ended[instance] = reason
        self._manager.process_exited(instance, incarnation, reason)
        self._dispatcher.members_changed.set()
        view = next((view for view in self._manager.view() if view.instance == instance), None)
        return None if view is None or view.state is MemberState.LEFT else view.role

    def _usable_context(self) -> int:
        """The longest sequence that every pool can hold, in tokens, at most the model's context."""
        ready = [link.ready for link in self._manager.links() if link.ready is not None]
        return min(self._context, *(one.blocks * one.block_tokens for one in ready))

    def _describe(self) -> tuple[str, ...]:
        links = [link for link in self._manager.links() if link.ready is not None]
        roles = ", ".join(link.join.instance for link in links)
        ready = links[0].ready
        assert ready is not None
        return (
            f"{roles} · {ready.isa} · {self._threads} thread(s) each · "
            f"{ready.blocks} blocks of {ready.block_tokens} tokens each · "
            f"{self._config.engine.phases} · {self._config.server.policy}",
        )


def _open_log(config: SchedulerConfig, clock: Clock) -> LogFile | None:
    if not config.decision_log:
        return None
    return LogFile(Path(config.decision_log), config.decision_log_bytes, clock)


def _load_front(source: ModelSource) -> tuple[Tokenizer, ChatTemplate | None]:
    """What only this process needs, in a thread while instances start: HTTP, tokenizer, template."""
    importlib.import_module("memserve.server.http")
    return source.tokenizer(), source.chat_template()


async def _until(starting: Coroutine[None, None, object], stop: asyncio.Event) -> None:
    """Wait for ``starting`` to end or ``stop`` to be set, whichever is first; errors come through."""
    task = asyncio.create_task(starting)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        task.result()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port"
        ) from error
    return listening

"""One instance as a process: wires pool, runner and engine together and obeys its control connection.

Settings come on standard input, everything else over the control connection. When that connection ends,
or the parent process dies, the instance stops: it never outlives the cluster it belongs to.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from typing import Any

import msgspec
import uvloop

from memserve.cluster.heartbeat import HeartbeatThread
from memserve.core.clock import MonotonicClock
from memserve.core.errors import MemServeError, PeerLost, ProtocolError
from memserve.core.messages import (
    Cancel,
    ControlMessage,
    GetSnapshot,
    GetStats,
    Join,
    Leave,
    LoadProgress,
    LoadReport,
    Members,
    Message,
    Ok,
    RequestError,
    ResizePool,
    SendPrefix,
    SetRole,
    Shutdown,
    StartFailed,
    Submit,
)
from memserve.engine.assembly import Assembled, assemble
from memserve.engine.settings import InstanceSettings
from memserve.wire import Connection, connect

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_EVENT_SECONDS = 0.002
"""Pool events are collected this long, so that one step's changes travel as one message."""

_WARM_UP_SECONDS = 1.0
"""Touching a pool's memory takes a core for a third of a second per GiB; until then others start on it."""


class Instance:
    """The composition root of an instance process."""

    def __init__(self, settings: InstanceSettings) -> None:
        self._settings = settings
        self._clock = MonotonicClock()
        self._assembled: Assembled | None = None
        self._stopped = asyncio.Event()
        self._load = LoadReport()
        self._members: Members | None = None
        self._leaving = False

    async def run(self) -> None:
        """Serve until told to stop or left alone. Raises ``MemServeError`` when it cannot start."""
        settings = self._settings
        control = await connect(settings.control_address, ControlMessage, self, _CONNECT_SECONDS)
        control.label = "the server"
        self._control = control
        control.notify(Join(settings.instance, settings.incarnation, settings.role, os.getpid()))
        heart = HeartbeatThread(
            settings.control_address,
            settings.instance,
            settings.incarnation,
            settings.config.cluster.heartbeat,
            lambda: self._load,
        )
        heart.start()
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        except MemServeError as error:
            self._emit(StartFailed(settings.instance, str(error)))
            raise
        finally:
            for task in (serving, stopping):
                task.cancel()
            await asyncio.gather(serving, stopping, return_exceptions=True)
            heart.stop()
            if self._assembled is not None:
                await self._assembled.close()
            control.close()

    def stop(self) -> None:
        self._stopped.set()

    def leave(self) -> None:
        """Ask the server for leave and go on until it is given; at once when there is nothing to finish."""
        if self._assembled is None or self._leaving:
            self.stop()
            return
        self._leaving = True
        self._emit(Leave(self._settings.instance))
        asyncio.get_running_loop().call_later(self._settings.config.cluster.leave_timeout, self.stop)

    # --- control messages ---

    def on_notify(self, connection: Connection, message: Any) -> None:
        if isinstance(message, Shutdown):
            self.stop()
        elif isinstance(message, Members):
            self._members = message
            if self._assembled is not None:
                self._assembled.carrier.set_members(message.members)
        elif isinstance(message, Submit):
            self._submit(message)
        elif self._assembled is None:
            return
        elif isinstance(message, SendPrefix):
            self._assembled.prefixes.send(message)
        elif isinstance(message, Cancel):
            self._assembled.engine.cancel(message.request, message.reason)

    async def on_call(self, connection: Connection, message: Any) -> Message:
        if self._assembled is None:
            raise ProtocolError(f"{self._settings.instance} is not ready")
        if isinstance(message, GetStats):
            return self._assembled.read_stats()
        if isinstance(message, GetSnapshot):
            self._send_events()
            return self._assembled.pool.snapshot()
        if isinstance(message, ResizePool):
            return await self._assembled.resize(message)
        if isinstance(message, SetRole):
            # Requests say what is to be done with them, so there is nothing to stop and nothing to wait for.
            log.info("%s: %s from now on", self._settings.instance, message.role)
            return Ok()
        raise ProtocolError(f"an instance does not answer {type(message).__name__}")

    def on_close(self, connection: Connection, reason: str) -> None:
        log.info("control connection ended: %s", reason)
        self.stop()

    # --- inside ---

    async def _serve(self) -> None:
        self._progress("starting", 0.0)
        loop = asyncio.get_running_loop()

        def report(stage: str, fraction: float) -> None:
            loop.call_soon_threadsafe(self._progress, stage, fraction)

        assembled = await assemble(self._settings, self._clock, emit=self._emit, progress=report)
        self._assembled = assembled
        if self._members is not None:
            assembled.carrier.set_members(self._members.members)

        def send_soon() -> None:
            loop.call_later(_EVENT_SECONDS, self._send_events)

        assembled.pool.on_events(send_soon)
        self._load = assembled.read_load()
        self._control.notify(assembled.ready)
        loop.call_later(_WARM_UP_SECONDS, assembled.warm_up)
        gc.collect()
        gc.freeze()
        await asyncio.gather(assembled.engine.run(), self._report(assembled))

    async def _report(self, assembled: Assembled) -> None:
        """Keep the load report fresh for the next heartbeat, and end leases whose deadline has passed."""
        while True:
            self._load = assembled.read_load()
            assembled.pool.expire()
            await asyncio.sleep(self._settings.config.cluster.heartbeat / 2)

    def _send_events(self) -> None:
        assert self._assembled is not None
        events = self._assembled.pool.take_events()
        if events is not None:
            self._emit(events)

    def _submit(self, message: Submit) -> None:
        if self._assembled is None:
            text = f"{self._settings.instance} is not ready"
            self._emit(RequestError(message.request, PeerLost.__name__, text))
        else:
            self._assembled.engine.submit(message)

    def _progress(self, stage: str, fraction: float) -> None:
        self._emit(LoadProgress(self._settings.instance, stage, fraction))

    def _emit(self, message: Message) -> None:
        # A lost server ends this process through on_close; what it would have been told does not matter.
        with contextlib.suppress(PeerLost):
            self._control.notify(message)


def run_from_stdin() -> int:
    """Entry point of an instance process: settings as JSON on standard input; returns the exit code.

    Without settings there is nothing to do: whoever started this process has changed its mind.
    """
    _die_with_parent()
    logging.basicConfig(level=os.environ.get("MEMSERVE_LOG", "WARNING"), format="%(name)s: %(message)s")
    told = sys.stdin.buffer.read()
    if not told:
        return 0
    try:
        settings = msgspec.json.decode(told, type=InstanceSettings)
    except msgspec.MsgspecError as error:
        print(f"memserve instance: bad settings on standard input: {error}", file=sys.stderr)
        return 2
    try:
        uvloop.run(_run(settings))
    except MemServeError as error:
        log.info("%s stopped: %s", settings.instance, error)
        return 1
    except Exception:
        log.exception("%s stopped because of a bug", settings.instance)
        return 1
    return 0


async def _run(settings: InstanceSettings) -> None:
    instance = Instance(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, instance.leave)
    await instance.run()


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, however suddenly."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(run_from_stdin())

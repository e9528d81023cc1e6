"""What is benchmarked: an endpoint that runs, or a configuration of ours that is started for each round."""

from __future__ import annotations

import asyncio
import ctypes
import shlex
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from memserve.bench.configurations import CONFIGURATIONS
from memserve.core.errors import ConfigError, NoInstance

START_SECONDS = 300.0
STOP_SECONDS = 20.0
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_READY = "Ready at "
_SERVE = (sys.executable, "-m", "memserve.cli", "serve", "--port", "0")


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint at ``url``, or, without one, ``memserve serve`` with ``options``."""

    name: str
    url: str | None = None
    options: tuple[str, ...] = ()


def parse_urls(text: str) -> tuple[Target, ...]:
    """``URL`` or ``name=URL,name2=URL2``. Raises ``ConfigError``."""
    targets = []
    for part in _split(text, "--url"):
        name, equals, url = part.partition("=")
        if not equals or "/" in name:
            name, url = part.split("://")[-1], part
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {part!r}; accepted: http://HOST:PORT, or NAME=http://HOST:PORT")
        targets.append(Target(name, url))
    return _distinct(targets, "--url")


def parse_configurations(text: str, common: str) -> tuple[Target, ...]:
    """Names of ``CONFIGURATIONS``, or ``name=options of serve``; ``common`` is added to each."""
    more = _split_options(common, "--serve")
    targets = []
    for part in _split(text, "--compare"):
        name, equals, own = part.partition("=")
        if equals:
            options = _split_options(own, f"--compare {name}")
        elif name in CONFIGURATIONS:
            options = CONFIGURATIONS[name]
        else:
            raise ConfigError(
                f"--compare {name!r} is no configuration; accepted: {', '.join(CONFIGURATIONS)}, or your own "
                "as NAME=OPTIONS OF SERVE"
            )
        targets.append(Target(name, None, (*options, *more)))
    return _distinct(targets, "--compare")


@asynccontextmanager
async def open_target(target: Target, stop: asyncio.Event) -> AsyncIterator[str | None]:
    """The address of ``target``; it is started and ended if it is ours.

    None if ``stop`` was set before it was ready. Raises ``NoInstance`` if it does not come up.
    """
    if target.url is not None:
        yield target.url
        return
    # In a session of its own, so that Ctrl-C reaches it only through us.
    process = await asyncio.create_subprocess_exec(
        *_SERVE,
        *target.options,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    child = _Child(process, target.name)
    try:
        yield await child.wait_ready(stop)
    finally:
        await child.end()


def _end_with_parent() -> None:
    """In the child: be told to end when the benchmark is killed and cannot say so itself."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


class _Child:
    """A ``memserve serve`` process and the last lines it printed."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name
        self._lines: deque[str] = deque(maxlen=20)
        self._url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())

    async def wait_ready(self, stop: asyncio.Event) -> str | None:
        """Its address, or None if ``stop`` was set before."""
        stopping = asyncio.create_task(stop.wait())
        waiting: tuple[asyncio.Future[object], ...] = (self._url, self._reading, stopping)  # type: ignore[assignment]
        await asyncio.wait(waiting, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if self._url.done():
            return self._url.result()
        if stop.is_set():
            return None
        if self._reading.done():
            said = self._lines[-1].removeprefix("memserve: ") if self._lines else "it said nothing"
            raise NoInstance(f"{self._name} did not come up: {said}")
        raise NoInstance(f"{self._name} was not ready within {START_SECONDS:g} s")

    async def end(self) -> None:
        """End it politely, then not."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            text = line.decode(errors="replace").rstrip()
            self._lines.append(text)
            if text.startswith(_READY) and not self._url.done():
                self._url.set_result(text.removeprefix(_READY).split()[0])


def _split(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(
            f"{option} {text!r} has an empty entry; accepted: entries separated by single commas"
        )
    return parts


def _split_options(text: str, option: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} cannot be read: {error}") from error


def _distinct(targets: Sequence[Target], option: str) -> tuple[Target, ...]:
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise ConfigError(f"{option} names {', '.join(names)}; accepted: every name once")
    return tuple(targets)

"""A driver process from the outside: start it, ask it with a deadline, end it. Knows no engine.

It gets a session of its own, so that all it starts can be counted, and ended, with it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from peers.protocol import Answer, Failed, ProtocolError, Quit, Request, decode, encode

QUIT_SECONDS = 20.0
_LOG_TAIL = 4096
_TICKS = os.sysconf("SC_CLK_TCK")


class DriverError(Exception):
    """The driver died, fell silent or talked nonsense, and is gone; the text says which."""


class EngineRefused(Exception):
    """The engine said why it does not do what was asked; it can be asked something else."""


class Driver:
    """One engine's process. Not thread-safe.

    ``command`` speaks the protocol on its standard streams; what it prints elsewhere goes to ``log``.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._begun = time.monotonic()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None, "standard input is a pipe"
        assert answers is not None, "standard output is a pipe"
        self._requests, self._answers = requests, answers
        os.set_blocking(self._answers.fileno(), False)
        self._buffer = b""

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def age(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._begun

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Request, seconds: float) -> Answer:
        """The answer to ``request``.

        Raises ``EngineRefused`` if the engine says no, ``DriverError`` if nothing sensible came within
        ``seconds``, in which case the process has been ended.
        """
        if self._requests.closed:
            raise DriverError("the process has been ended")
        try:
            self._requests.write(encode(request))
            self._requests.flush()
            answer = decode(self._read_line(time.monotonic() + seconds))
        except (OSError, EOFError, ProtocolError, TimeoutError) as error:
            raise DriverError(self._end_with(error, request, seconds)) from error
        if isinstance(answer, Failed):
            raise EngineRefused(answer.reason)
        if not isinstance(answer, Answer):
            text = f"answered {type(request).__name__} with {type(answer).__name__}"
            self._kill()
            raise DriverError(text)
        return answer

    def _read_line(self, deadline: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                more = self._answers.read(65536)
                if not more:
                    raise EOFError
                self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _end_with(self, error: Exception, request: Request, seconds: float) -> str:
        """End the process and say what happened to it."""
        asked = type(request).__name__.lower()
        if isinstance(error, TimeoutError):
            self._kill()
            return f"no answer to {asked} within {seconds:.0f} s"
        if isinstance(error, ProtocolError):
            self._kill()
            return str(error)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(QUIT_SECONDS)
        code = self._process.poll()
        self._kill()
        return f"{_describe_exit(code)} during {asked}{self._last_words()}"

    def _last_words(self) -> str:
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _LOG_TAIL))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        said = [line for line in lines if line]
        return f": {said[-1][:200]}" if said else ""

    def close(self) -> None:
        """Ask the process to quit, and end it with all that it started if it does not."""
        if self.alive:
            with contextlib.suppress(OSError):
                self._requests.write(encode(Quit()))
                self._requests.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(QUIT_SECONDS)
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()

    def resident_bytes(self) -> int:
        """Memory of the process and all that it started, shared pages divided among those who share them."""
        return sum(_proportional_bytes(pid) for pid in _session_members(self._process.pid))

    def processor_seconds(self) -> float:
        """Processor time that the process and all that it started have used so far."""
        return sum(_processor_seconds(pid) for pid in _session_members(self._process.pid))


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "closed its output"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _session_members(session: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _stat_fields(int(entry.name))[3:4] == [str(session)]:
            yield int(entry.name)


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; none if there is no such process any more."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def _processor_seconds(pid: int) -> float:
    fields = _stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

"""What a machine offers to MemServe: facts, read from the kernel, and what follows from them.

``root`` stands for ``/`` so that tests can show any machine.
"""

from __future__ import annotations

import enum
import importlib.util
import os
import resource
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from memserve.cli.sizes import show_size
from memserve.cluster.host import available_memory, count_cores
from memserve.core.config import Config
from memserve.core.errors import ModelError

_WEIGHTS_ROOM = 1 << 30
"""Bytes that weights and buffers of the default model may take in each instance."""
_EXTRAS = (("huggingface_hub", "hub", "models by hub id"),)


class Verdict(enum.Enum):
    """How good a fact is: fine, usable with less, or serving is impossible."""

    GOOD = "ok"
    LESS = "note"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line for people; ``remedy`` says what would make it better."""

    subject: str
    text: str
    verdict: Verdict = Verdict.GOOD
    remedy: str = ""


def examine_machine(config: Config, root: Path = Path("/")) -> Iterator[Finding]:
    """Everything that matters for serving with ``config`` on this machine, in order."""
    yield check_cores(root)
    yield check_memory(config, root)
    yield check_kernels()
    yield check_shared_memory()
    yield check_sockets()
    yield check_child_watching()
    yield check_locked_memory()
    yield check_port(config)
    yield check_model(config)
    yield from check_extras()


def check_cores(root: Path) -> Finding:
    """Cores against the instances of the default start."""
    cores = count_cores(root)
    if cores < 2:
        text = f"{cores}; prefill and decode would share it"
        return Finding("cores", text, Verdict.LESS, "memserve serve --colocated 1 suits one core better")
    return Finding("cores", f"{cores}; by default 1 prefill and 1 decode, {cores // 2} thread(s) each")


def check_memory(config: Config, root: Path) -> Finding:
    """Memory against the KV arenas and the weights."""
    instances = config.cluster.prefill + config.cluster.decode + config.cluster.colocated
    needed = instances * (config.pool.memory + config.pool.host_memory + _WEIGHTS_ROOM)
    free = available_memory(root)
    if free is None:
        return Finding("memory", "unknown: /proc/meminfo cannot be read", Verdict.LESS)
    arena = show_size(config.pool.memory)
    text = f"{show_size(free)} available; {instances} instances of {arena} KV each, plus weights"
    if free < needed:
        return Finding("memory", text, Verdict.LESS, "give less with memserve serve --kv-memory 256MiB")
    return Finding("memory", text)


def check_kernels() -> Finding:
    """The native module and the instruction sets it has kernels for."""
    try:
        from memserve import _native
    except ImportError as error:
        remedy = "install MemServe again with a C++17 compiler; until then: memserve serve --runner reference"
        return Finding(
            "kernels", f"not built ({error}); only the slow reference runner", Verdict.LESS, remedy
        )
    levels = ", ".join(_native.supported_isas())
    return Finding("kernels", f"{_native.isa()} will be used, of {levels}")


def check_shared_memory() -> Finding:
    """Memory that two processes can map, which KV blocks live in."""
    problem = _problem_of(_use_memfd)
    if problem:
        return Finding("shared memory", f"memfd fails: {problem}", Verdict.BAD, "allow memfd_create here")
    return Finding("shared memory", "memfd works; no /dev/shm is needed")


def check_sockets() -> Finding:
    """Abstract Unix sockets, which processes of a machine talk over."""
    problem = _problem_of(_use_abstract_socket)
    if problem:
        text = f"abstract Unix sockets fail: {problem}"
        return Finding("sockets", text, Verdict.BAD, "allow AF_UNIX sockets here")
    return Finding("sockets", "abstract Unix sockets work")


def check_child_watching() -> Finding:
    """Pidfds, which tell of a child's end at once."""
    problem = _problem_of(_use_pidfd)
    if problem:
        text = f"pidfd fails: {problem}"
        return Finding("child watching", text, Verdict.BAD, "use Linux 5.4 or newer, or allow pidfd_open")
    return Finding("child watching", "pidfd works; a dead instance is noticed at once")


def check_locked_memory() -> Finding:
    """How much memory may be pinned; nothing needs it yet."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else show_size(soft)
    return Finding("locked memory", f"{shown} (RLIMIT_MEMLOCK); none is needed on one machine")


def check_port(config: Config) -> Finding:
    """Whether the server could listen where it would by default."""
    where = f"{config.server.host}:{config.server.port}"
    try:
        socket.create_server((config.server.host, config.server.port)).close()
    except OSError as error:
        remedy = "is a server running already? memserve status tells; else memserve serve --port 0"
        return Finding("port", f"{where} cannot be listened on: {error.strerror}", Verdict.LESS, remedy)
    return Finding("port", f"{where} is free")


def check_model(config: Config) -> Finding:
    """Whether the default model's weights are here."""
    from memserve.engine.models.resolve import resolve_model

    try:
        path = resolve_model(config.model.model)
    except ModelError as error:
        return Finding("model", str(error), Verdict.LESS, "or name another: memserve serve --model FILE.gguf")
    return Finding("model", f"{config.model.model}: {path.name}, {show_size(path.stat().st_size)}")


def check_extras() -> Iterator[Finding]:
    """Optional packages."""
    for module, extra, purpose in _EXTRAS:
        if importlib.util.find_spec(module) is None:
            remedy = f"pip install 'memserve[{extra}]'"
            yield Finding(f"extra {extra}", f"not installed: {purpose}", Verdict.LESS, remedy)
        else:
            yield Finding(f"extra {extra}", f"installed: {purpose}")


def _problem_of(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except (OSError, AttributeError) as error:
        return str(error) or type(error).__name__
    return ""


def _use_memfd() -> None:
    descriptor = os.memfd_create("memserve-doctor")
    try:
        os.ftruncate(descriptor, 1 << 20)
        os.pwrite(descriptor, b"x", (1 << 20) - 1)
    finally:
        os.close(descriptor)


def _use_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(f"\0memserve-doctor-{secrets.token_hex(8)}")
        listening.listen(1)


def _use_pidfd() -> None:
    descriptor = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(descriptor, 0)
    finally:
        os.close(descriptor)

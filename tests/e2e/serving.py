"""Starts the real thing for tests: ``memserve serve`` as a user would, on a free port, and ends it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI

START_SECONDS = 120
STOP_SECONDS = 20


@dataclass
class Served:
    """A running server; ``lines`` is what it has printed."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def instances(self) -> dict[str, Any]:
        return {entry["instance"]: entry for entry in self.get("/v1/cluster")["instances"]}

    def wait_idle(self) -> dict[str, Any]:
        """Wait until no request holds anything, and return the instances as they are then."""

        def idle() -> bool:
            return all(held(entry) == 0 for entry in self.instances().values() if entry["state"] == "ready")

        wait_for(idle, "blocks are still held")
        return self.instances()

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)


def held(entry: dict[str, Any]) -> int:
    """What requests hold on an instance: blocks in use and requests queued."""
    blocks = entry["blocks"]
    return int(blocks["active"] + blocks["incoming"] + entry["waiting"] + entry["running"])


def wait_for(condition: Callable[[], bool], complaint: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    """Run ``memserve serve`` with ``arguments`` until the block ends; kills it if the test did not end it.

    Without a policy among them requests go by roles: where ``cost`` sends one depends on how fast it is.
    """
    always = ("--port", "0", "--policy", "prompt-tree")
    command = [sys.executable, "-m", "memserve.cli", "serve", *always, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    found = threading.Event()
    reader = threading.Thread(target=_read, args=(process, lines, found), daemon=True)
    reader.start()
    try:
        assert found.wait(START_SECONDS), f"not ready in time: {lines}"
        url = next((m[0] for m in map(_URL.search, lines) if m), None)
        assert url is not None, f"ended before it was ready: {lines}"
        yield Served(process, url, lines)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        reader.join(STOP_SECONDS)
    # Instances check their pools when they stop; a leaked block or any other bug shows up as a traceback.
    bad = ("Traceback", "because of a bug", "leaked")
    assert not [line for line in lines if any(word in line for word in bad)], lines


_URL = re.compile(r"http://127\.0\.0\.1:\d+")


def _read(process: subprocess.Popen[str], lines: list[str], found: threading.Event) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if _URL.search(line):
            found.set()
    found.set()
    process.stdout.close()

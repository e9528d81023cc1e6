"""Start-up and memory of ``memserve serve``: without a cache of packed weights, at its first start, later.

Every round starts each arrangement (colocated; one prefill and one decode instance) three times: cache off,
cache empty, cache filled. Time is from starting the command to its ready line; beside it stands the processor
time that all processes took until then, which other load on the machine changes little. Memory is what
instances hold after one request, by what it is: weights that are mapped from the cache, KV arena, all else
(which contains the weights where there is no cache); in full (resident) and shared out between the processes
that use it (proportional).

Python's bytecode is kept in a folder of the benchmark's own and filled before the first round, as any
installation's is after its first start.

    python benchmarks/start_up.py [--rounds N] [--model M] [--kv-memory SIZE] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recording import summarise, write_result

ARRANGEMENTS = {"colocated": ["--colocated", "1"], "1P1D": ["--prefill", "1", "--decode", "1"]}
CACHES = ("off", "first", "second")
PATIENCE = 300
_URL = re.compile(r"http://127\.0\.0\.1:\d+")
_TICK = os.sysconf("SC_CLK_TCK")
_KINDS = {"weights": ".packed", "arena": "memfd:"}


@dataclass
class Start:
    """One start: seconds to ready, processor seconds until then, and bytes per instance afterwards."""

    seconds: float
    processor: float
    memory: list[dict[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv-memory", default="256MiB")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    common = ["--model", options.model, "--kv-memory", options.kv_memory]
    starts: dict[str, list[Start]] = {}
    with tempfile.TemporaryDirectory(prefix="memserve-start-") as folder:
        measure([*common, *ARRANGEMENTS["1P1D"]], "off", Path(folder))
        for _ in range(options.rounds):
            run_round(common, Path(folder), starts)
    figures = {name: describe(found) for name, found in starts.items()}
    path = write_result(
        "start_up", {"options": vars(options) | {"output": None}, "starts": figures}, options.output
    )
    print(path)


def run_round(common: Sequence[str], folder: Path, starts: dict[str, list[Start]]) -> None:
    """Every arrangement with every cache, once."""
    for name, arguments in ARRANGEMENTS.items():
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            for state in CACHES:
                start = measure([*common, *arguments], "off" if state == "off" else cache, folder)
                starts.setdefault(f"{name}, cache {state}", []).append(start)
                print(f"{name:10} cache {state:6} {start.seconds:6.2f} s, processor {start.processor:5.2f} s")


def measure(arguments: Sequence[str], cache: str, folder: Path) -> Start:
    """Start, wait for the ready line, ask once, look at the memory, stop."""
    begun = time.perf_counter()
    with serving([*arguments, "--weights-cache", cache], folder) as (process, url):
        seconds = time.perf_counter() - begun
        processor = sum(processor_time(pid) for pid in [process.pid, *children_of(process.pid)])
        ask(url)
        memory = [memory_of(pid) for pid in children_of(process.pid)]
    return Start(seconds, processor, memory)


@contextmanager
def serving(arguments: Sequence[str], folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that has just said that it is ready, and its address."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "memserve.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert process.stdout is not None
        found = _URL.search(process.stdout.readline())
        assert found, "ended before it was ready"
        yield process, found[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)


def ask(url: str) -> None:
    """A prompt and a few tokens, so that everything has been used once."""
    body = {"model": "smollm2-135m", "prompt": "The sea is " * 200, "max_tokens": 16}
    with urllib.request.urlopen(url + "/v1/models", timeout=PATIENCE) as answer:
        body["model"] = json.load(answer)["data"][0]["id"]
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=PATIENCE).read()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def processor_time(pid: int) -> float:
    """Seconds of processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def memory_of(pid: int) -> dict[str, int]:
    """Bytes resident and proportional, by kind of mapping."""
    memory = dict.fromkeys([f"{kind}_{way}" for kind in (*_KINDS, "other") for way in ("rss", "pss")], 0)
    kind = "other"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss"):
            memory[f"{kind}_{name.lower()}"] += int(rest.split()[0]) << 10
        elif "-" in name.split(" ")[0]:
            kind = next((kind for kind, mark in _KINDS.items() if mark in line), "other")
    return memory


def describe(starts: Sequence[Start]) -> dict[str, object]:
    memory = [one for start in starts for one in start.memory]
    kinds = {kind: int(statistics.median(one[kind] for one in memory)) for kind in memory[0]}
    return {
        "seconds": summarise([start.seconds for start in starts]),
        "processor_seconds": summarise([start.processor for start in starts]),
        "instance_bytes": kinds,
    }


if __name__ == "__main__":
    main()

"""A process is killed while it swaps to disk: the next one starts, and finds only what is right."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from . import swapping_process as swapping

pytestmark = pytest.mark.processes

DEADLINE = 60.0
SCRIPT = Path(swapping.__file__)


def swap_until_killed(path: Path, prompts: int, delay: float) -> None:
    """Run a swapping process and kill it ``delay`` seconds after its ``prompts``-th prompt."""
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(DEADLINE, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            for _ in range(prompts):
                assert process.stdout.readline(), "the process ended by itself"
            # Where in its writing it dies is up to chance: that is the point.
            threading.Event().wait(delay)
            assert process.poll() is None
        finally:
            process.kill()
            watchdog.cancel()


@pytest.mark.parametrize("seed", range(6))
def test_killed_while_swapping_out(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    found = 0
    for life in range(2):
        swap_until_killed(tmp_path, prompts=chance.randint(10, 40), delay=chance.uniform(0, 0.01))
        pool = swapping.open_pool(tmp_path, incarnation=life + 2)
        pool.check(())
        for number in chance.sample(range(16), 16):
            found += swapping.serve(pool, swapping.prompt(number))
        pool.check(())
        pool.close()
    assert found > 0


def test_a_clean_stop_loses_nothing_that_fits(tmp_path: Path) -> None:
    pool = swapping.open_pool(tmp_path, incarnation=1)
    for number in range(8):
        swapping.serve(pool, swapping.prompt(number))
    distinct = len(pool._index.all_blocks())
    assert distinct == 8 * (swapping.PROMPT_BLOCKS - 1) + 2
    pool.persist()
    pool.close()
    pool = swapping.open_pool(tmp_path, incarnation=2)
    assert pool.stats().disk.historical == distinct
    assert all(swapping.serve(pool, swapping.prompt(number)) == swapping.PROMPT_BLOCKS for number in range(8))
    assert pool.stats().corrupt_blocks == 0
    pool.check(())
    pool.close()


def test_damage_anywhere_is_never_served(tmp_path: Path) -> None:
    pool = swapping.open_pool(tmp_path, incarnation=1)
    for number in range(8):
        swapping.serve(pool, swapping.prompt(number))
    pool.persist()
    pool.close()
    (segment,) = tmp_path.glob("*.kv")
    whole, chance = segment.read_bytes(), random.Random(1)
    for life in range(20):
        damaged = bytearray(whole)
        for _ in range(10):
            at = chance.randrange(len(damaged))
            damaged[at : at + 3] = chance.randbytes(3)
        segment.write_bytes(damaged[: chance.randrange(len(damaged) // 2, len(damaged) + 1)])
        pool = swapping.open_pool(tmp_path, incarnation=life + 2)
        for number in range(8):
            swapping.serve(pool, swapping.prompt(number))
        pool.check(())
        pool.close()


def test_the_example_finds_all_again() -> None:
    example = Path(__file__).resolve().parents[3] / "examples" / "disk_restart.py"
    ran = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    assert ran.stdout.count("4 of 4 blocks found, on disk") == 4

"""The disk tier's files: what is whole comes back, whatever else lies there does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import ConfigError
from memserve.core.types import InstanceId, Namespace
from memserve.mempool import DiskTier, KVLayout, MemPool, Tier
from memserve.mempool.disk_record import HEADER_BYTES, Record, decode_header, encode_header, root_key

from .conftest import LAYOUT, prompt

NS = Namespace("m", salt="s")
PLACE_BYTES = HEADER_BYTES + 4096
HEADER_END = len(encode_header(Record(NS, bytes(32), bytes(16), 0, 0, 0), LAYOUT.fingerprint).rstrip(b"\0"))  # type: ignore[union-attr]


def open_pool(path: Path, *, device: int = 8, disk: int = 8, layout: KVLayout = LAYOUT) -> MemPool:
    tier = DiskTier(path, disk)
    return MemPool(layout, device, instance=InstanceId("a"), incarnation=1, clock=VirtualClock(), disk=tier)


def store(pool: MemPool, *blocks: int, namespace: Namespace = NS) -> None:
    with pool.match(prompt(*blocks), namespace) as match:
        found = pool.swap_in(match.addrs)
    addrs = found.concat(pool.alloc_mem(len(blocks) - len(found)))
    for number, value in zip(addrs.blocks, blocks, strict=True):
        pool.arena.block_memory(int(number))[:] = value
    pool.insert(prompt(*blocks), addrs, namespace)
    pool.free_mem(addrs)


def read(pool: MemPool, *blocks: int, namespace: Namespace = NS) -> list[int]:
    """The values of what is found, which must be those that were stored."""
    with pool.match(prompt(*blocks), namespace) as match:
        addrs = pool.swap_in(match.addrs)
    memory = [pool.arena.block_memory(int(number)) for number in addrs.blocks]
    pool.free_mem(addrs)
    pool.check(())
    assert all(len(set(block.tolist())) == 1 for block in memory)
    values = [int(block[0]) for block in memory]
    assert values == list(blocks[: len(values)])
    return values


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A directory with the prompt 1, 2, 3 in its first places."""
    pool = open_pool(tmp_path)
    store(pool, 1, 2, 3)
    assert pool.persist() == 3
    pool.close()
    return tmp_path


def segment(path: Path) -> Path:
    (found,) = path.glob("*.kv")
    return found


def test_a_restart_finds_what_was_persisted(written: Path) -> None:
    pool = open_pool(written)
    assert len(pool.snapshot().paths) == 1
    with pool.match(prompt(1, 2, 3), NS) as match:
        assert match.tiers.tolist() == [Tier.DISK] * 3
    assert read(pool, 1, 2, 3) == [1, 2, 3]
    assert read(pool, 1, 2, 3, namespace=Namespace("m", salt="other")) == []
    pool.close()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "offset",
    [
        *(0, 7, 8, 23, 24, 31, 32, 40, 71, 72, 73, 80, 81, HEADER_END - 17, HEADER_END - 1),
        *(HEADER_BYTES, HEADER_BYTES + LAYOUT.block_bytes - 1),
    ],
)
def test_a_flipped_byte_costs_its_block_and_what_continues_it(written: Path, place: int, offset: int) -> None:
    with segment(written).open("r+b") as file:
        file.seek(place * PLACE_BYTES + offset)
        value = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([value ^ 0x10]))
    pool = open_pool(written)
    good = read(pool, 1, 2, 3)
    lost = [1, 2, 3][len(good)]
    assert segment(written).read_bytes()[place * PLACE_BYTES + HEADER_BYTES] in (lost, lost ^ 0x10)
    assert pool.stats().corrupt_blocks == (offset >= HEADER_BYTES)
    store(pool, 1, 2, 3)
    assert read(pool, 1, 2, 3) == [1, 2, 3]
    pool.close()


def test_a_file_cut_anywhere_starts_and_serves_what_is_whole(written: Path) -> None:
    whole = segment(written).read_bytes()
    cuts = [at for place in range(4) for at in _interesting(place * PLACE_BYTES)]
    for cut in [0, *cuts]:
        segment(written).write_bytes(whole[:cut])
        pool = open_pool(written)
        good = read(pool, 1, 2, 3)
        pool.close()
        assert len(good) <= 3
        if cut >= 3 * PLACE_BYTES:
            assert good == [1, 2, 3]


def _interesting(start: int) -> list[int]:
    end = HEADER_BYTES + LAYOUT.block_bytes
    return [start + at for at in (1, 8, 80, HEADER_END - 1, HEADER_END, HEADER_BYTES, end - 1, end)]


def test_a_write_that_stopped_anywhere_leaves_the_old_or_nothing(tmp_path: Path) -> None:
    """A place is written over: whatever part of it arrived, no wrong byte is served."""
    pool = open_pool(tmp_path, disk=1)
    store(pool, 1)
    pool.persist()
    before = segment(tmp_path).read_bytes()
    store(pool, 2)
    pool.persist()
    pool.close()
    after = segment(tmp_path).read_bytes()
    stops = [*range(HEADER_END + 1), *range(HEADER_BYTES, HEADER_BYTES + LAYOUT.block_bytes + 1)]
    for stop in stops:
        segment(tmp_path).write_bytes(after[:stop] + before[stop:])
        pool = open_pool(tmp_path, disk=1)
        found = read(pool, 1) + read(pool, 2)
        pool.close()
        assert len(found) <= 1
        assert found == ([1] if stop == 0 else [2] if stop == stops[-1] else found)


def test_what_lost_its_prefix_waits_for_it(tmp_path: Path) -> None:
    """The hot beginning of a prompt dies with the process; its end is found again once it is recomputed."""
    pool = open_pool(tmp_path)
    store(pool, 1, 2, 3, 4)
    assert pool.swap_out(2) == 2
    pool.close()
    pool = open_pool(tmp_path)
    assert read(pool, 1, 2, 3, 4) == []
    assert pool.stats().disk.free == 8
    store(pool, 1)
    assert read(pool, 1, 2, 3, 4) == [1]
    store(pool, 1, 2)
    assert read(pool, 1, 2, 3, 4) == [1, 2, 3, 4]
    pool.close()


def test_places_of_what_waits_are_used_last(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, disk=4)
    store(pool, 1, 2, 3)
    pool.swap_out(2)
    pool.close()
    pool = open_pool(tmp_path, disk=4)
    store(pool, 7, 8)
    pool.persist()
    store(pool, 1)
    assert read(pool, 1, 2, 3) == [1, 2, 3]
    pool.close()


@pytest.mark.parametrize("freed", [False, True])
def test_what_waits_is_forgotten_when_its_place_is_needed(tmp_path: Path, freed: bool) -> None:
    pool = open_pool(tmp_path, disk=2)
    store(pool, 1, 2, 3)
    pool.swap_out(2)
    pool.close()
    pool = open_pool(tmp_path, disk=2)
    store(pool, 7, 8)
    pool.persist()
    if freed:
        assert read(pool, 7, 8) == [7, 8]
    store(pool, 1)
    assert read(pool, 1, 2, 3) == [1]
    assert read(pool, 7, 8) == [7, 8]
    pool.close()


@pytest.mark.parametrize("orphaned", [False, True])
def test_what_was_deleted_does_not_come_back(tmp_path: Path, orphaned: bool) -> None:
    pool = open_pool(tmp_path)
    store(pool, 1, 2, 3)
    pool.swap_out(1)
    if orphaned:
        pool.close()
        pool = open_pool(tmp_path)
    pool.delete(prompt(1, 2), NS)
    pool.close()
    pool = open_pool(tmp_path)
    store(pool, 1, 2)
    assert read(pool, 1, 2, 3) == [1, 2]
    pool.close()


@pytest.mark.parametrize(
    "other",
    [
        KVLayout("other model", layers=1, kv_heads=1, head_dim=2, block_tokens=4),
        KVLayout("tiny", layers=1, kv_heads=1, head_dim=2, block_tokens=4, dtype="int8"),
    ],
)
def test_another_layout_finds_nothing(written: Path, other: KVLayout) -> None:
    pool = open_pool(written, layout=other)
    assert read(pool, 1, 2, 3) == []
    pool.close()
    pool = open_pool(written)
    assert read(pool, 1, 2, 3) == [1, 2, 3]
    pool.close()


def test_one_pool_per_directory(written: Path) -> None:
    pool = open_pool(written)
    with pytest.raises(ConfigError, match="directory of its own"):
        open_pool(written)
    pool.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another directory"):
        open_pool(tmp_path / "file")


def test_names_too_long_for_a_header_stay_off_the_disk(tmp_path: Path) -> None:
    pool = open_pool(tmp_path)
    long = Namespace("m", salt="x" * HEADER_BYTES)
    store(pool, 1, namespace=long)
    assert pool.persist() == 0
    assert (pool.stats().evicted_blocks, pool.stats().disk.free) == (1, 8)
    pool.close()


def test_headers_explain_themselves() -> None:
    record = Record(
        NS, root_key(LAYOUT.fingerprint, NS), np.arange(4, dtype="<i4").tobytes(), 2, 2**64 - 1, 7
    )
    raw = encode_header(record, LAYOUT.fingerprint)
    assert raw is not None
    assert decode_header(raw, LAYOUT.fingerprint, 4) == record
    assert decode_header(raw, "0" * 32, 4) is None
    assert decode_header(raw, LAYOUT.fingerprint, 8) is None
    assert decode_header(raw[:100], LAYOUT.fingerprint, 4) is None
    for at in range(len(raw.rstrip(b"\0"))):
        broken = bytearray(raw)
        broken[at] ^= 1
        assert decode_header(bytes(broken), LAYOUT.fingerprint, 4) is None

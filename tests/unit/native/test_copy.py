"""Block copy and checksum against a numpy re-implementation, on every level this machine runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from memserve import _native

ROW = 256
SEED = np.uint64(0x9E3779B97F4A7C15)
PRIME = np.uint64(0xC2B2AE3D27D4EB4F)
SIZES = [0, 1, 7, 8, 63, 64, 255, 256, 257, 1000, 4096, 6144, 368_640]

Bytes = NDArray[np.uint8]


def mix(lanes: NDArray[np.uint64], words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = lanes ^ words
    return ((x << np.uint64(29)) | (x >> np.uint64(35))) * PRIME


def oracle(piece: Bytes) -> int:
    """The definition in native/copy.h, word by word."""
    padded = np.zeros(-(-piece.size // ROW) * ROW, np.uint8)
    padded[: piece.size] = piece
    lanes = np.arange(1, 33, dtype=np.uint64) * SEED
    for row in padded.view("<u8").reshape(-1, 32):
        lanes = mix(lanes, row)
    fold = np.array([piece.size], np.uint64)
    for lane in lanes:
        fold = mix(fold, np.array([lane]))
    fold ^= fold >> np.uint64(32)
    fold *= PRIME
    fold ^= fold >> np.uint64(29)
    return int(fold[0])


@pytest.fixture(params=[*_native.supported_isas(), *_native.emulated_isas()])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def addresses(pieces: list[Bytes]) -> NDArray[np.uint64]:
    return np.array([piece.ctypes.data for piece in pieces], np.uint64)


def random_bytes(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_copy_gives_the_bytes_and_their_checksum(isa: str, size: int) -> None:
    sources = [random_bytes(size, seed) for seed in range(3)]
    targets = [np.full(size + 8, 0xEE, np.uint8) for _ in sources]
    checksums = _native.copy_blocks(addresses(targets), addresses(sources), size)
    for source, target, checksum in zip(sources, targets, checksums, strict=True):
        np.testing.assert_array_equal(target[:size], source)
        np.testing.assert_array_equal(target[size:], 0xEE)
        assert int(checksum) == oracle(source)


@pytest.mark.parametrize("size", SIZES)
def test_checksum_reads_only(isa: str, size: int) -> None:
    source = random_bytes(size)
    before = source.copy()
    (checksum,) = _native.checksum_blocks(addresses([source]), size)
    assert int(checksum) == oracle(source)
    np.testing.assert_array_equal(source, before)


@pytest.mark.parametrize("shift", [0, 1, 32, 64])
def test_large_copies_of_any_alignment(isa: str, shift: int) -> None:
    size = 300_000
    source = random_bytes(8 * size + 64)
    target = np.zeros_like(source)
    offsets = np.arange(8, dtype=np.uint64) * np.uint64(size) + np.uint64(shift % 64)
    start = np.uint64(source.ctypes.data), np.uint64(target.ctypes.data)
    checksums = _native.copy_blocks(start[1] + offsets, start[0] + offsets, size)
    np.testing.assert_array_equal(target[shift % 64 :][: 8 * size], source[shift % 64 :][: 8 * size])
    assert int(checksums[7]) == oracle(source[int(offsets[7]) :][:size])


def test_every_flipped_byte_and_bit_is_seen() -> None:
    piece = random_bytes(ROW * 3 + 40)
    seen = {oracle(piece)}
    for at, bit in itertools.product(range(piece.size), (0, 7)):
        piece[at] ^= 1 << bit
        (checksum,) = _native.checksum_blocks(addresses([piece]), piece.size)
        seen.add(int(checksum))
        piece[at] ^= 1 << bit
    assert len(seen) == 1 + 2 * piece.size


def test_order_and_length_matter() -> None:
    piece = random_bytes(4 * ROW)
    rows = piece.reshape(4, ROW)
    swapped_rows = np.ascontiguousarray(rows[[1, 0, 2, 3]]).reshape(-1)
    swapped_words = piece.view(np.uint64)[np.r_[1, 0, 2:128]].view(np.uint8)
    zeros = np.zeros(2 * ROW, np.uint8)
    variants = [
        (piece, 1024),
        (swapped_rows, 1024),
        (swapped_words, 1024),
        (zeros, 256),
        (zeros, 255),
        (zeros, 512),
    ]
    checksums = {int(_native.checksum_blocks(addresses([v]), n)[0]) for v, n in variants}
    assert len(checksums) == len(variants)


def test_sign_flips_of_two_numbers_do_not_cancel() -> None:
    """The top bit of a word is the weak spot of multiplicative hashes."""
    piece = random_bytes(4 * ROW)
    (before,) = _native.checksum_blocks(addresses([piece]), piece.size)
    piece[[7, ROW + 7]] ^= 0x80
    (after,) = _native.checksum_blocks(addresses([piece]), piece.size)
    assert before != after


def test_bad_arguments() -> None:
    none = np.zeros(0, np.uint64)
    assert _native.copy_blocks(none, none, 64).size == 0
    with pytest.raises(ValueError, match="1 addresses"):
        _native.copy_blocks(np.zeros(1, np.uint64), none, 64)
    with pytest.raises(ValueError, match="nbytes"):
        _native.checksum_blocks(none, -1)
    with pytest.raises(ValueError, match="no-such-isa"):
        _native.set_isa("no-such-isa")

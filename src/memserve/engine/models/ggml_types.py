"""Storage types of GGML tensors: how many bytes a block takes and how to expand blocks to float32.

The block formats are those of ggml (``ggml-common.h``); nothing here knows about files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_BLOCKS_AT_ONCE = 2048
"""Expanding this many blocks at a time keeps source, result and temporaries in the L2 cache."""


@dataclass(frozen=True, slots=True)
class GgmlType:
    """``values`` numbers are stored in ``size`` bytes.

    ``expand(blocks: uint8[n, size], out: float32[n, values])`` fills ``out``.
    """

    name: str
    values: int
    size: int
    expand: Callable[[Bytes, Float], None]

    def dequantize(self, raw: Bytes) -> Float:
        """Expand ``raw``: uint8[blocks * size] to float32[blocks * values]."""
        blocks = raw.reshape(-1, self.size)
        out = np.empty((len(blocks), self.values), np.float32)
        step = _BLOCKS_AT_ONCE * max(1, 32 // self.values)
        for start in range(0, len(blocks), step):
            self.expand(blocks[start : start + step], out[start : start + step])
        return out.reshape(-1)


def widen_bf16(raw: NDArray[np.uint16]) -> Float:
    """The float32 numbers whose upper halves are ``raw``; same shape."""
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _column(blocks: Bytes, start: int) -> Float:
    """float32[n, 1] of the float16 at byte ``start`` of each block."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _expand_f32(blocks: Bytes, out: Float) -> None:
    out[:] = np.ascontiguousarray(blocks).view("<f4")


def _expand_f16(blocks: Bytes, out: Float) -> None:
    out[:] = np.ascontiguousarray(blocks).view("<f2")


def _expand_bf16(blocks: Bytes, out: Float) -> None:
    out[:] = widen_bf16(np.ascontiguousarray(blocks).view("<u2"))


def _expand_q8_0(blocks: Bytes, out: Float) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= _column(blocks, 0)


def _split_nibbles(packed: Bytes, out: Float) -> None:
    """Low nibbles to the first half of each row of ``out``, high nibbles to the second."""
    half = packed.shape[1]
    out[:, :half] = packed & 15
    out[:, half:] = packed >> 4


def _expand_q4_0(blocks: Bytes, out: Float) -> None:
    _split_nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _column(blocks, 0)


def _expand_q4_1(blocks: Bytes, out: Float) -> None:
    _split_nibbles(blocks[:, 4:], out)
    out *= _column(blocks, 0)
    out += _column(blocks, 2)


def _expand_q4_k(blocks: Bytes, out: Float) -> None:
    # Eight groups of 32 values; scales and minima have six bits, spread over twelve bytes.
    low, mid, high = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1)
    groups = out.reshape(-1, 4, 2, 32)
    packed = blocks[:, 16:].reshape(-1, 4, 32)
    groups[:, :, 0] = packed & 15
    groups[:, :, 1] = packed >> 4
    groups *= (_column(blocks, 0) * scales).reshape(-1, 4, 2, 1)
    groups -= (_column(blocks, 2) * minima).reshape(-1, 4, 2, 1)


def _expand_q6_k(blocks: Bytes, out: Float) -> None:
    # Two halves of 128 values, each four groups of 32: four low bits from 64 bytes, two high from 32.
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    groups = out.reshape(-1, 2, 4, 32)
    for group in range(4):
        nibble = (low[:, :, group % 2] >> (4 * (group // 2))) & 15
        groups[:, :, group] = nibble | (((high >> (2 * group)) & 3) << 4)
    groups -= 32
    scales = _column(blocks, 208) * blocks[:, 192:208].view(np.int8)
    sixteenths = out.reshape(-1, 16, 16)
    sixteenths *= scales[:, :, None]


GGML_TYPES = {
    0: GgmlType("F32", 1, 4, _expand_f32),
    1: GgmlType("F16", 1, 2, _expand_f16),
    2: GgmlType("Q4_0", 32, 18, _expand_q4_0),
    3: GgmlType("Q4_1", 32, 20, _expand_q4_1),
    8: GgmlType("Q8_0", 32, 34, _expand_q8_0),
    12: GgmlType("Q4_K", 256, 144, _expand_q4_k),
    14: GgmlType("Q6_K", 256, 210, _expand_q6_k),
    30: GgmlType("BF16", 1, 2, _expand_bf16),
}
"""The supported types by their number in GGUF files."""

_UNSUPPORTED = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K"}


def describe_type(number: int) -> str:
    """A name for people of any type number, supported or not."""
    known = GGML_TYPES.get(number)
    return known.name if known else _UNSUPPORTED.get(number, f"number {number}")

"""Writes GGUF files, version 3, one tensor at a time: a model need not fit into memory."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memserve.engine.models.ggml_types import GGML_TYPES
from memserve.engine.models.gguf_file import Value

ALIGNMENT = 32
_U32, _FLOAT, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ARRAY_TYPES = {"int32": 5, "uint32": 4, "float32": 6, "uint8": 0, "int8": 1, "uint64": 10, "int64": 11}


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor of the GGML type ``type``; ``shape`` is row-major, ``read`` gives its bytes as any array."""

    name: str
    shape: tuple[int, ...]
    type: int
    read: Callable[[], NDArray[np.generic]]

    @property
    def size(self) -> int:
        kind = GGML_TYPES[self.type]
        return prod(self.shape) // kind.values * kind.size


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[TensorSource]) -> None:
    """Write a file. Whole numbers become uint32, others float32; lists are of strings or numpy arrays."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    head += [_string(key) + _value(value) for key, value in metadata.items()]
    at = 0
    for tensor in tensors:
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        head.append(_string(tensor.name) + dimensions + struct.pack("<IQ", tensor.type, at))
        at += _aligned(tensor.size)
    with path.open("wb") as file:
        file.write(_padded(b"".join(head)))
        for tensor in tensors:
            raw = np.ascontiguousarray(tensor.read()).tobytes()
            assert len(raw) == tensor.size, f"{tensor.name}: {len(raw)} bytes, {tensor.size} announced"
            file.write(_padded(raw))


def _value(value: Value) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _U32, value)
        case float():
            return struct.pack("<If", _FLOAT, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
        case list():
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    return struct.pack("<IIQ", _ARRAY, _ARRAY_TYPES[value.dtype.name], len(value)) + value.tobytes()


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _padded(raw: bytes) -> bytes:
    return raw + bytes(_aligned(len(raw)) - len(raw))

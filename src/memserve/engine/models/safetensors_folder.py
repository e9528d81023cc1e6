"""The safetensors container: one file, or shards behind an index. Knows nothing about models.

Read by hand from mapped files, because the library's numpy interface has no bfloat16.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import ModelError
from memserve.engine.models.ggml_types import widen_bf16
from memserve.engine.models.gguf_file import map_file, sample_bytes
from memserve.engine.models.spec import Float, Matrix

_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

Parsed = TypeVar("Parsed")


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class _Described(msgspec.Struct, frozen=True):
    """A tensor in a safetensors header; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Tensor:
    file: _File
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True, eq=False)
class _File:
    path: Path
    mapped: mmap.mmap
    header_end: int


class SafetensorsFolder:
    """All tensors of ``model.safetensors``, or of the files of ``model.safetensors.index.json``.

    Raises ``ModelError`` naming the file and the damage.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._tensors: dict[str, _Tensor] = {}
        self._files: list[_File] = []
        for path in _weight_files(folder):
            file, found = _read_file(path)
            self._files.append(file)
            for name, tensor in found.items():
                if name in self._tensors:
                    raise ModelError(f"{path}: tensor {name} is also in {self._tensors[name].file.path.name}")
                self._tensors[name] = tensor

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Row-major shape of a tensor, or None when the folder has no such tensor."""
        tensor = self._tensors.get(name)
        return tensor.shape if tensor else None

    def read(self, name: str) -> Float:
        """A tensor as a fresh float32 array."""
        tensor = self._tensors[name]
        raw: NDArray[Any] = np.frombuffer(
            tensor.file.mapped, _NUMPY_TYPES[tensor.dtype], math.prod(tensor.shape), tensor.start
        )
        values = widen_bf16(raw) if tensor.dtype == "BF16" else raw.astype(np.float32)
        return values.reshape(tensor.shape)

    def read_stored(self, name: str) -> Matrix:
        """As :meth:`read`: nothing here is stored in blocks."""
        return self.read(name)

    def fingerprint(self, config: bytes) -> str:
        """12 hex digits over ``config``, headers, sizes and sampled pages: fast, equal everywhere."""
        digest = hashlib.blake2b(config, digest_size=6)
        for file in self._files:
            digest.update(memoryview(file.mapped)[: file.header_end])
            sample_bytes(digest.update, file.mapped, file.header_end)
        return digest.hexdigest()


def parse_json(path: Path, raw: bytes, kind: type[Parsed]) -> Parsed:
    """Parse and check JSON; raises ``ModelError`` naming the file and the field."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """A small file's content; raises ``ModelError`` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ModelError(f"{folder}: has neither {single.name} nor {index.name}")
    shards = sorted(set(parse_json(index, read_bytes(index), _Index).weight_map.values()))
    for shard in shards:
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ModelError(f"{index}: {shard!r} is not the name of a safetensors file in this folder")
    return [folder / shard for shard in shards]


def _read_file(path: Path) -> tuple[_File, dict[str, _Tensor]]:
    mapped = map_file(path)
    length = int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or length > min(len(mapped) - 8, _MAX_HEADER):
        raise ModelError(f"{path}: not a safetensors file, or truncated inside its header")
    file = _File(path, mapped, 8 + length)
    header = parse_json(path, mapped[8 : 8 + length], dict[str, msgspec.Raw])
    header.pop("__metadata__", None)
    described = {name: parse_json(path, bytes(raw), _Described) for name, raw in header.items()}
    return file, {name: _check_tensor(file, name, tensor) for name, tensor in described.items()}


def _check_tensor(file: _File, name: str, tensor: _Described) -> _Tensor:
    begin, end = tensor.data_offsets
    if tensor.dtype not in _NUMPY_TYPES:
        raise ModelError(
            f"{file.path}: tensor {name} has type {tensor.dtype}, which is not supported "
            f"(supported: {', '.join(_NUMPY_TYPES)})"
        )
    size = math.prod(tensor.shape) * np.dtype(_NUMPY_TYPES[tensor.dtype]).itemsize
    if min(tensor.shape, default=1) < 0 or begin < 0 or end - begin != size:
        raise ModelError(f"{file.path}: tensor {name}: shape {tensor.shape} and offsets do not agree")
    if file.header_end + end > len(file.mapped):
        raise ModelError(
            f"{file.path}: truncated: tensor {name} ends at byte {file.header_end + end}, "
            f"the file has {len(file.mapped)}"
        )
    return _Tensor(file, tensor.dtype, tensor.shape, file.header_end + begin)

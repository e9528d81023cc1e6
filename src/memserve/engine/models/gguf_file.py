"""The GGUF container: header, metadata, tensor table, tensor bytes. Knows nothing about models.

Every length is checked against the file's size before it is used, so that a damaged file costs an error
and never memory or time. Format: ggml's ``docs/gguf.md``, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import ModelError
from memserve.engine.models.ggml_types import GGML_TYPES, Float, describe_type
from memserve.engine.models.spec import Matrix, StoredMatrix

Value = int | float | bool | str | list[str] | NDArray[np.generic]

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_MIN_ENTRY = 13
"""No metadata entry and no tensor description is shorter than this many bytes."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's place in the file. ``shape`` is row-major, outermost first; bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int


class GGUFFile:
    """A mapped GGUF file: ``metadata`` by key, ``tensors`` by name.

    Raises ``ModelError`` naming the file and the damage.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = map_file(path)
        cursor = _Cursor(path, self._map)
        tensor_count, metadata_count = _read_counts(cursor)
        self.metadata = _read_metadata(cursor, metadata_count)
        entries = [_read_entry(cursor) for _ in range(tensor_count)]
        self._header_end = cursor.at
        self.tensors = _place_tensors(path, entries, self._data_start(), len(self._map))

    def _data_start(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8 or alignment > 1 << 20:
            raise ModelError(f"{self.path}: general.alignment is {alignment!r}; expected a multiple of 8")
        return -(-self._header_end // alignment) * alignment

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Row-major shape of a tensor, or None when the file has no such tensor."""
        entry = self.tensors.get(name)
        return entry.shape if entry else None

    def read(self, name: str) -> Float:
        """A tensor as a fresh float32 array."""
        entry = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, entry.size, entry.start)
        return GGML_TYPES[entry.type].dequantize(raw).reshape(entry.shape)

    def read_stored(self, name: str) -> Matrix:
        """A matrix as it lies in the file, mapped; float32 where its type is no block of several weights."""
        entry = self.tensors[name]
        stored = GGML_TYPES[entry.type]
        if stored.values == 1:
            return self.read(name)
        raw = np.frombuffer(self._map, np.uint8, entry.size, entry.start)
        outputs, inputs = entry.shape
        return StoredMatrix(stored.name, raw.reshape(outputs, -1), inputs)

    def fingerprint(self) -> str:
        """12 hex digits over header, size and 64 sampled pages of the data: fast, equal everywhere."""
        digest = hashlib.blake2b(digest_size=6)
        digest.update(memoryview(self._map)[: self._header_end])
        sample_bytes(digest.update, self._map, self._header_end)
        return digest.hexdigest()


def sample_bytes(update: Callable[[bytes], None], mapped: mmap.mmap, start: int) -> None:
    """Feed a hash with the size and 64 evenly spaced 4 KiB pages of ``mapped[start:]``."""
    update(_U64.pack(len(mapped)))
    for page in range(64):
        at = start + (len(mapped) - start) * page // 64
        update(mapped[at : at + 4096])


def map_file(path: Path) -> mmap.mmap:
    """Map a file read-only; raises ``ModelError`` for what cannot be read, an empty file included."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


class _Cursor:
    """Reads values one after another; refuses to go beyond the end."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.at = 0
        self._map = mapped

    @property
    def remaining(self) -> int:
        return len(self._map) - self.at

    def fail(self, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {problem} (at byte {self.at})")

    def take(self, size: int, what: str) -> bytes:
        if size > self.remaining:
            raise self.fail(f"truncated: {what} needs {size} bytes, {self.remaining} are left")
        self.at += size
        return self._map[self.at - size : self.at]

    def scalar(self, kind: struct.Struct, what: str) -> int | float | bool:
        (value,) = kind.unpack(self.take(kind.size, what))
        assert isinstance(value, int | float)
        return value

    def u32(self, what: str) -> int:
        return int(self.scalar(_U32, what))

    def u64(self, what: str) -> int:
        return int(self.scalar(_U64, what))

    def string(self, what: str) -> str:
        raw = self.take(self.u64(f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not valid UTF-8: {error}") from error

    def value(self, key: str) -> Value:
        kind = self.u32(f"the type of {key}")
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        return self.scalar(self._scalar_kind(kind, key), key)

    def _scalar_kind(self, kind: int, key: str) -> struct.Struct:
        if kind not in _SCALARS:
            raise self.fail(f"{key} has unknown or nested value type {kind}")
        return _SCALARS[kind]

    def _array(self, key: str) -> list[str] | NDArray[np.generic]:
        kind, count = self.u32(f"the type of {key}"), self.u64(f"the length of {key}")
        if kind == _STRING:
            return self._strings(key, count)
        scalar = self._scalar_kind(kind, key)
        return np.frombuffer(self.take(count * scalar.size, key), np.dtype(scalar.format))

    def _strings(self, key: str, count: int) -> list[str]:
        # The hot loop of opening a file (100,000 strings): one bounds check for the sum of each string.
        if count * 8 > self.remaining:
            raise self.fail(f"truncated: {key} claims {count} strings, {self.remaining} bytes are left")
        mapped, at, end, length = self._map, self.at, len(self._map), _U64.unpack_from
        strings = []
        for _ in range(count):
            if at + 8 > end or (stop := at + 8 + length(mapped, at)[0]) > end:
                raise self.fail(f"truncated: {key} does not fit into the file")
            strings.append(mapped[at + 8 : stop])
            at = stop
        self.at = at
        try:
            return [raw.decode() for raw in strings]
        except UnicodeDecodeError as error:
            raise self.fail(f"{key} has an entry that is not valid UTF-8: {error}") from error


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.take(4, "the magic number")
    if magic != b"GGUF":
        raise ModelError(f"{cursor.path}: not a GGUF file (it starts with {magic!r} instead of b'GGUF')")
    version = cursor.u32("the version")
    if version not in (2, 3):
        raise ModelError(f"{cursor.path}: GGUF version {version} is not supported (2 and 3 are)")
    tensors, entries = cursor.u64("the tensor count"), cursor.u64("the metadata count")
    if (tensors + entries) * _MIN_ENTRY > cursor.remaining:
        raise cursor.fail(f"claims {tensors} tensors and {entries} metadata entries, too many for its size")
    return tensors, entries


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {key} appears twice")
        metadata[key] = cursor.value(key)
    return metadata


def _read_entry(cursor: _Cursor) -> TensorEntry:
    """Read one tensor description; ``start`` is still relative to the data."""
    name = cursor.string("a tensor name")
    dimensions = cursor.u32(f"the rank of tensor {name}")
    if not 1 <= dimensions <= 4:
        raise cursor.fail(f"tensor {name} has {dimensions} dimensions; expected 1 to 4")
    shape = tuple(cursor.u64(f"the shape of tensor {name}") for _ in range(dimensions))[::-1]
    kind = cursor.u32(f"the type of tensor {name}")
    if kind not in GGML_TYPES:
        supported = ", ".join(known.name for known in GGML_TYPES.values())
        raise ModelError(
            f"{cursor.path}: tensor {name} has type {describe_type(kind)}, which is not supported "
            f"(supported: {supported})"
        )
    stored = GGML_TYPES[kind]
    if 0 in shape or shape[-1] % stored.values:
        raise cursor.fail(f"tensor {name} has shape {shape}, impossible for type {stored.name}")
    size = math.prod(shape) // stored.values * stored.size
    return TensorEntry(name, shape, kind, cursor.u64(f"the offset of tensor {name}"), size)


def _place_tensors(
    path: Path, entries: list[TensorEntry], data_start: int, file_size: int
) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for entry in entries:
        start = data_start + entry.start
        if entry.name in tensors:
            raise ModelError(f"{path}: tensor {entry.name} appears twice")
        if start + entry.size > file_size:
            raise ModelError(
                f"{path}: truncated: tensor {entry.name} ends at byte {start + entry.size}, "
                f"the file has {file_size}"
            )
        tensors[entry.name] = TensorEntry(entry.name, entry.shape, entry.type, start, entry.size)
    return tensors

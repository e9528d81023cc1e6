"""Packed weights and the file that keeps them: written once, mapped ever after, checked before each use.

A file is a prefix (magic, version, the header's length and digest), a header, and from the next multiple of
4 KiB on the bytes that kernels read, in pieces of 1 MiB with a checksum each. Knows nothing about where
files lie and when they are written.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve import __version__, _native
from memserve.core.errors import ModelError
from memserve.engine.models.spec import ModelSpec

FILE_VERSION = 1
_MAGIC = b"memserve"
_PREFIX = struct.Struct("<8sIIQ16s")
"""Magic, file version, version of the packed layout, bytes of the header, digest of the header."""
_DATA_ALIGNMENT = 4096
_PIECE = 1 << 20
_MAX_HEADER = 1 << 28


class PackedVectors(msgspec.Struct, frozen=True, array_like=True):
    """The vectors of a layer, as bytes of float32; None where the model has none."""

    attention_norm: bytes
    ffn_norm: bytes
    qkv_bias: bytes | None = None
    q_norm: bytes | None = None
    k_norm: bytes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeights:
    """A model's weights as kernels read them, on every instruction set.

    ``memory``: uint8[bytes], which ``matrices`` (format, columns, depth, offset) lie in.
    """

    spec: ModelSpec
    keep: str
    memory: NDArray[np.uint8]
    matrices: list[tuple[int, int, int, int]]
    layers: list[PackedVectors]
    output_norm: bytes


class FileState(msgspec.Struct, frozen=True):
    """A file at one time. ``modified`` and ``changed`` in nanoseconds; programs cannot set the latter.

    Every way to other content changes it: writing in place, also with the modification time put back, and
    replacing the file, also by one of equal size and time.
    """

    path: str
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The state now. Raises ``OSError``."""
        status = path.stat()
        return cls(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class PackedOrigin(msgspec.Struct, frozen=True):
    """What packed weights were made from, and how: equal origins give equal weights.

    ``name`` is for people; ``version`` is MemServe's, which may read files differently.
    """

    name: str
    files: tuple[FileState, ...]
    keep: str
    version: str = __version__

    @classmethod
    def of(cls, model: Path, keep: str) -> PackedOrigin:
        """The origin that weights of the file or folder ``model`` have now. Raises ``ModelError``."""
        try:
            files = [model] if model.is_file() else [*model.glob("*.json"), *model.glob("*.safetensors")]
            return cls(model.stem, tuple(FileState.of(file) for file in sorted(files)), keep)
        except OSError as error:
            raise ModelError(f"{model}: cannot be read: {error}") from error

    @property
    def key(self) -> str:
        """32 hex digits that name this origin."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()

    def is_current(self) -> bool:
        """Whether this version would make the same again: its files are still there, as they were."""
        try:
            same = all(FileState.of(Path(file.path)) == file for file in self.files)
        except OSError:
            return False
        return same and self.version == __version__


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    origin: PackedOrigin
    spec: ModelSpec
    matrices: list[tuple[int, int, int, int]]
    layers: list[PackedVectors]
    output_norm: bytes
    size: int
    checksums: bytes


def write_packed(file: BinaryIO, origin: PackedOrigin, weights: PackedWeights) -> None:
    """Write ``weights`` to an empty file. Raises ``OSError``."""
    header = msgspec.msgpack.encode(
        _Header(
            origin,
            weights.spec,
            weights.matrices,
            weights.layers,
            weights.output_norm,
            len(weights.memory),
            _checksums(weights.memory).tobytes(),
        )
    )
    digest = hashlib.blake2b(header, digest_size=16).digest()
    file.write(_PREFIX.pack(_MAGIC, FILE_VERSION, _native.packed_layout, len(header), digest))
    file.write(header)
    file.seek(_data_start(len(header)))
    file.write(weights.memory.data)
    file.flush()


def map_packed(path: Path, origin: PackedOrigin) -> PackedWeights:
    """Map the file at ``path``, which should hold the weights of ``origin``, and check every byte of it.

    The memory is shared with all processes that map the file. Raises ``FileNotFoundError``, and
    ``ModelError`` for a file that is damaged, cannot be read, or is of another origin or version.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    header, start = _parse_header(path, mapped)
    if header.origin != origin:
        raise ModelError(f"{path}: holds the weights of another model or setting")
    if len(mapped) != start + header.size:
        raise ModelError(f"{path}: has {len(mapped)} bytes, not {start + header.size}: truncated, or damaged")
    memory = np.frombuffer(mapped, np.uint8, header.size, start)
    damaged = np.flatnonzero(np.frombuffer(header.checksums, "<u8") != _checksums(memory))
    if len(damaged):
        at = start + int(damaged[0]) * _PIECE
        raise ModelError(f"{path}: damaged: wrong checksum of the {_PIECE} bytes from byte {at} on")
    return PackedWeights(header.spec, origin.keep, memory, header.matrices, header.layers, header.output_norm)


def is_outdated(path: Path) -> bool:
    """Whether a file of packed weights can be of no more use: older, damaged, or of files that changed.

    False for what is no such file, or is of a newer version. Raises ``OSError``.
    """
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
            return False
        _, version, layout, length, _ = _PREFIX.unpack(prefix)
        current = (FILE_VERSION, _native.packed_layout)
        if (version, layout) != current:
            return (version, layout) < current
        raw = prefix + file.read(min(length, _MAX_HEADER))
    try:
        header, _ = _parse_header(path, raw)
    except ModelError:
        return True
    return not header.origin.is_current()


def _parse_header(path: Path, raw: bytes | mmap.mmap) -> tuple[_Header, int]:
    """The checked header and where the data begins."""
    if len(raw) < _PREFIX.size or raw[: len(_MAGIC)] != _MAGIC:
        raise ModelError(f"{path}: is no file of packed weights")
    _, version, layout, length, digest = _PREFIX.unpack(raw[: _PREFIX.size])
    if (version, layout) != (FILE_VERSION, _native.packed_layout):
        raise ModelError(
            f"{path}: has version {version}.{layout}; this is {FILE_VERSION}.{_native.packed_layout}"
        )
    encoded = raw[_PREFIX.size : _PREFIX.size + length] if length <= _MAX_HEADER else b""
    if hashlib.blake2b(encoded, digest_size=16).digest() != digest:
        raise ModelError(f"{path}: damaged: the header does not match its digest")
    try:
        header = msgspec.msgpack.decode(encoded, type=_Header)
    except msgspec.DecodeError as error:
        raise ModelError(f"{path}: damaged: {error}") from error
    if len(header.checksums) != -(-header.size // _PIECE) * 8:
        raise ModelError(f"{path}: damaged: {len(header.checksums)} bytes of checksums for {header.size}")
    return header, _data_start(length)


def _data_start(header_bytes: int) -> int:
    return -(-(_PREFIX.size + header_bytes) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT


def _checksums(memory: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """One per piece of 1 MiB, the last one of what is left: uint64[pieces]."""
    whole = len(memory) // _PIECE
    starts = np.uint64(memory.ctypes.data) + np.arange(whole + 1, dtype=np.uint64) * np.uint64(_PIECE)
    checksums = _native.checksum_blocks(starts[:whole], _PIECE)
    rest = len(memory) - whole * _PIECE
    if not rest:
        return checksums
    return np.concatenate([checksums, _native.checksum_blocks(starts[whole:], rest)])

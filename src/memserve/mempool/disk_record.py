"""What stands before a block on disk, so that it explains itself after a restart. Pure: bytes in, bytes out.

A header names the prompt it continues by a chained hash, carries the block's own tokens and the checksum of
its KV, and is sealed by a digest: whatever a crash leaves is either a whole record or no record.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import msgspec

from memserve.core.types import Namespace, Tokens, pack_tokens

HEADER_BYTES = 4096
"""Room for a header; the KV follows, aligned to pages."""

Key = bytes
"""The chained hash of a namespace and all tokens up to the end of a block: 32 bytes."""

_MAGIC = b"MemSrvB1"
_KEY_BYTES = 32
_DIGEST_BYTES = 16
_FIXED = struct.Struct(f"<8s16sQQ{_KEY_BYTES}sBII")
_ROOT_BYTES = b"memserve prompt"


@dataclass(frozen=True, slots=True)
class Record:
    """One block on disk: the KV of ``tokens`` (packed int32) after the prompt named by ``parent``.

    ``sequence`` orders records by when they were written; ``checksum`` is that of the block's bytes.
    """

    namespace: Namespace
    parent: Key
    tokens: bytes
    origin: int
    checksum: int
    sequence: int


def root_key(fingerprint: str, namespace: Namespace) -> Key:
    """The key of the empty prompt."""
    named = _ROOT_BYTES + bytes.fromhex(fingerprint) + msgspec.msgpack.encode(namespace)
    return hashlib.blake2b(named, digest_size=_KEY_BYTES).digest()


def child_key(parent: Key, tokens: bytes) -> Key:
    """The key of ``parent``'s prompt with one more block of tokens."""
    return hashlib.blake2b(parent + tokens, digest_size=_KEY_BYTES).digest()


def chain_keys(fingerprint: str, namespace: Namespace, tokens: Tokens, block_tokens: int) -> list[Key]:
    """Keys after 0, 1, ... whole blocks of ``tokens`` (int32[n]): one more than there are blocks."""
    keys = [root_key(fingerprint, namespace)]
    raw, step = pack_tokens(tokens), 4 * block_tokens
    for at in range(0, len(tokens) // block_tokens * step, step):
        keys.append(child_key(keys[-1], raw[at : at + step]))
    return keys


def encode_header(record: Record, fingerprint: str) -> bytes | None:
    """The header of a record: ``HEADER_BYTES`` bytes; None if names and tokens are too long for it."""
    namespace = msgspec.msgpack.encode(record.namespace)
    fixed = _FIXED.pack(
        _MAGIC,
        bytes.fromhex(fingerprint),
        record.checksum,
        record.sequence,
        record.parent,
        record.origin,
        len(namespace),
        len(record.tokens),
    )
    sealed = fixed + namespace + record.tokens
    if len(sealed) + _DIGEST_BYTES > HEADER_BYTES:
        return None
    return (sealed + _seal(sealed)).ljust(HEADER_BYTES, b"\0")


def decode_header(raw: bytes, fingerprint: str, block_tokens: int) -> Record | None:
    """The record that ``raw`` begins; None unless it is whole and of this layout."""
    if len(raw) < _FIXED.size or not raw.startswith(_MAGIC):
        return None
    _, written_for, checksum, sequence, parent, origin, named, counted = _FIXED.unpack_from(raw)
    end = _FIXED.size + named + counted
    if end + _DIGEST_BYTES > len(raw) or raw[end : end + _DIGEST_BYTES] != _seal(raw[:end]):
        return None
    if written_for != bytes.fromhex(fingerprint) or counted != 4 * block_tokens:
        return None
    namespace = msgspec.msgpack.decode(raw[_FIXED.size : _FIXED.size + named], type=Namespace)
    return Record(namespace, parent, raw[_FIXED.size + named : end], origin, checksum, sequence)


def _seal(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).digest()

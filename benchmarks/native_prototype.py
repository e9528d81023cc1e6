"""Builds and drives the AMX-only prototype kernels (native.cpp), for comparison in native_speed.py.

The prototype has SmolLM2-135M's shape built in, and keeps KV in its own pool of numbered blocks.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from memserve import _native
from memserve.engine.models.spec import LayerWeights, ModelWeights
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import rope_tables

_QKV, _O, _GATE_UP, _DOWN, _HEAD = range(5)
_POSITIONS = 8192


def why_not_here() -> str | None:
    """Why this machine cannot run the prototype; None if it can."""
    return None if "amx-bf16" in _native.supported_isas() else "it is written for AMX, which this CPU lacks"


class Prototype:
    """``forward`` takes the same batches as a runner and translates addresses to block numbers."""

    def __init__(self, weights: ModelWeights, folder: Path, threads: int) -> None:
        self._threads = threads
        self._vocabulary = weights.spec.vocabulary
        self._library = _build(folder)
        self._library.nat_wbytes.restype = ctypes.c_size_t
        if self._library.nat_amx() != 0:
            raise RuntimeError("the kernel refused permission to use AMX tiles")
        self._arena = np.zeros(self._library.nat_wbytes() + 64, np.uint8)
        self._used = -self._arena.ctypes.data % 64
        for index, layer in enumerate(weights.layers):
            self._set_layer(index, layer)
        self._set(_HEAD, 0, weights.head)
        self._library.nat_norm(2, 0, _pointer(weights.output_norm))
        bits = weights.embedding.view(np.uint32)
        self._embedding = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        self._rope = rope_tables(weights.spec, _POSITIONS)
        self._library.nat_emb(_pointer(self._embedding), *map(_pointer, self._rope))
        block = weights.spec.layers * 2 * weights.spec.kv_heads * weights.spec.head_dim * 16
        self._pool = np.zeros((256, block), np.uint16)

    def forward(self, batch: ForwardBatch) -> np.ndarray:
        _, numbers = np.unique(batch.blocks, return_inverse=True)
        table = np.ascontiguousarray(numbers.reshape(batch.blocks.shape), np.int32)
        logits = np.empty((len(batch.logit_rows), self._vocabulary), np.float32)
        self._library.nat_forward(
            len(batch.tokens),
            _pointer(batch.tokens),
            _pointer(batch.positions),
            len(batch.starts) - 1,
            _pointer(batch.starts),
            _pointer(table),
            table.shape[1],
            _pointer(self._pool),
            len(batch.logit_rows),
            _pointer(batch.logit_rows),
            _pointer(logits),
            self._threads,
            None,
        )
        return logits

    def _set_layer(self, index: int, layer: LayerWeights) -> None:
        self._set(_QKV, index, np.concatenate([layer.q, layer.k, layer.v]))
        self._set(_O, index, layer.o)
        wide, hidden = layer.gate.shape
        pairs = np.stack([m.reshape(wide // 16, 16, hidden) for m in (layer.gate, layer.up)], 1)
        self._set(_GATE_UP, index, pairs.reshape(2 * wide, hidden))
        self._set(_DOWN, index, layer.down)
        self._library.nat_norm(0, index, _pointer(layer.attention_norm))
        self._library.nat_norm(1, index, _pointer(layer.ffn_norm))

    def _set(self, kind: int, index: int, matrix: np.ndarray) -> None:
        rows = np.ascontiguousarray(matrix, np.float32)
        self._library.nat_set(
            kind, index, _pointer(rows), ctypes.c_void_p(self._arena.ctypes.data + self._used)
        )
        self._used += rows.size * 2


def _build(folder: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "libprototype.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(folder / "native.cpp"), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)

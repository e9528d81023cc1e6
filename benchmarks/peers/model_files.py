"""The same weights in every format that an engine here reads: GGUF in 4 bits, bf16, f16; safetensors folders.

SmolLM2-135M comes from the installed package; ``llama-1b`` is random, of Llama 3.2 1B's shape with SmolLM2's
vocabulary. All other formats hold what the 4-bit file says, rounded to bf16; GPTQ keeps the 4 bits.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memserve.engine.models.ggml_types import GGML_TYPES
from memserve.engine.models.gguf_file import GGUFFile, Value
from memserve.engine.models.loader import open_path
from memserve.engine.models.resolve import DEFAULT_MODEL, resolve_model
from memserve.engine.models.spec import ModelSpec
from peers.gguf_writing import TensorSource, write_gguf
from peers.hf_folders import holds_only_q4_0, narrow, to_bf16, write_bf16_folder, write_gptq_folder

Raw = NDArray[np.generic]

LLAMA_1B = "llama-1b"
MODELS = (DEFAULT_MODEL, LLAMA_1B)
_TYPES = {kind.name: number for number, kind in GGML_TYPES.items()}
_FILE_TYPE = "general.file_type"
_FILE_TYPES = {"F16": 1, "Q4_0": 2, "BF16": 32}
_SHAPE_1B: dict[str, Value] = {
    "general.name": "random llama 1b",
    "llama.block_count": 16,
    "llama.context_length": 8192,
    "llama.embedding_length": 2048,
    "llama.feed_forward_length": 8192,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 64,
    _FILE_TYPE: _FILE_TYPES["Q4_0"],
}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Paths of one model. ``gguf``: as published, 4 bits; ``gptq``: the same, None where it cannot say it.

    The others are bf16 numbers.
    """

    name: str
    spec: ModelSpec
    gguf: Path
    gguf_bf16: Path
    gguf_f16: Path
    safetensors: Path
    gptq: Path | None

    def weight_bytes(self, weights: str) -> int:
        """Bytes that a pass over all weights reads, as ``4bit`` or ``bf16``."""
        path = self.gguf if weights == "4bit" else self.gguf_bf16
        return sum(tensor.size for tensor in GGUFFile(path).tensors.values())


def prepare_model(name: str, folder: Path) -> ModelFiles:
    """Write below ``folder`` what is not there yet. Raises ``ModelError`` if the default is not installed."""
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    published = resolve_model(DEFAULT_MODEL)
    if name == LLAMA_1B:
        gguf = make_once(home / "q4_0.gguf", partial(_write_random, GGUFFile(published)))
    else:
        # A copy: some engines write beside the model.
        gguf = make_once(home / "q4_1.gguf", lambda path: shutil.copyfile(published, path))
    source = GGUFFile(gguf)
    return ModelFiles(
        name,
        open_path(gguf).spec,
        gguf,
        make_once(home / "bf16.gguf", partial(_write_wide, source, "BF16")),
        make_once(home / "f16.gguf", partial(_write_wide, source, "F16")),
        make_once(home / "safetensors", partial(write_bf16_folder, gguf)),
        make_once(home / "gptq", partial(write_gptq_folder, gguf)) if holds_only_q4_0(gguf) else None,
    )


def make_once(path: Path, write: Callable[[Path], object]) -> Path:
    """``path``, written by ``write`` under another name first: half a file is never taken for whole."""
    if not path.exists():
        begun = path.with_name(path.name + ".part")
        if begun.is_dir():
            shutil.rmtree(begun)
        write(begun)
        begun.rename(path)
    return path


# --- GGUF ---


def _write_wide(source: GGUFFile, kind: str, path: Path) -> None:
    """All matrices of ``source`` as bf16 numbers, stored as ``kind``: BF16 or F16."""
    metadata = dict(source.metadata) | {_FILE_TYPE: _FILE_TYPES[kind]}
    tensors = [_widened(source, name, kind) for name in source.tensors]
    write_gguf(path, metadata, tensors)


def _widened(source: GGUFFile, name: str, kind: str) -> TensorSource:
    shape = source.tensors[name].shape
    if len(shape) == 1:
        return TensorSource(name, shape, _TYPES["F32"], lambda: source.read(name))
    if kind == "BF16":
        return TensorSource(name, shape, _TYPES[kind], lambda: to_bf16(source.read(name)))
    return TensorSource(name, shape, _TYPES[kind], lambda: narrow(source.read(name)).astype(np.float16))


def _write_random(like: GGUFFile, path: Path) -> None:
    """The random model; vocabulary and all else that is metadata from ``like``."""
    metadata: dict[str, Value] = dict(like.metadata) | _SHAPE_1B
    write_gguf(path, metadata, list(_random_tensors(metadata)))


def _random_tensors(metadata: Mapping[str, Value]) -> Iterator[TensorSource]:
    def number(key: str) -> int:
        value = metadata[f"llama.{key}"]
        assert isinstance(value, int), f"llama.{key} is a number"
        return value

    hidden, wide = number("embedding_length"), number("feed_forward_length")
    kv = number("attention.head_count_kv") * number("rope.dimension_count")
    vocabulary = metadata["tokenizer.ggml.tokens"]
    assert isinstance(vocabulary, list), "a vocabulary is a list"
    yield _random_matrix("token_embd.weight", (len(vocabulary), hidden), "Q8_0")
    yield _ones("output_norm.weight", hidden)
    matrices = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    for layer in range(number("block_count")):
        yield _ones(f"blk.{layer}.attn_norm.weight", hidden)
        yield _ones(f"blk.{layer}.ffn_norm.weight", hidden)
        for part, shape in matrices.items():
            yield _random_matrix(f"blk.{layer}.{part}.weight", shape, "Q4_0")


def _ones(name: str, size: int) -> TensorSource:
    return TensorSource(name, (size,), _TYPES["F32"], lambda: np.ones(size, np.float32))


def _random_matrix(name: str, shape: tuple[int, int], kind: str) -> TensorSource:
    return TensorSource(name, shape, _TYPES[kind], partial(_random_blocks, name, shape, kind))


def _random_blocks(name: str, shape: tuple[int, int], kind: str) -> Raw:
    """Blocks whose values have mean 0 and variance 1 / inputs, drawn from the tensor's name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    outputs, inputs = shape
    blocks = outputs * inputs // 32
    if kind == "Q4_0":
        # Nibbles 1 to 15 stand for -7 to 7.
        quants = (
            rng.integers(1, 16, (blocks, 16), np.uint8) | rng.integers(1, 16, (blocks, 16), np.uint8) << 4
        )
        spread = np.sqrt(np.mean(np.arange(-7, 8) ** 2))
    else:
        quants = rng.integers(-127, 128, (blocks, 32), np.int8).view(np.uint8)
        spread = np.sqrt(np.mean(np.arange(-127, 128) ** 2))
    scale = np.full(blocks, 1 / spread / np.sqrt(inputs), "<f2").view(np.uint8).reshape(blocks, 2)
    return np.concatenate([scale, quants], axis=1)

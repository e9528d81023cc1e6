"""Model folders as transformers and vLLM read them, from a GGUF file: config.json and one safetensors file.

No tokenizer: prompts here are tokens. Plain Llama models with tied embeddings only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memserve.engine.models.ggml_types import GGML_TYPES, Float
from memserve.engine.models.loader import open_path
from memserve.engine.models.spec import Matrix, ModelSpec, StoredLayer, StoredMatrix, StoredWeights

GROUP = 32
_TYPES = {kind.name: kind for kind in GGML_TYPES.values()}
_ITEM_BYTES = {"BF16": 2, "F16": 2, "I32": 4}
_MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a safetensors file."""

    name: str
    dtype: str
    values: NDArray[np.generic]


def write_bf16_folder(gguf: Path, folder: Path) -> None:
    """All weights as bf16."""
    source = open_path(gguf)
    _write_folder(folder, hf_config(source.spec), _bf16_entries(source.stored_weights()))


def write_gptq_folder(gguf: Path, folder: Path) -> None:
    """Q4_0's 4 bits as they are, in GPTQ's order with symmetric groups of 32; all else as bf16."""
    source = open_path(gguf)
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    config = hf_config(source.spec) | {"quantization_config": quantised}
    _write_folder(folder, config, _gptq_entries(source.stored_weights()))


def holds_only_q4_0(gguf: Path) -> bool:
    """Whether every matrix of every layer is stored as Q4_0."""
    layers = open_path(gguf).stored_weights().layers
    return all(_is_q4_0(getattr(layer, part)) for layer in layers for part in _MATRICES)


def _is_q4_0(matrix: Matrix) -> bool:
    return isinstance(matrix, StoredMatrix) and matrix.kind == "Q4_0"


def hf_config(spec: ModelSpec) -> dict[str, object]:
    """config.json."""
    plain = spec.rope_scaling is None and not (spec.attention_bias or spec.qk_norm)
    assert plain, "only plain Llama models are written"
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.feed_forward,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocabulary,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.rms_epsilon,
        "rope_theta": spec.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _bf16_entries(weights: StoredWeights) -> Iterator[Entry]:
    yield from _around_layers(weights)
    for at, layer in enumerate(weights.layers):
        yield from _norm_entries(at, layer)
        for part, called in _MATRICES.items():
            yield _bf16(f"model.layers.{at}.{called}.weight", expand(getattr(layer, part)))


def _gptq_entries(weights: StoredWeights) -> Iterator[Entry]:
    yield from _around_layers(weights)
    for at, layer in enumerate(weights.layers):
        yield from _norm_entries(at, layer)
        for part, called in _MATRICES.items():
            yield from gptq_entries(f"model.layers.{at}.{called}", getattr(layer, part))


def _around_layers(weights: StoredWeights) -> Iterator[Entry]:
    yield _bf16("model.embed_tokens.weight", expand(weights.embedding))
    yield _bf16("model.norm.weight", weights.output_norm)


def _norm_entries(at: int, layer: StoredLayer) -> Iterator[Entry]:
    for part, called in _NORMS.items():
        yield _bf16(f"model.layers.{at}.{called}.weight", getattr(layer, part))


def gptq_entries(name: str, matrix: StoredMatrix) -> Iterator[Entry]:
    """Of a Q4_0 matrix [outputs, inputs]: 4-bit numbers [inputs / 8, outputs], scales [groups, outputs]."""
    outputs, groups = len(matrix.rows), matrix.inputs // GROUP
    blocks = np.ascontiguousarray(matrix.rows).reshape(outputs, groups, 18)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]
    quants = np.concatenate([blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4], axis=2)
    eights = quants.reshape(outputs, matrix.inputs // 8, 8).astype(np.uint32)
    packed = (eights << (4 * np.arange(8, dtype=np.uint32))).sum(axis=2, dtype=np.uint32)
    yield Entry(f"{name}.qweight", "I32", np.ascontiguousarray(packed.T).view(np.int32))
    yield Entry(f"{name}.scales", "F16", np.ascontiguousarray(scales.T))
    # Zero points are stored less one: 7 in each nibble stands for 8.
    yield Entry(f"{name}.qzeros", "I32", np.full((groups, outputs // 8), 0x77777777, np.int32))
    yield Entry(f"{name}.g_idx", "I32", np.arange(matrix.inputs, dtype=np.int32) // GROUP)


def _bf16(name: str, values: Float) -> Entry:
    return Entry(name, "BF16", to_bf16(values))


def _write_folder(folder: Path, config: dict[str, object], entries: Iterator[Entry]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_safetensors(folder / "model.safetensors", entries)


def write_safetensors(path: Path, entries: Iterator[Entry]) -> None:
    """Write a file. The header comes first and needs all sizes, so the data goes through a second file."""
    body = path.with_suffix(".body")
    header: dict[str, object] = {}
    with body.open("wb") as file:
        for entry in entries:
            begin = file.tell()
            file.write(entry.values.tobytes())
            assert file.tell() - begin == prod(entry.values.shape) * _ITEM_BYTES[entry.dtype], entry.name
            offsets = [begin, file.tell()]
            shape = list(entry.values.shape)
            header[entry.name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, body.open("rb") as data:
        file.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(data, file, 1 << 24)
    body.unlink()


def expand(matrix: Matrix) -> Float:
    """float32 of the same shape."""
    if isinstance(matrix, StoredMatrix):
        kind = _TYPES[matrix.kind]
        return kind.dequantize(np.ascontiguousarray(matrix.rows)).reshape(-1, matrix.inputs)
    return matrix


def to_bf16(values: Float) -> NDArray[np.uint16]:
    """Upper halves of the nearest bf16 numbers, ties to even. Finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def narrow(values: Float) -> Float:
    """The nearest bf16 numbers as float32."""
    return (to_bf16(values).astype(np.uint32) << np.uint32(16)).view(np.float32)

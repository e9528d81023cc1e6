"""A Llama-like model in one GGUF file: hyper-parameters, weights, tokenizer and template from it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.gguf_file import GGUFFile
from memserve.engine.models.gguf_metadata import Metadata
from memserve.engine.models.gguf_rope import read_rope_scaling
from memserve.engine.models.llama import (
    LayerNames,
    Progress,
    TensorNames,
    check_spec,
    check_tensors,
    read_stored_weights,
    read_weights,
)
from memserve.engine.models.rope import YarnScaling
from memserve.engine.models.spec import (
    Float,
    LayerWeights,
    Matrix,
    ModelSpec,
    ModelWeights,
    StoredLayer,
    StoredMatrix,
    StoredWeights,
)
from memserve.engine.models.tokenizer import Tokenizer
from memserve.engine.models.vocabulary import CONTROL, Vocabulary, build_tokenizer

Number = TypeVar("Number", np.float32, np.uint8)
Layer = TypeVar("Layer", LayerWeights, StoredLayer)

_NAMES = TensorNames(
    "token_embd.weight",
    "output_norm.weight",
    "output.weight",
    "blk.{}.",
    LayerNames(
        "attn_norm.weight",
        "attn_q.weight",
        "attn_k.weight",
        "attn_v.weight",
        "attn_output.weight",
        "ffn_norm.weight",
        "ffn_gate.weight",
        "ffn_up.weight",
        "ffn_down.weight",
        "attn_q.bias",
        "attn_k.bias",
        "attn_v.bias",
        "attn_q_norm.weight",
        "attn_k_norm.weight",
    ),
)
_ROPE_DIVISORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What the name of an architecture implies about its files.

    ``interleaved``: q and k rows lie in the order of interleaved rope. ``bias``: whether q, k and v have
    biases; None: if the file has them.
    """

    interleaved: bool
    bias: bool | None
    qk_norm: bool


_ARCHITECTURES = {
    # Mistral, SmolLM2 and most other relatives are called llama in GGUF files.
    "llama": _Architecture(interleaved=True, bias=None, qk_norm=False),
    "qwen2": _Architecture(interleaved=False, bias=True, qk_norm=False),
    "qwen3": _Architecture(interleaved=False, bias=None, qk_norm=True),
}
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>")
"""Control tokens that end a turn even where the file names only one of them as its eos token."""


class GGUFModel:
    """Opens the file and checks metadata and tensor table; weights are read when asked for.

    Raises ``ModelError`` naming the file and what is wrong.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._metadata = Metadata(path, self._file.metadata)
        self._architecture = self._check_supported()
        self.spec = check_spec(self._read_spec(), path)
        check_tensors(self.spec, self._file, _NAMES, self._file.tensors, ignored=[_ROPE_DIVISORS])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file's vocabulary."""
        return build_tokenizer(self._vocabulary, self.spec.eos_tokens)

    def chat_template(self) -> ChatTemplate | None:
        """The file's chat template, or None when it has none."""
        if "tokenizer.chat_template" not in self._metadata:
            return None
        words = self._vocabulary
        return ChatTemplate(
            self._metadata.text("tokenizer.chat_template"),
            bos_token=words.text_of(words.bos),
            eos_token=words.text_of(words.eos),
        )

    def weights(self, progress: Progress | None = None) -> ModelWeights:
        """All weights in float32; ``progress`` hears the fraction done."""
        weights = read_weights(self.spec, self._file, _NAMES, progress)
        if self._architecture.interleaved:
            weights.layers = [_in_rope_order(layer, self.spec) for layer in weights.layers]
        return weights

    def stored_weights(self, progress: Progress | None = None) -> StoredWeights:
        """All weights in the file's own blocks; ``progress`` hears the fraction of layers done."""
        weights = read_stored_weights(self.spec, self._file, _NAMES, progress)
        if not self._architecture.interleaved:
            return weights
        layers = (_in_rope_order(layer, self.spec) for layer in weights.layers)
        return dataclasses.replace(weights, layers=layers)

    def _check_supported(self) -> _Architecture:
        metadata = self._metadata
        known = _ARCHITECTURES.get(metadata.architecture)
        if known is None:
            raise metadata.fail(
                f"architecture {metadata.architecture!r} is not supported "
                f"(general.architecture; supported: {', '.join(_ARCHITECTURES)})"
            )
        if metadata.integer("split.count", 1) > 1:
            raise metadata.fail("is one part of a split model (split.count); merge the parts into one file")
        if metadata.integer(".expert_count", 0):
            key = f"{metadata.architecture}.expert_count"
            raise metadata.fail(f"mixtures of experts are not supported ({key})")
        return known

    def _read_spec(self) -> ModelSpec:
        metadata, architecture = self._metadata, self._architecture
        heads = metadata.integer(".attention.head_count")
        scaling = read_rope_scaling(metadata, self._read_rope_divisors())
        context = metadata.integer(".context_length")
        window = metadata.integer(".attention.sliding_window", 0)
        if isinstance(scaling, YarnScaling):
            context = int(scaling.factor * scaling.original_context)
        words = self._vocabulary
        has_bias = self._file.shape(_NAMES.in_layer(0, "q_bias")) is not None
        return ModelSpec(
            identity=f"{self._model_name()}-{self._file.fingerprint()}",
            architecture=metadata.architecture,
            layers=metadata.integer(".block_count"),
            hidden=metadata.integer(".embedding_length"),
            heads=heads,
            kv_heads=metadata.integer(".attention.head_count_kv", heads),
            head_dim=self._read_head_dim(),
            feed_forward=metadata.integer(".feed_forward_length"),
            vocabulary=len(words.tokens),
            context=min(context, window) if window else context,
            rms_epsilon=metadata.number(".attention.layer_norm_rms_epsilon"),
            rope_theta=metadata.number(".rope.freq_base", 10000.0),
            eos_tokens=self._eos_tokens(words),
            rope_scaling=scaling,
            window=window or None,
            attention_bias=has_bias if architecture.bias is None else architecture.bias,
            qk_norm=architecture.qk_norm,
        )

    def _read_head_dim(self) -> int:
        metadata = self._metadata
        hidden, heads = metadata.integer(".embedding_length"), metadata.integer(".attention.head_count")
        head_dim = metadata.integer(".attention.key_length", hidden // max(heads, 1))
        for key in (".attention.value_length", ".rope.dimension_count"):
            if metadata.integer(key, head_dim) != head_dim:
                raise metadata.complain(key, f"the head size {head_dim} (others are not supported)")
        return head_dim

    def _read_rope_divisors(self) -> Float | None:
        shape, expected = self._file.shape(_ROPE_DIVISORS), (self._read_head_dim() // 2,)
        if shape is None:
            return None
        if shape != expected:
            raise self._metadata.fail(f"tensor {_ROPE_DIVISORS} has shape {shape}; expected {expected}")
        return self._file.read(_ROPE_DIVISORS)

    def _model_name(self) -> str:
        name = self._metadata.text("general.name", self._metadata.architecture)
        return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")[:48] or self._metadata.architecture

    def _eos_tokens(self, words: Vocabulary) -> tuple[int, ...]:
        named = [words.eos, self._token("eot"), self._token("eom")]
        controls = [words.find(text, CONTROL) for text in _END_OF_TURN]
        return tuple(dict.fromkeys(token for token in named + controls if token is not None))

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(
            path=self._file.path,
            model=self._metadata.text("tokenizer.ggml.model"),
            pre=self._metadata.text("tokenizer.ggml.pre", "default"),
            tokens=self._metadata.texts("tokenizer.ggml.tokens"),
            types=self._metadata.numbers("tokenizer.ggml.token_type"),
            scores=self._metadata.numbers("tokenizer.ggml.scores"),
            merges=self._metadata.texts("tokenizer.ggml.merges", []),
            bos=self._token("bos"),
            eos=self._token("eos"),
            unknown=self._token("unknown"),
            add_bos=self._metadata.flag("tokenizer.ggml.add_bos_token"),
            add_space_prefix=self._metadata.flag("tokenizer.ggml.add_space_prefix"),
        )

    def _token(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self._metadata:
            return None
        token = self._metadata.integer(key)
        if token >= len(self._metadata.texts("tokenizer.ggml.tokens")):
            raise self._metadata.fail(f"metadata key {key} is {token}, which is outside the vocabulary")
        return token


def _in_rope_order(layer: Layer, spec: ModelSpec) -> Layer:
    order: dict[str, Any] = {
        "q": _split_matrix(layer.q, spec.heads),
        "k": _split_matrix(layer.k, spec.kv_heads),
    }
    if layer.q_bias is not None and layer.k_bias is not None:
        order["q_bias"] = _split_halves(layer.q_bias, spec.heads)
        order["k_bias"] = _split_halves(layer.k_bias, spec.kv_heads)
    return dataclasses.replace(layer, **order)


def _split_matrix(matrix: Matrix, heads: int) -> Matrix:
    if isinstance(matrix, StoredMatrix):
        return dataclasses.replace(matrix, rows=_split_halves(matrix.rows, heads))
    return _split_halves(matrix, heads)


def _split_halves(rows: NDArray[Number], heads: int) -> NDArray[Number]:
    """Undo GGUF's row order for interleaved rope: pairs (i, i + d/2) lie next to each other there."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)

"""A Llama-family model in one GGUF file: hyper-parameters, weights, tokenizer and template from it."""

from __future__ import annotations

import dataclasses
import re
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import ModelError
from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.gguf_file import GGUFFile
from memserve.engine.models.llama import (
    LayerNames,
    Progress,
    TensorNames,
    check_spec,
    check_tensors,
    read_stored_weights,
    read_weights,
)
from memserve.engine.models.spec import (
    Float,
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
    ),
)
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>")
"""Control tokens that end a turn even where the file names only one of them as its eos token."""


class GGUFModel:
    """Opens the file and checks metadata and tensor table; weights are read when asked for.

    Raises ``ModelError`` naming the file and what is wrong.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._check_supported()
        self.spec = check_spec(self._read_spec(), path)
        check_tensors(self.spec, self._file, _NAMES, self._file.tensors)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file's vocabulary."""
        return build_tokenizer(self._vocabulary, self.spec.eos_tokens)

    def chat_template(self) -> ChatTemplate | None:
        """The file's chat template, or None when it has none."""
        if "tokenizer.chat_template" not in self._file.metadata:
            return None
        words = self._vocabulary
        return ChatTemplate(
            self._text("tokenizer.chat_template"),
            bos_token=words.text_of(words.bos),
            eos_token=words.text_of(words.eos),
        )

    def weights(self, progress: Progress | None = None) -> ModelWeights:
        """All weights in float32; ``progress`` hears the fraction done."""
        weights = read_weights(self.spec, self._file, _NAMES, progress)
        for layer in weights.layers:
            layer.q = _split_halves(layer.q, self.spec.heads)
            layer.k = _split_halves(layer.k, self.spec.kv_heads)
        return weights

    def stored_weights(self, progress: Progress | None = None) -> StoredWeights:
        """All weights in the file's own blocks; ``progress`` hears the fraction of layers done."""
        weights = read_stored_weights(self.spec, self._file, _NAMES, progress)
        return dataclasses.replace(weights, layers=map(self._in_rope_order, weights.layers))

    def _in_rope_order(self, layer: StoredLayer) -> StoredLayer:
        q, k = _split_stored(layer.q, self.spec.heads), _split_stored(layer.k, self.spec.kv_heads)
        return dataclasses.replace(layer, q=q, k=k)

    def _check_supported(self) -> None:
        architecture = self._text("general.architecture")
        if architecture != "llama":
            raise self._fail(f"architecture {architecture!r} is not supported (supported: llama)")
        if self._integer("llama.expert_count", 0):
            raise self._fail("mixtures of experts are not supported (llama.expert_count)")
        scaling = self._text("llama.rope.scaling.type", "none")
        if scaling != "none" or self._number("llama.rope.scale_linear", 1.0) != 1.0:
            raise self._fail(f"rope scaling ({scaling}) is not supported (llama.rope.scaling.type)")

    def _read_spec(self) -> ModelSpec:
        hidden, heads = self._integer("llama.embedding_length"), self._integer("llama.attention.head_count")
        head_dim = self._integer("llama.attention.key_length", hidden // max(heads, 1))
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if self._integer(key, head_dim) != head_dim:
                raise self._fail(f"{key} differs from the head size {head_dim}, which is not supported")
        words = self._vocabulary
        context = self._integer("llama.context_length")
        window = self._integer("llama.attention.sliding_window", 0)
        return ModelSpec(
            identity=f"{self._model_name()}-{self._file.fingerprint()}",
            architecture="llama",
            layers=self._integer("llama.block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=self._integer("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            feed_forward=self._integer("llama.feed_forward_length"),
            vocabulary=len(words.tokens),
            # Up to its length a sliding window is plain causal attention.
            context=min(context, window) if window else context,
            rms_epsilon=self._number("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=self._number("llama.rope.freq_base", 10000.0),
            eos_tokens=self._eos_tokens(words),
        )

    def _model_name(self) -> str:
        name = self._text("general.name", "llama")
        return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")[:48] or "llama"

    def _eos_tokens(self, words: Vocabulary) -> tuple[int, ...]:
        named = [words.eos, self._token("eot"), self._token("eom")]
        controls = [words.find(text, CONTROL) for text in _END_OF_TURN]
        return tuple(dict.fromkeys(token for token in named + controls if token is not None))

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise self._fail("metadata key tokenizer.ggml.tokens is missing or not a list of strings")
        merges = self._file.metadata.get("tokenizer.ggml.merges", [])
        if not isinstance(merges, list):
            raise self._fail("metadata key tokenizer.ggml.merges is not a list of strings")
        return Vocabulary(
            path=self._file.path,
            model=self._text("tokenizer.ggml.model"),
            pre=self._text("tokenizer.ggml.pre", "default"),
            tokens=tokens,
            types=self._numbers("tokenizer.ggml.token_type"),
            scores=self._numbers("tokenizer.ggml.scores"),
            merges=merges,
            bos=self._token("bos"),
            eos=self._token("eos"),
            unknown=self._token("unknown"),
            add_bos=self._flag("tokenizer.ggml.add_bos_token"),
            add_space_prefix=self._flag("tokenizer.ggml.add_space_prefix"),
        )

    def _fail(self, problem: str) -> ModelError:
        return ModelError(f"{self._file.path}: {problem}")

    def _text(self, key: str, default: str | None = None) -> str:
        value = self._file.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._fail(self._complaint(key, "a string"))
        return value

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._file.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
            raise self._fail(self._complaint(key, "a number"))
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._file.metadata.get(key, default)
        if not isinstance(value, int | float):
            raise self._fail(self._complaint(key, "a number"))
        return float(value)

    def _flag(self, key: str) -> bool | None:
        value = self._file.metadata.get(key)
        if not isinstance(value, bool | None):
            raise self._fail(self._complaint(key, "true or false"))
        return value

    def _numbers(self, key: str) -> Float | None:
        value = self._file.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray):
            raise self._fail(self._complaint(key, "a list of numbers"))
        return value.astype(np.float32)

    def _token(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self._file.metadata:
            return None
        token = self._integer(key)
        if token >= len(self._file.metadata["tokenizer.ggml.tokens"]):  # type: ignore[arg-type]
            raise self._fail(f"metadata key {key} is {token}, which is outside the vocabulary")
        return token

    def _complaint(self, key: str, expected: str) -> str:
        value = self._file.metadata.get(key)
        if value is None:
            return f"metadata key {key} is missing"
        return f"metadata key {key} is {str(value)[:60]!r}; expected {expected}"


def _split_stored(matrix: Matrix, heads: int) -> Matrix:
    if isinstance(matrix, StoredMatrix):
        return dataclasses.replace(matrix, rows=_split_halves(matrix.rows, heads))
    return _split_halves(matrix, heads)


def _split_halves(rows: NDArray[Number], heads: int) -> NDArray[Number]:
    """Undo GGUF's row order for interleaved rope: pairs (i, i + d/2) lie next to each other there."""
    outputs, inputs = rows.shape
    pairs = rows.reshape(heads, outputs // heads // 2, 2, inputs)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(outputs, inputs)

"""Llama models from GGUF files: the weights arrive unchanged, and every flaw is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import gguf
import numpy as np
import pytest

from memserve.core.errors import ModelError
from memserve.engine.models.chat_template import ChatMessage
from memserve.engine.models.ggml_types import GGML_TYPES
from memserve.engine.models.loader import open_model
from memserve.engine.models.spec import Float, Matrix, ModelWeights, StoredMatrix

WriteGguf = Callable[..., Path]
SameWeights = Callable[[ModelWeights, ModelWeights], None]


@pytest.mark.parametrize("kind", ["weights", "untied"])
def test_weights_arrive_unchanged(
    kind: str, request: pytest.FixtureRequest, write_gguf: WriteGguf, same_weights: SameWeights
) -> None:
    weights: ModelWeights = request.getfixturevalue(kind)
    source = open_model(str(write_gguf(weights)))
    loaded = source.weights()
    same_weights(loaded, weights)
    assert (loaded.head is loaded.embedding) == (weights.head is weights.embedding)


def test_spec_is_read_from_metadata(write_gguf: WriteGguf, weights: ModelWeights) -> None:
    spec = open_model(str(write_gguf(weights))).spec
    assert spec.identity.startswith("tiny-test-")
    for name in (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "feed_forward",
        "vocabulary",
        "context",
    ):
        assert getattr(spec, name) == getattr(weights.spec, name)
    assert spec.eos_tokens == (2, 0)
    assert spec.rms_epsilon == pytest.approx(weights.spec.rms_epsilon)


def test_identity_belongs_to_the_content(
    write_gguf: WriteGguf, weights: ModelWeights, untied: ModelWeights
) -> None:
    first = open_model(str(write_gguf(weights, name="a.gguf"))).spec.identity
    assert open_model(str(write_gguf(weights, name="b.gguf"))).spec.identity == first
    assert open_model(str(write_gguf(untied, name="c.gguf"))).spec.identity != first


def test_quantised_tensors_are_expanded(write_gguf: WriteGguf, weights: ModelWeights) -> None:
    name, kind = "blk.0.ffn_gate.weight", gguf.GGMLQuantizationType.Q8_0
    loaded = open_model(str(write_gguf(weights, kinds={name: kind}))).weights()
    original = weights.layers[0].gate
    expected = gguf.dequantize(gguf.quantize(original, kind), kind)
    np.testing.assert_array_equal(loaded.layers[0].gate, expected)
    assert 0 < np.abs(loaded.layers[0].gate - original).max() < 0.01


def test_stored_blocks_hold_the_same_weights(write_gguf: WriteGguf, weights: ModelWeights) -> None:
    """The rows of q and k come in the order of rope here too."""
    kinds = {
        "blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.1.attn_k.weight": gguf.GGMLQuantizationType.Q4_1,
        "blk.0.ffn_down.weight": gguf.GGMLQuantizationType.Q4_0,
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
    }
    source = open_model(str(write_gguf(weights, kinds=kinds)))
    expanded, stored = source.weights(), source.stored_weights()
    assert stored.head is None
    np.testing.assert_array_equal(expand(stored.embedding), expanded.embedding)
    found = set()
    for layer, expected in zip(stored.layers, expanded.layers, strict=True):
        for part in fields(layer):
            matrix = getattr(layer, part.name)
            found |= {matrix.kind} if isinstance(matrix, StoredMatrix) else set()
            np.testing.assert_array_equal(expand(matrix), getattr(expected, part.name))
    assert found == {"Q8_0", "Q4_1", "Q4_0"}


def expand(matrix: Matrix) -> Float:
    if not isinstance(matrix, StoredMatrix):
        return matrix
    (kind,) = (known for known in GGML_TYPES.values() if known.name == matrix.kind)
    return kind.dequantize(matrix.rows.reshape(-1)).reshape(-1, matrix.inputs)


def test_progress_of_stored_weights_rises_to_one(write_gguf: WriteGguf, weights: ModelWeights) -> None:
    heard: list[float] = []
    list(open_model(str(write_gguf(weights))).stored_weights(heard.append).layers)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_progress_rises_to_one(write_gguf: WriteGguf, weights: ModelWeights) -> None:
    heard: list[float] = []
    open_model(str(write_gguf(weights))).weights(heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_template_and_tokenizer_come_along(write_gguf: WriteGguf, weights: ModelWeights) -> None:
    source = open_model(str(write_gguf(weights)))
    template = source.chat_template()
    assert template is not None
    text = template.render([ChatMessage("user", "the fox")], add_generation_prompt=True)
    tokens = source.tokenizer().encode(text, special=True)
    assert tokens[0] == 1
    assert source.tokenizer().decode(tokens, skip_special=False) == text
    silent = open_model(str(write_gguf(weights, metadata={"tokenizer.chat_template": None}, name="s.gguf")))
    assert silent.chat_template() is None


def test_a_sliding_window_bounds_the_context(write_gguf: WriteGguf, weights: ModelWeights) -> None:
    path = write_gguf(weights, metadata={"llama.attention.sliding_window": 100})
    assert open_model(str(path)).spec.context == 100


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 3}, "tensor blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 1 << 31}, "layers is"),
        ({"llama.block_count": 1}, "blk.1.attn_k.weight does not belong"),
        ({"llama.embedding_length": "many"}, "embedding_length is 'many'; expected a number"),
        ({"llama.embedding_length": 128, "llama.attention.key_length": 16}, "has shape"),
        ({"llama.attention.head_count": 0}, "heads is 0"),
        ({"llama.attention.head_count_kv": 3}, "4 heads cannot share 3"),
        ({"llama.attention.head_count": [4, 4]}, "head_count is"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms epsilon"),
        ({"llama.rope.freq_base": 0.0}, "rope theta"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count differs"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling .yarn. is not supported"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.context_length": 0}, "context is 0"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        (
            {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1]},
            "outside the vocabulary",
        ),
        ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token_id is 9999"),
        ({"general.alignment": 12}, "general.alignment is 12"),
    ],
)
def test_names_the_wrong_metadata(
    write_gguf: WriteGguf, weights: ModelWeights, metadata: dict[str, object], problem: str
) -> None:
    path = write_gguf(weights, metadata=metadata)
    with pytest.raises(ModelError, match=problem) as caught:
        open_model(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.pre": "tekken"}, "'tekken' is not supported .supported: .*smollm"),
        ({"tokenizer.ggml.token_type": [1]}, "differ in length"),
        ({"tokenizer.ggml.merges": ["nosuch pair"]}, "not made of tokens"),
        ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
    ],
)
def test_names_the_wrong_vocabulary(
    write_gguf: WriteGguf, weights: ModelWeights, metadata: dict[str, object], problem: str
) -> None:
    source = open_model(str(write_gguf(weights, metadata=metadata)))
    with pytest.raises(ModelError, match=problem):
        source.tokenizer()


def test_names_the_wrong_tensor(write_gguf: WriteGguf, weights: ModelWeights) -> None:
    flaws = {
        "blk.1.ffn_up.weight is missing": {"blk.1.ffn_up.weight": None},
        "output_norm.weight has shape": {"output_norm.weight": np.ones(63, np.float32)},
        "blk.0.attn_q.bias does not belong": {"blk.0.attn_q.bias": np.ones(64, np.float32)},
        "rope_freqs.weight does not belong": {"rope_freqs.weight": np.ones(8, np.float32)},
    }
    for problem, tensors in flaws.items():
        with pytest.raises(ModelError, match=problem):
            open_model(str(write_gguf(weights, tensors=tensors)))


def test_names_the_supported_architectures(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"architecture 'falcon' is not supported \(supported: llama\)"):
        open_model(str(tmp_path / "falcon.gguf"))

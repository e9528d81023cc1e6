"""Every family against transformers: logit for logit within a tolerance, and token for token.

Fixtures: see ``model_fixtures``. Their weights are exact in bf16, as published ones are, so what is left of
the native runner's error are KV and inputs of products, which it rounds to bf16. Logits have a spread of 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

import model_fixtures
from memserve import _native
from memserve.core.config import ModelConfig
from memserve.core.errors import ConfigError
from memserve.engine.context import context_of
from memserve.engine.models.loader import ModelSource, open_model
from memserve.engine.models.rope import FrequencyDivisors, Llama3Scaling, YarnScaling
from memserve.engine.models.spec import Float, ModelSpec, ModelWeights
from memserve.engine.runners.base import ForwardBatch, Runner
from memserve.engine.runners.native import NativeRunner
from memserve.engine.runners.reference import ReferenceRunner
from model_fixtures import Fixture

REFERENCE_TOLERANCE = 2e-5
"""Largest difference of any logit; transformers itself computes in float32."""
NATIVE_TOLERANCE = 0.02
"""Root of the mean square over a fixture's logits; a single logit may be off by ten times that.

The reference runner with inputs and KV rounded to bf16 is about as far away."""
NAMES = model_fixtures.fixture_names()
EVERY_ISA = [*_native.supported_isas(), *_native.emulated_isas()]


@pytest.fixture(params=NAMES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return model_fixtures.load_fixture(request.param)


@pytest.fixture
def source(fixture: Fixture, tmp_path: Path) -> ModelSource:
    return open_folder(fixture, tmp_path)


def open_folder(fixture: Fixture, path: Path) -> ModelSource:
    folder = path / fixture.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fixture.config))
    save_file(fixture.tensors, folder / "model.safetensors")
    return open_model(str(folder))


class Conversation:
    """One sequence on a runner with memory of its own."""

    def __init__(self, runner: Runner, context: int = 128) -> None:
        self._runner = runner
        size = runner.layout.block_bytes
        count = runner.layout.blocks_for(context)
        self._memory = np.full(count * size, 0xFF, np.uint8)
        self._blocks = np.uint64(self._memory.ctypes.data) + np.arange(count, dtype=np.uint64) * np.uint64(
            size
        )
        self._length = 0

    def extend(self, tokens: Sequence[int] | np.ndarray) -> Float:
        """Logits of all ``tokens``."""
        rows = np.arange(len(tokens), dtype=np.int32)
        starts = np.array([0, len(tokens)], np.int32)
        positions = rows + np.int32(self._length)
        self._length += len(tokens)
        batch = ForwardBatch(np.array(tokens, np.int32), positions, starts, self._blocks[None], rows)
        return self._runner.forward(batch)

    def continue_greedily(self, logits: Float, steps: int) -> list[int]:
        found = [int(logits[-1].argmax())]
        while len(found) < steps:
            found.append(int(self.extend(found[-1:])[0].argmax()))
        return found


def check_tokens(runner: Runner, fixture: Fixture) -> Float:
    """Check that greedy tokens are those of transformers; returns the errors of the prompt's logits."""
    talk = Conversation(runner)
    logits = talk.extend(fixture.prompt)
    assert talk.continue_greedily(logits, len(fixture.greedy)) == fixture.greedy.tolist()
    errors: Float = np.abs(logits[fixture.rows] - fixture.logits)
    return errors


def mean_of(errors: Float) -> float:
    return float(np.sqrt((errors**2).mean()))


def test_every_family_is_there() -> None:
    families = {model_fixtures.load_fixture(name).config["architectures"][0] for name in NAMES}  # type: ignore[index]
    assert families == {f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}


def test_reference_runner_equals_transformers(fixture: Fixture, source: ModelSource) -> None:
    errors = check_tokens(ReferenceRunner(source.weights()), fixture)
    assert errors.max() < REFERENCE_TOLERANCE


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_native_runner_equals_transformers(fixture: Fixture, source: ModelSource, isa: str) -> None:
    runner = NativeRunner(source.weights(), threads=1, context=128, isa=isa)
    errors = check_tokens(runner, fixture)
    runner.close()
    assert mean_of(errors) < NATIVE_TOLERANCE
    assert errors.max() < 10 * NATIVE_TOLERANCE


TRAITS: dict[str, Callable[[ModelWeights], None]] = {
    "llama-2-linear": lambda weights: set_spec(weights, rope_scaling=None),
    "llama-3.1": lambda weights: set_spec(weights, rope_scaling=None),
    "qwen2.5-yarn": lambda weights: set_spec(
        weights, rope_scaling=msgspec.structs.replace(weights.spec.rope_scaling, attention_factor=1.0)
    ),
    "qwen2": lambda weights: set_layers(weights, k_bias=None),
    "qwen3": lambda weights: set_layers(weights, q_norm=None),
}


def set_spec(weights: ModelWeights, **changed: object) -> None:
    weights.spec = dataclasses.replace(weights.spec, **changed)  # type: ignore[arg-type]


def set_layers(weights: ModelWeights, **changed: object) -> None:
    weights.layers = [dataclasses.replace(layer, **changed) for layer in weights.layers]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TRAITS)
def test_fixtures_would_notice_what_is_forgotten(name: str, tmp_path: Path) -> None:
    """A model without what sets its family apart is far outside either tolerance."""
    fixture = model_fixtures.load_fixture(name)
    weights = open_folder(fixture, tmp_path).weights()
    TRAITS[name](weights)
    logits = Conversation(ReferenceRunner(weights)).extend(fixture.prompt)
    assert mean_of(logits[fixture.rows] - fixture.logits) > 3 * NATIVE_TOLERANCE


def test_a_window_bounds_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_folder(model_fixtures.load_fixture("mistral-0.1"), tmp_path)
    assert (source.spec.window, source.spec.context) == (96, 96)
    assert context_of(source.spec, ModelConfig(context=96)) == 96
    with pytest.raises(ConfigError, match=r"context is 97; accepted: 2 to 96 .* sliding window"):
        context_of(source.spec, ModelConfig(context=97))
    assert context_of(source.spec, ModelConfig()) == 96
    assert "96 tokens, the model's sliding window" in caplog.text
    nemo = open_folder(model_fixtures.load_fixture("mistral-nemo"), tmp_path).spec
    assert (nemo.window, nemo.context, nemo.head_dim) == (None, 256, 48)


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    spec = open_folder(model_fixtures.load_fixture("qwen2.5-yarn"), tmp_path).spec
    assert isinstance(spec.rope_scaling, YarnScaling)
    assert spec.context == 4 * 64


Q8_0 = gguf.GGMLQuantizationType.Q8_0
GGUF_FAMILIES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def write_gguf(fixture: Fixture, spec: ModelSpec, path: Path, *, quantised: bool = False) -> Path:
    """The fixture as llama.cpp's converter writes it; keys and tensors named by the ``gguf`` package."""
    arch = GGUF_FAMILIES[spec.architecture]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(spec.layers)
    writer.add_context_length(int(fixture.config["max_position_embeddings"]))  # type: ignore[call-overload]
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.feed_forward)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.rms_epsilon)
    writer.add_rope_freq_base(spec.rope_theta)
    if spec.window:
        writer.add_sliding_window(spec.window)
    add_rope_scaling(writer, fixture)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {index}" for index in range(spec.vocabulary)])
    names = gguf.get_tensor_name_map(arch, spec.layers)
    for name, values in fixture.tensors.items():
        if arch is gguf.MODEL_ARCH.LLAMA and "q_proj" in name:
            values = interleaved(values, spec.heads)
        if arch is gguf.MODEL_ARCH.LLAMA and "k_proj" in name:
            values = interleaved(values, spec.kv_heads)
        kind = Q8_0 if quantised and values.ndim == 2 and values.shape[1] % 32 == 0 else None
        raw = values if kind is None else gguf.quantize(values, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_rope_scaling(writer: gguf.GGUFWriter, fixture: Fixture) -> None:
    rope = fixture.config["rope_parameters"]
    assert isinstance(rope, dict)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors_of_llama3(rope, int(fixture.config["head_dim"])))  # type: ignore[call-overload]


def divisors_of_llama3(rope: dict[str, float], head_dim: int) -> Float:
    """How much longer each wave becomes, wave by wave as in Meta's published code."""
    divisors = []
    for pair in range(head_dim // 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        original = rope["original_max_position_embeddings"]
        if wave < original / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wave > original / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (original / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def interleaved(rows: Float, heads: int) -> Float:
    """Rows of the halves of each head alternate, as GGUF files of Llamas have them."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def test_gguf_gives_the_same_model(fixture: Fixture, source: ModelSource, tmp_path: Path) -> None:
    file = open_model(str(write_gguf(fixture, source.spec, tmp_path / "model.gguf")))
    expected, found = source.weights(), file.weights()
    np.testing.assert_array_equal(found.embedding, expected.embedding)
    np.testing.assert_array_equal(found.head, expected.head)
    assert (found.head is found.embedding) == (expected.head is expected.embedding)
    for left, right in zip(found.layers, expected.layers, strict=True):
        for part in dataclasses.fields(left):
            values, wanted = getattr(left, part.name), getattr(right, part.name)
            assert (values is None) == (wanted is None)
            np.testing.assert_array_equal(values, wanted)
    for name in ("context", "window", "attention_bias", "qk_norm", "head_dim", "rope_theta"):
        assert getattr(file.spec, name) == getattr(source.spec, name)
    assert file.spec.rope_amplitude() == pytest.approx(source.spec.rope_amplitude())
    errors = check_tokens(ReferenceRunner(found), fixture)
    assert errors.max() < REFERENCE_TOLERANCE


def test_stored_weights_are_the_same_model(fixture: Fixture, source: ModelSource, tmp_path: Path) -> None:
    """In the file's own blocks or expanded: the same bits, so order, biases and norms are right in both."""
    file = open_model(str(write_gguf(fixture, source.spec, tmp_path / "model.gguf", quantised=True)))
    runners = [NativeRunner(w, threads=1, context=128) for w in (file.stored_weights(), file.weights())]
    stored, expanded = (Conversation(runner).extend(fixture.prompt) for runner in runners)
    np.testing.assert_array_equal(stored, expanded)
    # Eight bits cost accuracy: the bound only says that it is the right model.
    assert mean_of(stored[fixture.rows] - fixture.logits) < 3 * NATIVE_TOLERANCE
    for runner in runners:
        runner.close()


def test_llama3_scaling_is_the_same_in_both_forms(tmp_path: Path) -> None:
    fixture = model_fixtures.load_fixture("llama-3.1")
    source = open_folder(fixture, tmp_path)
    file = open_model(str(write_gguf(fixture, source.spec, tmp_path / "model.gguf")))
    assert isinstance(source.spec.rope_scaling, Llama3Scaling)
    assert isinstance(file.spec.rope_scaling, FrequencyDivisors)
    assert len(set(file.spec.rope_scaling.divisors)) > 1
    np.testing.assert_allclose(file.spec.rope_frequencies(), source.spec.rope_frequencies(), rtol=1e-6)

"""Llama models from Hugging Face folders: the weights arrive unchanged, and every flaw is named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memserve.core.errors import ModelError
from memserve.engine.models.chat_template import ChatMessage
from memserve.engine.models.loader import open_model
from memserve.engine.models.spec import ModelWeights

WriteFolder = Callable[..., Path]
WriteGguf = Callable[..., Path]
SameWeights = Callable[[ModelWeights, ModelWeights], None]


@pytest.mark.parametrize("kind", ["weights", "untied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_arrive_unchanged(
    kind: str,
    shards: int,
    request: pytest.FixtureRequest,
    write_folder: WriteFolder,
    same_weights: SameWeights,
) -> None:
    weights: ModelWeights = request.getfixturevalue(kind)
    source = open_model(str(write_folder(weights, shards=shards)))
    same_weights(source.weights(), weights)
    assert source.spec.vocabulary == weights.spec.vocabulary
    assert source.spec.eos_tokens == (2,)
    assert source.spec.identity.startswith("llamaforcausallm-")


def test_half_precision_is_widened(write_folder: WriteFolder, weights: ModelWeights) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    half = weights.layers[0].up.astype(np.float16)
    loaded = open_model(str(write_folder(weights, tensors={name: half}))).weights()
    np.testing.assert_array_equal(loaded.layers[0].up, half.astype(np.float32))


def test_bfloat16_is_widened(write_folder: WriteFolder, weights: ModelWeights) -> None:
    """A bf16 file is an f32 file whose numbers lost their lower halves."""
    folder = write_folder(weights)
    truncated = weights.layers[0].up.view(np.uint32) & np.uint32(0xFFFF0000)
    rewrite_as_bf16(folder / "model.safetensors")
    loaded = open_model(str(folder)).weights()
    np.testing.assert_array_equal(loaded.layers[0].up, truncated.view(np.float32))


def rewrite_as_bf16(path: Path) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    for entry in header.values():
        entry["dtype"] = "BF16"
        entry["data_offsets"] = [offset // 2 for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    upper = np.frombuffer(raw[8 + length :], np.uint16)[1::2]
    path.write_bytes(struct.pack("<Q", len(text)) + text + upper.tobytes())


def test_equals_the_same_model_as_gguf(
    write_folder: WriteFolder, write_gguf: WriteGguf, weights: ModelWeights
) -> None:
    folder, file = open_model(str(write_folder(weights))), open_model(str(write_gguf(weights)))
    messages = [ChatMessage("user", "naïve café 123\n\n漢字 👋🏽")]
    templates = folder.chat_template(), file.chat_template()
    assert templates[0] is not None
    assert templates[1] is not None
    text = templates[0].render(messages, add_generation_prompt=True)
    assert templates[1].render(messages, add_generation_prompt=True) == text
    tokens = folder.tokenizer().encode(text, special=True)
    np.testing.assert_array_equal(file.tokenizer().encode(text, special=True), tokens)
    assert folder.tokenizer().decode(tokens, skip_special=True) == file.tokenizer().decode(
        tokens, skip_special=True
    )
    assert folder.tokenizer().bos_token == file.tokenizer().bos_token == 1


def test_template_file_goes_first(write_folder: WriteFolder, weights: ModelWeights) -> None:
    folder = write_folder(weights)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    template = open_model(str(folder)).chat_template()
    assert template is not None
    assert template.render([ChatMessage("user", "hi")], add_generation_prompt=True) == "hi<|im_end|>"


def test_template_may_be_one_of_several(write_folder: WriteFolder, weights: ModelWeights) -> None:
    folder = write_folder(weights)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = open_model(str(folder)).chat_template()
    assert template is not None
    assert template.render([], add_generation_prompt=True) == "yes"


def test_generation_config_names_more_eos_tokens(write_folder: WriteFolder, weights: ModelWeights) -> None:
    folder = write_folder(weights)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert open_model(str(folder)).spec.eos_tokens == (0, 2)


def test_tokenizer_settings_name_one_more(write_folder: WriteFolder, weights: ModelWeights) -> None:
    folder = write_folder(weights)
    added = {"1": {"content": "<|im_start|>"}, "2": {"content": "</s>"}, "7": {"content": "<|im_end|>"}}
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_model(str(folder)).spec.eos_tokens == (2, 7)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not supported .*supported: LlamaForCausalLM",
        ),
        ({"architectures": []}, "architecture unknown is not supported"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "layers is 0"),
        ({"num_attention_heads": -4}, "heads is -4"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"vocab_size": 321}, "embed_tokens.weight has shape"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs low_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor is 4.0; it must be above",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "YaRN with mscale"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "'longrope' is not supported .*supported: default, linear, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*GGUF"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "q_proj.bias is missing"),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}, "q_norm.weight is missing"),
        (
            {"architectures": ["Qwen3ForCausalLM"]},
            r"q_proj.weight has shape \(64, 64\); expected \(512, 64\)",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "biases of output .* are not supported"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"eos_token_id": 9999}, "eos token 9999 is outside"),
    ],
)
def test_names_the_wrong_config(
    write_folder: WriteFolder, weights: ModelWeights, config: dict[str, object], problem: str
) -> None:
    folder = write_folder(weights, config=config)
    with pytest.raises(ModelError, match=problem) as caught:
        open_model(str(folder))
    assert str(folder) in str(caught.value)


def test_mistral_with_a_window(write_folder: WriteFolder, weights: ModelWeights) -> None:
    folder = write_folder(weights, config={"architectures": ["MistralForCausalLM"], "sliding_window": 64})
    assert open_model(str(folder)).spec.context == 64


def test_names_the_wrong_tensor(write_folder: WriteFolder, weights: ModelWeights) -> None:
    flaws = {
        "norm.weight is missing": {"model.norm.weight": None},
        "norm.weight has shape": {"model.norm.weight": np.ones(63, np.float32)},
        "has type I32": {"model.norm.weight": np.ones(64, np.int32)},
        "q_proj.bias does not belong": {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)},
    }
    for problem, tensors in flaws.items():
        with pytest.raises(ModelError, match=problem):
            open_model(str(write_folder(weights, tensors=tensors)))


def test_old_rope_buffers_are_ignored(write_folder: WriteFolder, weights: ModelWeights) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    assert open_model(str(write_folder(weights, tensors=buffer))).spec.layers == 2


def test_truncation_is_an_error(write_folder: WriteFolder, weights: ModelWeights) -> None:
    folder = write_folder(weights)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            open_model(str(folder))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"t": 1}',
        b'{"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"t": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"t": {"dtype": "F32", "shape": [1152921504606846976], "data_offsets": [0, 4611686018427387904]}}',
        b'{"t": {"dtype": "F32", "shape": [1]}}',
    ],
)
def test_a_wrong_header_is_an_error(write_folder: WriteFolder, weights: ModelWeights, header: bytes) -> None:
    folder = write_folder(weights)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        open_model(str(folder))


def test_shards_stay_in_their_folder(write_folder: WriteFolder, weights: ModelWeights) -> None:
    folder = write_folder(weights)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has neither"):
        open_model(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="not the name of a safetensors file"):
        open_model(str(folder))
    index.write_text(json.dumps({"weight_map": {"t": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone\.safetensors: cannot be read"):
        open_model(str(folder))


def test_a_tokenizer_is_needed(write_folder: WriteFolder, weights: ModelWeights) -> None:
    folder = write_folder(weights)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        open_model(str(folder)).tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        open_model(str(folder)).tokenizer()

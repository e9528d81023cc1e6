"""Model files of every supported form, written by other libraries than the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from memserve.engine.models.spec import Float, ModelWeights
from memserve.engine.models.tiny import tiny_weights

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café 12345 — the end\n\n  of the line",
    "漢字 👋🏽",
]
GGUF_PARTS = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
HF_PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@pytest.fixture(scope="session")
def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, trained on three lines: 3 special tokens and 320 tokens in all."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(CORPUS * 3, trainer)
    return engine


@pytest.fixture(scope="session")
def weights(byte_level: tokenizers.Tokenizer) -> ModelWeights:
    return tiny_weights(1, hidden=64, heads=4, kv_heads=2, vocabulary=byte_level.get_vocab_size())


@pytest.fixture(scope="session")
def untied(byte_level: tokenizers.Tokenizer) -> ModelWeights:
    return tiny_weights(2, layers=1, vocabulary=byte_level.get_vocab_size(), tied=False)


WriteGguf = Callable[..., Path]
WriteFolder = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> WriteGguf:
    """``write(weights, metadata=..., tensors=..., kinds=...)``: a GGUF file of a tiny model.

    ``metadata`` and ``tensors`` replace entries, None drops one; ``kinds`` gives tensors a GGML type.
    """

    def write(
        weights: ModelWeights,
        *,
        metadata: dict[str, object] | None = None,
        tensors: dict[str, Float | None] | None = None,
        kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
        name: str = "model.gguf",
    ) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for key, value in (gguf_metadata(weights, byte_level) | (metadata or {})).items():
            add_metadata(writer, key, value)
        for key, values in (gguf_tensors(weights) | (tensors or {})).items():
            if values is not None:
                kind = (kinds or {}).get(key)
                raw = values if kind is None else gguf.quantize(values, kind)
                writer.add_tensor(key, raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


def add_metadata(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        adders[type(value)](key, value)


def gguf_metadata(weights: ModelWeights, engine: tokenizers.Tokenizer) -> dict[str, object]:
    spec, file = weights.spec, json.loads(engine.to_str())
    tokens = sorted(engine.get_vocab(), key=engine.get_vocab().__getitem__)
    return {
        "general.name": "Tiny Test",
        "llama.block_count": spec.layers,
        "llama.context_length": spec.context,
        "llama.embedding_length": spec.hidden,
        "llama.feed_forward_length": spec.feed_forward,
        "llama.attention.head_count": spec.heads,
        "llama.attention.head_count_kv": spec.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": spec.rms_epsilon,
        "llama.rope.freq_base": spec.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in file["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def gguf_tensors(weights: ModelWeights) -> dict[str, Float | None]:
    spec = weights.spec
    tensors: dict[str, Float | None] = {
        "token_embd.weight": weights.embedding,
        "output_norm.weight": weights.output_norm,
    }
    if weights.head is not weights.embedding:
        tensors["output.weight"] = weights.head
    for index, layer in enumerate(weights.layers):
        parts = {part: getattr(layer, part) for part in GGUF_PARTS}
        parts["q"] = interleave(layer.q, spec.heads)
        parts["k"] = interleave(layer.k, spec.kv_heads)
        tensors |= {f"blk.{index}.{GGUF_PARTS[part]}.weight": values for part, values in parts.items()}
    return tensors


def interleave(rows: Float, heads: int) -> Float:
    """The row order that converters give q and k: row i of the first half next to row i of the second."""
    size = len(rows) // heads
    order = [
        h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)
    ]
    return rows[order]


@pytest.fixture
def write_folder(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> WriteFolder:
    """``write(weights, config=..., tensors=..., shards=1)``: a Hugging Face folder of a tiny model."""

    def write(
        weights: ModelWeights,
        *,
        config: dict[str, object] | None = None,
        tensors: dict[str, Float | None] | None = None,
        shards: int = 1,
    ) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        settings = {
            key: value for key, value in (hf_config(weights) | (config or {})).items() if value is not None
        }
        (folder / "config.json").write_text(json.dumps(settings))
        chosen = {
            key: value for key, value in (hf_tensors(weights) | (tensors or {})).items() if value is not None
        }
        save_shards(folder, chosen, shards)
        byte_level.save(str(folder / "tokenizer.json"))
        words = {
            "bos_token": "<|im_start|>",
            "eos_token": {"content": "<|im_end|>"},
            "chat_template": TEMPLATE,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
        return folder

    return write


def save_shards(folder: Path, tensors: dict[str, Float], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    where = {name: f"model-{at % shards + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def hf_config(weights: ModelWeights) -> dict[str, object]:
    spec = weights.spec
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "intermediate_size": spec.feed_forward,
        "vocab_size": spec.vocabulary,
        "max_position_embeddings": spec.context,
        "rope_theta": spec.rope_theta,
        "rms_norm_eps": spec.rms_epsilon,
        "tie_word_embeddings": weights.head is weights.embedding,
        "eos_token_id": 2,
    }


def hf_tensors(weights: ModelWeights) -> dict[str, Float | None]:
    tensors: dict[str, Float | None] = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.output_norm,
    }
    if weights.head is not weights.embedding:
        tensors["lm_head.weight"] = weights.head
    for index, layer in enumerate(weights.layers):
        for part, name in HF_PARTS.items():
            tensors[f"model.layers.{index}.{name}.weight"] = getattr(layer, part)
    return tensors


@pytest.fixture(scope="session")
def same_weights() -> Callable[[ModelWeights, ModelWeights], None]:
    """``check(a, b)``: all tensors equal bit for bit."""

    def check(a: ModelWeights, b: ModelWeights) -> None:
        np.testing.assert_array_equal(a.embedding, b.embedding)
        np.testing.assert_array_equal(a.head, b.head)
        np.testing.assert_array_equal(a.output_norm, b.output_norm)
        assert len(a.layers) == len(b.layers)
        for left, right in zip(a.layers, b.layers, strict=True):
            for part in GGUF_PARTS:
                np.testing.assert_array_equal(getattr(left, part), getattr(right, part))

    return check

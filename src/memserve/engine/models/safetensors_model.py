"""A Llama-like model in a Hugging Face folder: config.json, safetensors, tokenizer.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as Engine

from memserve.core.errors import ModelError
from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.hf_config import Eos, read_config, read_spec
from memserve.engine.models.llama import (
    LayerNames,
    Progress,
    TensorNames,
    check_spec,
    check_tensors,
    read_stored_weights,
    read_weights,
)
from memserve.engine.models.safetensors_folder import SafetensorsFolder, parse_json, read_bytes
from memserve.engine.models.spec import ModelWeights, StoredWeights
from memserve.engine.models.tokenizer import Spelling, Tokenizer

_NAMES = TensorNames(
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.{}.",
    LayerNames(
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    ),
)


class _GenerationConfig(msgspec.Struct, frozen=True):
    eos_token_id: Eos = None


class _NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


class _TokenText(msgspec.Struct, frozen=True):
    content: str


class _TokenizerConfig(msgspec.Struct, frozen=True):
    bos_token: str | _TokenText | None = None
    eos_token: str | _TokenText | None = None
    add_bos_token: bool | None = None
    chat_template: str | list[_NamedTemplate] | None = None
    added_tokens_decoder: dict[int, _TokenText] = {}


class SafetensorsModel:
    """Opens the folder and checks configuration and tensor tables; weights are read when asked for.

    Raises ``ModelError`` naming the file and what is wrong.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / "config.json"
        raw = read_bytes(path)
        self._config = read_config(path, raw)
        self._tensors = SafetensorsFolder(folder)
        identity = f"{self._config.architectures[0].lower()}-{self._tensors.fingerprint(raw)}"
        spec = read_spec(path, self._config, identity=identity, eos_tokens=self._eos_tokens())
        self.spec = check_spec(spec, path)
        names = self._tensors.names
        buffers = [name for name in names if name.endswith("rotary_emb.inv_freq")]
        check_tensors(self.spec, self._tensors, _NAMES, names, ignored=buffers)
        if not self._config.tie_word_embeddings and self._tensors.shape(_NAMES.head) is None:
            raise ModelError(
                f"{folder}: tensor {_NAMES.head} is missing, and config.json does not set tie_word_embeddings"
            )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of tokenizer.json and tokenizer_config.json."""
        path, config = self._folder / "tokenizer.json", self._tokenizer_config()
        raw = read_bytes(path)
        try:
            engine = Engine.from_buffer(raw)
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from error
        engine.no_truncation()
        engine.no_padding()
        decoder = parse_json(path, raw, _TokenizerFile).decoder
        bos = _token_id(engine, config.bos_token)
        adds_bos = config.add_bos_token
        return Tokenizer(
            engine,
            _spelling_of(path, decoder),
            eos_tokens=self.spec.eos_tokens,
            bos_token=bos,
            add_bos=engine.encode("").ids[:1] == [bos] if adds_bos is None else adds_bos,
            strips_space=_strips_space(decoder),
        )

    def chat_template(self) -> ChatTemplate | None:
        """The template of chat_template.jinja or tokenizer_config.json, or None when there is none."""
        config = self._tokenizer_config()
        source = config.chat_template
        if isinstance(source, list):
            source = next((entry.template for entry in source if entry.name == "default"), None)
        file = self._folder / "chat_template.jinja"
        if file.exists():
            source = read_bytes(file).decode(errors="replace")
        if source is None:
            return None
        return ChatTemplate(source, bos_token=_text(config.bos_token), eos_token=_text(config.eos_token))

    def weights(self, progress: Progress | None = None) -> ModelWeights:
        """All weights in float32; ``progress`` hears the fraction done."""
        weights = read_weights(self.spec, self._tensors, _NAMES, progress)
        if self._config.tie_word_embeddings:
            weights.head = weights.embedding
        return weights

    def stored_weights(self, progress: Progress | None = None) -> StoredWeights:
        """All weights, a layer at a time; ``progress`` hears the fraction of layers done."""
        weights = read_stored_weights(self.spec, self._tensors, _NAMES, progress)
        return dataclasses.replace(weights, head=None) if self._config.tie_word_embeddings else weights

    def _eos_tokens(self) -> tuple[int, ...]:
        path = self._folder / "generation_config.json"
        generation = parse_json(path, read_bytes(path), _GenerationConfig) if path.exists() else None
        configs = (generation, self._config) if generation else (self._config,)
        listed = [token for config in configs for token in _as_list(config.eos_token_id)]
        # Fine-tuned chat models often name their end of turn in the tokenizer's settings only.
        words = self._tokenizer_config()
        end, known = _text(words.eos_token), words.added_tokens_decoder.items()
        listed += [
            token for token, entry in known if entry.content == end and token < self._config.vocab_size
        ]
        return tuple(dict.fromkeys(listed))

    def _tokenizer_config(self) -> _TokenizerConfig:
        path = self._folder / "tokenizer_config.json"
        return parse_json(path, read_bytes(path), _TokenizerConfig) if path.exists() else _TokenizerConfig()


class _TokenizerFile(msgspec.Struct, frozen=True):
    decoder: dict[str, Any] | None = None


def _as_list(tokens: Eos) -> list[int]:
    if tokens is None:
        return []
    return tokens if isinstance(tokens, list) else [tokens]


def _text(token: str | _TokenText | None) -> str:
    return token.content if isinstance(token, _TokenText) else token or ""


def _token_id(engine: Engine, token: str | _TokenText | None) -> int | None:
    return engine.token_to_id(_text(token)) if token is not None else None


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]


def _spelling_of(path: Path, decoder: dict[str, Any] | None) -> Spelling:
    kinds = [step.get("type") for step in _steps(decoder)]
    if "ByteLevel" in kinds:
        return Spelling.BYTE_LEVEL
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return Spelling.BYTE_FALLBACK
    raise ModelError(
        f"{path}: decoder {kinds} is not supported (supported: ByteLevel, ByteFallback, Metaspace)"
    )


def _strips_space(decoder: dict[str, Any] | None) -> bool:
    return any(
        (step.get("type") == "Strip" and step.get("content") == " " and step.get("start") == 1)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in _steps(decoder)
    )

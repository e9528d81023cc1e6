"""Builds tokenizers from GGUF vocabularies: GPT-2 style BPE by pre-tokenizer name, and SentencePiece BPE.

The regular expressions are those of the models' own ``tokenizer.json`` files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from memserve.core.errors import ModelError
from memserve.engine.models.spec import Float
from memserve.engine.models.tokenizer import Spelling, Tokenizer

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Token types in GGUF files that are no plain text."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}
_TIKTOKEN = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Begin texts with bos, and take a piece that is a token as it stands, even where no merges lead to it."""
_SINGLE_DIGITS = ("smollm", "starcoder", "refact")
_PLAIN = ("default", "gpt-2", "gpt2", "olmo")


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What a GGUF file says about its tokenizer; ``path`` is for messages. None: the file says nothing."""

    path: Path
    model: str
    pre: str
    tokens: list[str]
    types: Float | None
    scores: Float | None
    merges: list[str]
    bos: int | None
    eos: int | None
    unknown: int | None
    add_bos: bool | None
    add_space_prefix: bool | None

    def text_of(self, token: int | None) -> str:
        """A token as it is spelt in the vocabulary; empty for None."""
        return "" if token is None else self.tokens[token]

    def of_type(self, kind: int) -> list[int]:
        """Ids of all tokens of one type, ascending."""
        return [] if self.types is None else np.flatnonzero(self.types == kind).tolist()

    def find(self, text: str, kind: int) -> int | None:
        """The token of type ``kind`` that is spelt ``text``, if there is one."""
        return next((token for token in self.of_type(kind) if self.tokens[token] == text), None)

    def fail(self, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {problem}")


def build_tokenizer(words: Vocabulary, eos_tokens: tuple[int, ...]) -> Tokenizer:
    """The tokenizer of a GGUF vocabulary. Raises ``ModelError`` for kinds that are not supported."""
    ids = {text: token for token, text in enumerate(words.tokens)}
    if len(ids) != len(words.tokens):
        raise words.fail(f"tokenizer.ggml.tokens has {len(words.tokens) - len(ids)} repeated tokens")
    if words.types is not None and len(words.types) != len(words.tokens):
        raise words.fail("tokenizer.ggml.token_type and tokenizer.ggml.tokens differ in length")
    if words.model == "gpt2":
        engine, spelling = _build_byte_level(words, ids), Spelling.BYTE_LEVEL
    elif words.model == "llama":
        engine, spelling = _build_sentencepiece(words, ids), Spelling.BYTE_FALLBACK
    else:
        raise words.fail(f"tokenizer.ggml.model {words.model!r} is not supported (supported: gpt2, llama)")
    _add_tokens(engine, words)
    sentencepiece = spelling is Spelling.BYTE_FALLBACK
    return Tokenizer(
        engine,
        spelling,
        eos_tokens=eos_tokens,
        bos_token=words.bos,
        add_bos=_adds_bos(words),
        strips_space=sentencepiece and words.add_space_prefix is not False,
    )


def _adds_bos(words: Vocabulary) -> bool:
    if words.add_bos is not None:
        return words.add_bos
    return words.model == "llama" or words.pre in _TIKTOKEN


def _add_tokens(engine: Engine, words: Vocabulary) -> None:
    for kind, special in ((UNKNOWN, True), (CONTROL, True), (USER_DEFINED, False)):
        texts = [words.tokens[token] for token in words.of_type(kind)]
        entries = [AddedToken(text, special=special, normalized=False) for text in texts if text]
        (engine.add_special_tokens if special else engine.add_tokens)(entries)


def _build_byte_level(words: Vocabulary, ids: dict[str, int]) -> Engine:
    split = _SPLITS.get(words.pre)
    merges = _parse_merges(words, ids)
    engine = Engine(models.BPE(vocab=ids, merges=merges, ignore_merges=words.pre in _TIKTOKEN))
    engine.pre_tokenizer = _pre_tokenizer(words, split)
    engine.decoder = decoders.ByteLevel()
    if words.pre == "qwen2":
        engine.normalizer = normalizers.NFC()
    return engine


def _pre_tokenizer(words: Vocabulary, split: str | None) -> pre_tokenizers.PreTokenizer:
    if split is not None:
        isolated = pre_tokenizers.Split(Regex(split), behavior="isolated")
        return pre_tokenizers.Sequence(
            [isolated, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words.pre in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if words.pre in _PLAIN:
        return plain
    supported = ", ".join([*_PLAIN, *_SINGLE_DIGITS, *_SPLITS])
    raise words.fail(f"tokenizer.ggml.pre {words.pre!r} is not supported (supported: {supported})")


def _parse_merges(words: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in words.merges:
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise words.fail(f"tokenizer.ggml.merges has {merge!r}, which is not made of tokens")
        merges.append((left, right))
    return merges


def _build_sentencepiece(words: Vocabulary, ids: dict[str, int]) -> Engine:
    if words.scores is None or len(words.scores) != len(words.tokens):
        raise words.fail("tokenizer.ggml.scores is missing or not as long as tokenizer.ggml.tokens")
    missing = next((byte for byte in range(256) if f"<0x{byte:02X}>" not in ids), None)
    if missing is not None:
        raise words.fail(f"tokenizer.ggml.tokens lacks the byte token <0x{missing:02X}>")
    unknown = words.text_of(words.unknown) or None
    merges = _merges_by_score(words, ids)
    engine = Engine(
        models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if words.add_space_prefix is not False:
        spaces.insert(0, normalizers.Prepend("▁"))
    engine.normalizer = normalizers.Sequence(spaces)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return engine


def _merges_by_score(words: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result scores best; as a list of merges, best first."""
    scores = words.scores
    assert scores is not None, "checked by the caller"
    plain = _plain_tokens(words)
    ranked: list[tuple[float, int, int, str, str]] = []
    for text in plain:
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in plain and right in plain:
                ranked.append((-float(scores[ids[text]]), ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _plain_tokens(words: Vocabulary) -> set[str]:
    kept = set(words.tokens)
    for kind in (UNKNOWN, CONTROL, BYTE):
        kept -= {words.tokens[token] for token in words.of_type(kind)}
    return kept

"""Text to token ids and back, for any model: one face for every vocabulary that ``tokenizers`` runs.

Decoding works on bytes, so that a stream of tokens can be decoded as it comes: bytes of one character may
be spread over several tokens.
"""

from __future__ import annotations

import codecs
import enum
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import tokenizers

from memserve.core.errors import InvalidRequest
from memserve.core.types import Tokens


class Spelling(enum.Enum):
    """How a vocabulary spells bytes that are not text."""

    BYTE_LEVEL = "byte-level"
    """GPT-2: each byte has a printable stand-in."""
    BYTE_FALLBACK = "byte-fallback"
    """SentencePiece: ``<0xE2>`` for bytes, ``▁`` for a space."""


class Tokenizer:
    """Wraps a ``tokenizers.Tokenizer``, whose normalizer, pre-tokenizer and model it uses to encode.

    ``add_bos`` says whether prompts that are plain text begin with ``bos_token`` (chat templates write it
    themselves). ``strips_space`` says whether decoding drops one leading space, which SentencePiece adds.
    Safe to use from several threads.
    """

    def __init__(
        self,
        engine: tokenizers.Tokenizer,
        spelling: Spelling,
        *,
        eos_tokens: tuple[int, ...],
        bos_token: int | None = None,
        add_bos: bool = False,
        strips_space: bool = False,
    ) -> None:
        self._engine = engine
        self._spelling = spelling
        self.eos_tokens = eos_tokens
        self.bos_token = bos_token
        self.add_bos = add_bos and bos_token is not None
        self.strips_space = strips_space
        self._added = {token: entry.content for token, entry in engine.get_added_tokens_decoder().items()}
        self._special = frozenset(
            token for token, entry in engine.get_added_tokens_decoder().items() if entry.special
        )

    @cached_property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""
        return max(self._engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, special: bool, bos: bool = False) -> Tokens:
        """Token ids of ``text``: int32[n].

        ``special`` True reads special tokens written out in the text (``<|im_start|>``) as such, as rendered
        chat templates need; False treats them as plain text (user-defined tokens that do not steer the model
        are read either way). ``bos`` True puts ``bos_token`` in front where the model expects it, unless the
        text begins with it. Raises ``InvalidRequest`` for text that is not valid Unicode.
        """
        reject_surrogates(text, field="prompt")
        engine = self._engine if special else self._literal_engine
        ids = engine.encode(text, add_special_tokens=False).ids
        if bos and self.add_bos and self.bos_token is not None and ids[:1] != [self.bos_token]:
            ids = [self.bos_token, *ids]
        return np.array(ids, dtype=np.int32)

    def decode(self, tokens: Iterable[int], *, skip_special: bool) -> str:
        """The text of ``tokens``; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        text = self.join_bytes(tokens, skip_special=skip_special).decode(errors="replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; empty for an id beyond the vocabulary."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def token_text(self, token: int) -> str:
        """One token for people; a part of a character shows as U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    def to_json(self) -> str:
        """The vocabulary as a ``tokenizer.json``, for other programs."""
        return self._engine.to_str()

    def is_special(self, token: int) -> bool:
        """Whether a token steers the model and is no text."""
        return token in self._special

    def join_bytes(self, tokens: Iterable[int], *, skip_special: bool) -> bytes:
        """The bytes of all ``tokens``, special ones left out if asked."""
        ids = tokens.tolist() if isinstance(tokens, np.ndarray) else tokens
        skipped = self._special if skip_special else frozenset[int]()
        return b"".join([self.token_bytes(token) for token in ids if token not in skipped])

    @cached_property
    def _literal_engine(self) -> tokenizers.Tokenizer:
        # A copy of its own: flipping the switch on a shared one would race with other threads.
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        engine.encode_special_tokens = True
        return engine

    @cached_property
    def _bytes(self) -> list[bytes]:
        spell = _spell_byte_level if self._spelling is Spelling.BYTE_LEVEL else _spell_byte_fallback
        table = [b""] * self.vocabulary_size
        for text, token in self._engine.get_vocab(with_added_tokens=False).items():
            table[token] = spell(text)
        for token, text in self._added.items():
            table[token] = text.encode()
        return table


class IncrementalDecoder:
    """Decodes a stream of tokens; the pieces, put together, equal ``tokenizer.decode`` of all tokens.

    A piece never ends inside a character. The work per token does not depend on what came before.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_space

    def push(self, tokens: Iterable[int]) -> str:
        """The text that ``tokens`` complete; empty while a character is incomplete."""
        raw = self._tokenizer.join_bytes(tokens, skip_special=self._skip_special)
        return self._strip(self._decoder.decode(raw))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the tokens ended inside a character."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not self._at_start or not text:
            return text
        self._at_start = False
        return text[1:] if text.startswith(" ") else text


def reject_surrogates(text: str, *, field: str) -> None:
    """Raise ``InvalidRequest`` if ``text`` has lone surrogates, which no encoding can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} "
            f"at character {error.start}",
            field=field,
        ) from error


def _printable_bytes() -> dict[int, int]:
    """GPT-2's stand-ins: Latin-1 bytes that print stand for themselves, the others for U+0100 upwards."""
    themselves = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in themselves]
    table = {byte: byte for byte in themselves} | {256 + at: byte for at, byte in enumerate(others)}
    # Characters that are nobody's stand-in must not pass for the byte of their own number.
    return table | dict.fromkeys(others, 0xFFFF)


_BYTE_LEVEL = _printable_bytes()


def _spell_byte_level(text: str) -> bytes:
    try:
        return text.translate(_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()


def _spell_byte_fallback(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace("▁", " ").encode()

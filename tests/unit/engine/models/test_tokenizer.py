"""Tokenizers: equal to ``tokenizers`` and to brute force on the same vocabulary; streams decode exactly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memserve.core.errors import InvalidRequest, ModelError
from memserve.engine.models.loader import open_model
from memserve.engine.models.tokenizer import IncrementalDecoder, Spelling, Tokenizer
from memserve.engine.models.vocabulary import BYTE, CONTROL, UNKNOWN, Vocabulary, build_tokenizer

TOKENIZERS = Path(__file__).parents[3] / "data" / "tokenizers"
# Ids are those of the model's own tokenizer.json.
SMOLLM2_IDS = [
    ("Hello world", [19556, 905]),
    (
        "naïve café — Ünïcödé",
        [3546, 46494, 37366, 1841, 5549, 246, 94, 25972, 83, 7466, 84, 2756],
    ),
    ("\U0001f1eb\U0001f1f7", [10813, 225, 121, 10813, 225, 132]),
    ("1234567890 3.14", [33, 34, 35, 36, 37, 38, 39, 40, 41, 32, 216, 35, 30, 33, 36]),
    ("a  b   c\t\td\n\n\ne   ", [81, 216, 278, 256, 265, 197, 197, 84, 1116, 198, 85, 333]),
    ("line\r\nnext\r\n", [1311, 201, 198, 11282, 2738]),
    ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
    ("don't they'll WE'RE", [12420, 982, 502, 3060, 26587, 23, 3256]),
    ("漢字かな", [177, 137, 112, 36518, 7365, 229, 7365, 120]),
    ("\x00\x7f\xa0\ufeff", [190, 217, 15442, 186, 136, 140]),
    ("العربية", [22208, 34966, 20602, 31462, 23339, 43463]),
    ("", []),
]
WORDS = [
    "the",
    "quick",
    "fox",
    " ",
    "  ",
    "\r\n",
    "\t",
    "12",
    "é",
    "👋🏽",
    "漢字",
    "\x00",
    "\ufeff",
    "<|im_end|>",
    "'s",
    "▁",
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=12).map("".join)


@pytest.fixture(scope="module")
def byte_tokenizer(byte_level: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(byte_level, Spelling.BYTE_LEVEL, eos_tokens=(2,), bos_token=1)


@pytest.fixture(scope="module")
def pieces() -> Vocabulary:
    """A SentencePiece vocabulary: bytes, letters, and words with scores."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", "a", "b", "c", "é"]
    words = ["ab", "bc", "abc", "▁a", "▁ab", "ca", "▁▁", "cab", "éa", "▁abc"]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [1] * (len(letters) + len(words))
    scores = (
        [0.0] * 259 + [-20.0 - at for at in range(len(letters))] + [-1.0 - at for at in range(len(words))]
    )
    return Vocabulary(
        path=Path("pieces.gguf"),
        model="llama",
        pre="default",
        tokens=texts + letters + words,
        types=np.array(types, np.float32),
        scores=np.array(scores, np.float32),
        merges=[],
        bos=1,
        eos=2,
        unknown=0,
        add_bos=True,
        add_space_prefix=True,
    )


@pytest.fixture(scope="module")
def piece_tokenizer(pieces: Vocabulary) -> Tokenizer:
    return build_tokenizer(pieces, (2,))


def merge_by_score(words: Vocabulary, text: str) -> list[int]:
    """SentencePiece by definition: merge the best neighbours while there are any; bytes for the unknown."""
    assert words.scores is not None
    ids = {token: at for at, token in enumerate(words.tokens) if at >= 259}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (-words.scores[ids[left + right]], at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids
        ]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    fallback = [
        [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()] for symbol in symbols
    ]
    return [token for tokens in fallback for token in tokens]


@pytest.mark.model
def test_smollm2_ids_are_the_known_ones() -> None:
    tokenizer = open_model("smollm2-135m").tokenizer()
    for text, ids in SMOLLM2_IDS:
        assert tokenizer.encode(text, special=True).tolist() == ids
        assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.vocabulary_size == 49152
    assert tokenizer.eos_tokens == (2, 0)


@given(text=TEXTS)
def test_gguf_vocabulary_encodes_as_tokenizers_does(
    text: str, byte_level: tokenizers.Tokenizer, rebuilt: Tokenizer
) -> None:
    expected = byte_level.encode(text, add_special_tokens=False).ids
    tokens = rebuilt.encode(text, special=True)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == expected
    assert rebuilt.decode(tokens, skip_special=False) == text


@pytest.fixture(scope="module")
def rebuilt(byte_level: tokenizers.Tokenizer) -> Tokenizer:
    """The same vocabulary on its way through GGUF's lists."""
    return build_tokenizer(listed(byte_level, "smollm"), (2,))


def listed(engine: tokenizers.Tokenizer, pre: str) -> Vocabulary:
    ids = dict(sorted(engine.get_vocab().items(), key=lambda entry: entry[1]))
    texts = list(ids)
    return Vocabulary(
        path=Path("words.gguf"),
        model="gpt2",
        pre=pre,
        tokens=texts,
        types=np.array(
            [CONTROL if at in engine.get_added_tokens_decoder() else 1 for at in ids.values()], np.float32
        ),
        scores=None,
        merges=[" ".join(merge) for merge in json.loads(engine.to_str())["model"]["merges"]],
        bos=1,
        eos=2,
        unknown=None,
        add_bos=None,
        add_space_prefix=None,
    )


@pytest.fixture(scope="module", params=["qwen2", "llama-bpe"])
def published(request: pytest.FixtureRequest) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """A tokenizer as transformers makes it for a family, and ours of the same vocabulary."""
    engine = tokenizers.Tokenizer.from_file(str(TOKENIZERS / f"{request.param}.json"))
    return engine, build_tokenizer(listed(engine, request.param), (2,))


@settings(max_examples=300)
@given(text=TEXTS)
@example(text="don't WE'LL 12345\r\n\n  ok\t \u0065\u0301 Ⅻ½ _x_ ...!\n")
def test_families_encode_as_in_transformers(
    text: str, published: tuple[tokenizers.Tokenizer, Tokenizer]
) -> None:
    engine, tokenizer = published
    expected = engine.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, special=True).tolist() == expected
    assert tokenizer.decode(expected, skip_special=False) == engine.decode(
        expected, skip_special_tokens=False
    )


@given(tokens=st.lists(st.integers(0, 319), max_size=40), skip=st.booleans())
def test_decodes_as_tokenizers_does(
    tokens: list[int], skip: bool, byte_level: tokenizers.Tokenizer, byte_tokenizer: Tokenizer
) -> None:
    expected = byte_level.decode(tokens, skip_special_tokens=skip)
    assert byte_tokenizer.decode(tokens, skip_special=skip) == expected


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "I'll pay 1234 now  ok", ["I", "'ll", " pay", " 1234", " now", " ", " ok"]),
        ("smollm", "I'll pay 12 now", ["I", "'ll", " pay", " ", "1", "2", " now"]),
        ("llama-bpe", "I'LL pay 12345!\n\nok", ["I", "'LL", " pay", " ", "123", "45", "!\n\n", "ok"]),
        ("qwen2", "I'LL pay 12!\nok", ["I", "'LL", " pay", " ", "1", "2", "!\n", "ok"]),
        ("tekken", "PayPal's 12!/\n ok", ["Pay", "Pal", "'s", " ", "1", "2", "!/\n", " ok"]),
    ],
)
def test_pre_tokenizers_split_as_the_models_do(
    pre: str, text: str, pieces: list[str], byte_level: tokenizers.Tokenizer
) -> None:
    tokenizer = build_tokenizer(listed(byte_level, pre), (2,))
    split = tokenizer._engine.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in split] == pieces
    assert tokenizer.add_bos == (pre in ("llama-bpe", "tekken"))


@settings(max_examples=300)
@given(text=st.text(alphabet="abc é漢", max_size=12))
def test_sentencepiece_merges_by_score(text: str, pieces: Vocabulary, piece_tokenizer: Tokenizer) -> None:
    tokens = piece_tokenizer.encode(text, special=True).tolist()
    assert tokens == merge_by_score(pieces, text)
    assert piece_tokenizer.decode(tokens, skip_special=True) == text
    assert piece_tokenizer._engine.decode(tokens) == text


def test_special_tokens_are_read_or_spelt(byte_tokenizer: Tokenizer, piece_tokenizer: Tokenizer) -> None:
    text = "<|im_start|>the<|im_end|>"
    read, spelt = byte_tokenizer.encode(text, special=True), byte_tokenizer.encode(text, special=False)
    assert (read[0], read[-1]) == (1, 2)
    assert not set(spelt.tolist()) & {0, 1, 2}
    assert byte_tokenizer.decode(read, skip_special=False) == text
    assert byte_tokenizer.decode(read, skip_special=True) == "the"
    assert byte_tokenizer.decode(spelt, skip_special=True) == text
    assert byte_tokenizer.encode(text, special=True).tolist() == read.tolist()
    assert not set(piece_tokenizer.encode("</s>", special=False).tolist()) & {0, 1, 2}


def test_bos_is_put_in_front_once(byte_tokenizer: Tokenizer, piece_tokenizer: Tokenizer) -> None:
    assert piece_tokenizer.add_bos
    assert piece_tokenizer.encode("ab", special=True, bos=True)[0] == 1
    assert piece_tokenizer.encode("", special=True, bos=True).tolist() == [1]
    assert piece_tokenizer.encode("<s>ab", special=True, bos=True).tolist().count(1) == 1
    assert piece_tokenizer.encode("ab", special=True)[0] != 1
    assert byte_tokenizer.encode("the", special=True, bos=True)[0] != 1


def test_lone_surrogates_are_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"U\+DC80 at character 2") as caught:
        byte_tokenizer.encode("ab\udc80", special=True)
    assert caught.value.field == "prompt"


def test_single_tokens(byte_tokenizer: Tokenizer, piece_tokenizer: Tokenizer) -> None:
    first = byte_tokenizer.encode("é", special=True).tolist()
    assert b"".join(map(byte_tokenizer.token_bytes, first)) == "é".encode()
    assert byte_tokenizer.token_text(1) == "<|im_start|>"
    assert byte_tokenizer.is_special(1)
    assert not byte_tokenizer.is_special(first[0])
    assert piece_tokenizer.token_bytes(3 + 0xE2) == b"\xe2"
    assert piece_tokenizer.token_text(3 + 0xE2) == "\ufffd"
    assert byte_tokenizer.token_bytes(10_000) == byte_tokenizer.token_bytes(-1) == b""


def test_repeated_tokens_are_an_error(byte_level: tokenizers.Tokenizer) -> None:
    words = listed(byte_level, "smollm")
    words.tokens[5] = words.tokens[4]
    with pytest.raises(ModelError, match="1 repeated token"):
        build_tokenizer(words, ())


@given(
    chunks=st.lists(st.lists(st.integers(0, 330), max_size=5), max_size=12),
    skip=st.booleans(),
    which=st.sampled_from(["byte_tokenizer", "piece_tokenizer"]),
)
def test_stream_equals_whole(
    chunks: list[list[int]], skip: bool, which: str, byte_tokenizer: Tokenizer, piece_tokenizer: Tokenizer
) -> None:
    tokenizer = byte_tokenizer if which == "byte_tokenizer" else piece_tokenizer
    decoder = IncrementalDecoder(tokenizer, skip_special=skip)
    streamed = "".join(decoder.push(chunk) for chunk in chunks) + decoder.flush()
    every = [token for chunk in chunks for token in chunk]
    assert streamed == tokenizer.decode(every, skip_special=skip)


@given(text=TEXTS)
def test_stream_never_shows_half_a_character(text: str, byte_tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(byte_tokenizer, skip_special=False)
    shown = ""
    for token in byte_tokenizer.encode(text, special=True).tolist():
        shown += decoder.push([token])
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""

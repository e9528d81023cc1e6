"""Reads recorded data sets and traces from files; nothing else in a workload's making does."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from memserve.bench.conversations import (
    Document,
    Exchange,
    Making,
    Trajectory,
    make_agents,
    make_chats,
    make_documents,
)
from memserve.bench.fitting import CharacterRuler, Ruler
from memserve.bench.trace import make_replay, parse_trace
from memserve.bench.workload import Workload
from memserve.core.errors import ConfigError

T = TypeVar("T")

MIN_CONTEXT = 256
_TOKENIZER = Path("tokenizer/tokenizer.json")


class _Utterance(msgspec.Struct, frozen=True):
    speaker: str = msgspec.field(name="from")
    value: str


class _Chat(msgspec.Struct, frozen=True):
    conversations: list[_Utterance]


class _Paper(msgspec.Struct, frozen=True):
    input: str
    qa_pairs: str | list[dict[str, Any]]


class _Prompts(msgspec.Struct, frozen=True):
    longdep_qa: str


class _FewShot(msgspec.Struct, frozen=True):
    instruction: str
    webthink_simple6: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """Which recorded workload: ``data`` is the folder, ``sessions`` and ``context`` (tokens) its size."""

    name: str
    data: Path
    sessions: int
    context: int
    seed: int
    think: float | None = None


def read_workload(asked: Recorded) -> Workload:
    """The workload ``asked`` for. Raises ``ConfigError`` naming the file and what is wrong with it."""
    make = RECORDED.get(asked.name)
    if make is None:
        raise ConfigError(
            f"--workload is {asked.name!r}; accepted: synthetic, {', '.join(RECORDED)}, mooncake"
        )
    if asked.context < MIN_CONTEXT:
        raise ConfigError(f"--context is {asked.context}; accepted: at least {MIN_CONTEXT} tokens")
    if asked.sessions < 1:
        raise ConfigError(f"--sessions is {asked.sessions}; accepted: at least 1")
    ruler = open_ruler(asked.data)
    return make(asked.data, Making(ruler, asked.sessions, asked.context, asked.seed, asked.think))


def read_replay(file: Path, requests: int, context: int) -> Workload:
    """The first ``requests`` of the Mooncake trace in ``file``. Raises ``ConfigError``."""
    lines = _read_text(file, "--trace").splitlines()[:requests]
    return make_replay(parse_trace(lines, f"--trace {file}"), context)


def open_ruler(data: Path) -> Ruler:
    """Measures with the tokenizer beside the data, if there is one, else by characters."""
    file = data / _TOKENIZER
    if not file.is_file():
        return CharacterRuler()
    import tokenizers

    return _TokenizerRuler(tokenizers.Tokenizer.from_file(str(file)))


class _TokenizerRuler:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def cut(self, text: str, tokens: int) -> str:
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text if tokens >= len(offsets) else text[: offsets[tokens - 1][1]] if tokens else ""


def _read_chats(data: Path, making: Making) -> Workload:
    chats = _read_json(data / "sharegpt/conversations.json", list[_Chat])
    paired = [_pair(chat.conversations) for chat in chats]
    return make_chats([pairs for pairs in paired if pairs], making)


def _pair(utterances: Sequence[_Utterance]) -> list[Exchange]:
    """Questions with their answers; what is neither is left out."""
    return [
        Exchange(asked.value, answer.value)
        for asked, answer in pairwise(utterances)
        if asked.speaker == "human"
        and answer.speaker == "gpt"
        and asked.value.strip()
        and answer.value.strip()
    ]


def _read_documents(data: Path, making: Making) -> Workload:
    template = _read_json(data / "loogle/task2prompt.json", _Prompts).longdep_qa
    files = (data / "loogle/longdep_qa.jsonl", data / "loogle/shortdep_qa.jsonl")
    documents = [_document(one, file) for file in files for one in _read_lines(file, _Paper)]
    return make_documents(documents, template, making)


def _document(paper: _Paper, file: Path) -> Document:
    """LooGLE writes the questions as a Python literal inside the JSON."""
    try:
        pairs = ast.literal_eval(paper.qa_pairs) if isinstance(paper.qa_pairs, str) else paper.qa_pairs
        questions = tuple(Exchange(str(pair["Q"]), str(pair["A"])) for pair in pairs)
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file}: qa_pairs has no list of questions (Q) and answers (A): {error}"
        ) from error
    if not questions:
        raise ConfigError(f"{file}: a document has no questions")
    return Document(paper.input, questions)


def _read_agents(data: Path, making: Making) -> Workload:
    shots = _read_json(data / "react/react_prompt.json", _FewShot)
    trajectories = [one for one in _read_lines(data / "react/trajectories.jsonl", Trajectory) if one.steps]
    return make_agents(trajectories, shots.instruction + shots.webthink_simple6, making)


RECORDED: dict[str, Callable[[Path, Making], Workload]] = {
    "sharegpt": _read_chats,
    "loogle": _read_documents,
    "react": _read_agents,
}


def _read_json(file: Path, schema: type[T]) -> T:
    try:
        return msgspec.json.decode(_read_text(file, "--data"), type=schema)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is not as expected: {error}") from error


def _read_lines(file: Path, schema: type[T]) -> list[T]:
    try:
        return msgspec.json.Decoder(schema).decode_lines(_read_text(file, "--data"))
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is not as expected: {error}") from error


def _read_text(file: Path, option: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: {file} cannot be read: {error}") from error

"""Texts for benchmarks/speculation.py: prompts of recorded workloads with their recorded answers, and copies.

Later turns contain the recorded answers of earlier ones, so that prompts do not depend on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memserve.bench.content import render_text
from memserve.bench.sources import Recorded, read_workload
from memserve.bench.workload import Endpoint, Workload, compose_prompt
from memserve.core.types import Tokens
from memserve.engine.models.chat_template import ChatMessage, ChatTemplate
from memserve.engine.models.loader import ModelSource
from memserve.engine.models.tokenizer import Tokenizer

RECORDED = ("sharegpt", "loogle", "react")
COPIES = "copy"
LONGEST_ANSWER = 192
SHORTEST_ANSWER = 48
_COPIED_WORDS = 110
_COPY = (
    "Repeat the following text word for word, with one change: write {there} instead of {here}. "
    "Answer with the text only.\n\n{text}"
)


@dataclass(frozen=True, slots=True)
class Task:
    """``max_tokens`` bounds the answer; ``fixed`` ones have exactly that many, others may end before."""

    prompt: Tokens
    recorded: Tokens
    max_tokens: int
    fixed: bool


class TaskMaker:
    """Makes tasks for the model of ``source`` out of the files in ``data``."""

    def __init__(self, source: ModelSource, data: Path, context: int) -> None:
        template = source.chat_template()
        assert template is not None, "the tasks are chats"
        self._template: ChatTemplate = template
        self._tokenizer: Tokenizer = source.tokenizer()
        self._data = data
        self._context = context

    def make(self, name: str, count: int, seed: int = 0) -> list[Task]:
        """``count`` tasks of ``sharegpt``, ``loogle``, ``react`` or ``copy``."""
        asked = Recorded("sharegpt" if name == COPIES else name, self._data, 4 * count, self._context, seed)
        workload = read_workload(asked)
        tasks = self._copies(workload) if name == COPIES else self._turns(workload)
        return [task for _, task in zip(range(count), tasks, strict=False)]

    def _turns(self, workload: Workload) -> Iterator[Task]:
        """One turn of each session, in turn an early and a late one."""
        for at, session in enumerate(workload.sessions):
            turn = at % len(session.turns)
            answers = [one.reply for one in session.turns]
            messages = compose_prompt(workload, session, answers[:turn])
            said = [(message.role, render_text(message.content)) for message in messages]
            recorded = self._tokenizer.encode(render_text(answers[turn]), special=False)
            length = min(max(session.turns[turn].max_tokens, SHORTEST_ANSWER), LONGEST_ANSWER)
            if workload.endpoint is Endpoint.CHAT:
                prompt = self._chat(said)
            else:
                prompt = self._tokenizer.encode("".join(text for _, text in said), special=False, bos=True)
            yield Task(prompt[-(self._context - length - 1) :], recorded, length, workload.fixed)

    def _copies(self, workload: Workload) -> Iterator[Task]:
        """Answers of chats, to be repeated with their most frequent long word replaced."""
        for session in workload.sessions:
            words = render_text(session.turns[0].reply).split(" ")[:_COPIED_WORDS]
            candidates = [word for word in words if word.isalpha() and word.islower() and len(word) > 4]
            if len(words) < _COPIED_WORDS or not candidates:
                continue
            text, here = " ".join(words), max(candidates, key=candidates.count)
            changed = " ".join("something" if word == here else word for word in words)
            prompt = self._chat([("user", _COPY.format(here=here, there="something", text=text))])
            recorded = self._tokenizer.encode(changed, special=False)
            yield Task(prompt, recorded, min(len(recorded) + 16, LONGEST_ANSWER), fixed=False)

    def _chat(self, said: list[tuple[str, str]]) -> Tokens:
        messages = [ChatMessage(role, text) for role, text in said]
        text = self._template.render(messages, add_generation_prompt=True)
        return np.asarray(self._tokenizer.encode(text, special=True), np.int32)

"""Speculation through a real client: several tokens per chunk; no letter, count or probability changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from e2e.serving import Served, serving

pytestmark = [pytest.mark.processes, pytest.mark.model]

TEXT = (
    "The old lighthouse keeper counted the ships at dawn, and the old lighthouse keeper wrote their names in "
    "a book. The book had one line for each ship, and one page for each day."
)
REPEAT = f"Repeat this text word for word, three times:\n\n{TEXT}"


@dataclass(frozen=True)
class Heard:
    text: str
    finish: str
    tokens: int
    logprobs: tuple[tuple[str, float, tuple[str, ...]], ...]


def ask(served: Served, **more: object) -> tuple[Heard, int]:
    """A streamed answer, and the most tokens that one event of it has brought."""
    stream = served.client.chat.completions.create(  # type: ignore[call-overload]
        model="smollm2-135m",
        messages=[{"role": "user", "content": REPEAT}],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
        **{"max_tokens": 120, **more},
    )
    text, finish, tokens, most, logprobs = "", "", 0, 0, []
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            entries = choice.logprobs.content if choice.logprobs else []
            most = max(most, len(entries))
            logprobs += [
                (one.token, one.logprob, tuple(a.token for a in one.top_logprobs)) for one in entries
            ]
    return Heard(text, finish, tokens, tuple(logprobs)), most


REQUESTS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0},
    "stop inside": {"temperature": 0, "stop": ["one line for"]},
    "seeded": {"temperature": 0.8, "top_p": 0.9, "seed": 7},
    "short": {"temperature": 0, "max_tokens": 9},
}


@pytest.fixture(scope="module")
def plain() -> dict[str, Heard]:
    with serving("--colocated", "1") as served:
        heard = {name: ask(served, **more) for name, more in REQUESTS.items()}
        assert all(most == 1 for _, most in heard.values())
    return {name: one for name, (one, _) in heard.items()}


@pytest.fixture(scope="module")
def speculating() -> Iterator[Served]:
    """One instance prefills and another decodes, which learns the prompt's text from the handover."""
    with serving("--speculative-method", "ngram", "--num-speculative-tokens", "6") as served:
        yield served


@pytest.mark.parametrize("name", REQUESTS)
def test_the_client_sees_no_difference(plain: dict[str, Heard], speculating: Served, name: str) -> None:
    heard, most = ask(speculating, **REQUESTS[name])
    assert heard == plain[name]
    if name == "greedy":
        assert most > 1, "some events bring several tokens"
    speculating.wait_idle()


def test_counters_show_what_speculation_does(speculating: Served) -> None:
    ask(speculating, temperature=0)
    speculating.wait_idle()
    instances = speculating.instances()
    decode = instances["decode-0"]["counters"]
    assert 0 < decode["spec_decode_num_accepted_tokens"] <= decode["spec_decode_num_draft_tokens"]
    assert instances["prefill-0"]["counters"]["spec_decode_num_draft_tokens"] == 0

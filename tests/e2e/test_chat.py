"""The spine through a real client: two-turn chats, every phase, concurrency. Text depends on none of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from e2e.serving import Served, serving

pytestmark = [pytest.mark.processes, pytest.mark.model]

MODEL = "smollm2-135m"
BLOCK = 16
QUESTIONS = (
    "Explain in three sentences why the sky is blue, and what happens to its colour in the evening.",
    "Now say it again in one sentence, for a child.",
)


@dataclass(frozen=True)
class Turn:
    text: str
    prompt: int
    completion: int
    cached: int
    finish: str


def ask(served: Served, messages: list[dict[str, str]], max_tokens: int = 60) -> Turn:
    """One streamed chat completion, collected."""
    stream = served.client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, finish, usage = "", "", None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return Turn(
        text,
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens_details.cached_tokens or 0,
        finish,
    )


def converse(served: Served) -> list[Turn]:
    messages: list[dict[str, str]] = []
    turns = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        turns.append(ask(served, messages))
        messages.append({"role": "assistant", "content": turns[-1].text})
        served.wait_idle()
    return turns


@pytest.fixture(scope="module")
def expected() -> list[Turn]:
    """The same chat on one colocated instance without any caching."""
    with serving("--colocated", "1", "--phases", "pd-basic") as plain:
        turns = converse(plain)
    assert [turn.cached for turn in turns] == [0, 0]
    return turns


@pytest.fixture(scope="module")
def disaggregated() -> Iterator[Served]:
    with serving() as served:
        yield served


def test_second_turn_finds_the_whole_first_turn(disaggregated: Served, expected: list[Turn]) -> None:
    turns = converse(disaggregated)
    assert [turn.text for turn in turns] == [turn.text for turn in expected]
    assert [turn.prompt for turn in turns] == [turn.prompt for turn in expected]
    first, second = turns
    # The last sampled token has no KV; of the rest, whole blocks are found again.
    history = first.prompt + first.completion - 1
    assert second.cached == history // BLOCK * BLOCK
    instances = disaggregated.wait_idle()
    assert instances["decode-0"]["counters"]["pool_sent_bytes"] > 0, "the answer's KV went back to P"
    for entry in instances.values():
        assert entry["blocks"]["historical"] * BLOCK >= history // BLOCK * BLOCK


def test_an_immediate_second_turn_waits_for_the_answers_kv(disaggregated: Served) -> None:
    """Agents answer at once: the next turn is there before D's KV is back on P, and still finds it."""
    for number in range(8):
        messages = [{"role": "user", "content": f"Tell me something about the number {number}{number}."}]
        first = ask(disaggregated, messages, 40)
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And the next one?"},
        ]
        second = ask(disaggregated, messages, 4)
        assert second.cached == (first.prompt + first.completion - 1) // BLOCK * BLOCK


def test_repeat_is_cached_up_to_the_last_token(disaggregated: Served) -> None:
    messages = [{"role": "user", "content": "Count: " + ", ".join(map(str, range(200)))}]
    cold, warm = ask(disaggregated, messages, 8), ask(disaggregated, messages, 8)
    assert warm.text == cold.text
    assert warm.cached == (cold.prompt - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("phases", ["pd-basic", "pd-caching-1", "pd-caching-2"])
def test_each_phase_gives_the_same_text(phases: str, expected: list[Turn]) -> None:
    with serving("--phases", phases) as served:
        turns = converse(served)
        assert [turn.text for turn in turns] == [turn.text for turn in expected]
        decode, prefill = served.wait_idle()["decode-0"], served.wait_idle()["prefill-0"]
    prompt_blocks = expected[0].prompt // BLOCK * BLOCK
    assert turns[1].cached == (0 if phases == "pd-basic" else prompt_blocks)
    assert (prefill["blocks"]["historical"] > 0) == (phases != "pd-basic")
    assert (decode["blocks"]["historical"] > 0) == (phases == "pd-caching-2")


def test_colocated_with_caching_gives_the_same_text(expected: list[Turn]) -> None:
    with serving("--colocated", "1") as served:
        turns = converse(served)
    assert [turn.text for turn in turns] == [turn.text for turn in expected]
    assert turns[1].cached == (turns[0].prompt + turns[0].completion - 1) // BLOCK * BLOCK


def test_many_at_once_answer_as_alone(disaggregated: Served) -> None:
    prompts = [
        f"Name {count} animals that live in {place}." for count in (2, 3) for place in ("Asia", "seas")
    ]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    alone = [ask(disaggregated, each, 24).text for each in messages]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda each: ask(disaggregated, each, 24).text, messages * 3))
    assert together == alone * 3
    disaggregated.wait_idle()


def test_seeded_sampling_repeats_and_n_differs(disaggregated: Served) -> None:
    def sample(seed: int) -> list[str | None]:
        answer = disaggregated.client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=16, temperature=1.0, seed=seed, n=2
        )
        return [choice.text for choice in answer.choices]

    first = sample(7)
    assert first == sample(7)
    assert first[0] != first[1]
    assert first != sample(8)


def test_stop_strings_end_the_answer_and_keep_its_kv(disaggregated: Served) -> None:
    answer = disaggregated.client.completions.create(
        model=MODEL, prompt="1 2 3 4 5 6 7 8 9", max_tokens=60, temperature=0, stop=["13"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "12" in answer.choices[0].text
    assert "13" not in answer.choices[0].text
    disaggregated.wait_idle()


def test_logprobs_are_those_of_the_greedy_choice(disaggregated: Served) -> None:
    answer = disaggregated.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say yes."}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    for entry in found.content:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert entry.logprob <= 0

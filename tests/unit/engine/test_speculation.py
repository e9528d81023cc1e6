"""Prompt lookup: found where its definition says, guesses that learn, runs as sampling gives them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from memserve.core.clock import MonotonicClock
from memserve.core.errors import RequestFailed
from memserve.core.types import FinishReason, InstanceId, Namespace, RequestId, SamplingParams, Tokens
from memserve.engine.batcher import Batcher, Chunk, work_of
from memserve.engine.pace import StepTimes, Work
from memserve.engine.phases import PHASES
from memserve.engine.sampling import sample_row
from memserve.engine.sequence import Sequence, new_sequence
from memserve.engine.sequence_blocks import SequenceBlocks
from memserve.engine.speculation import Draft, Guess, Lookup, Speculated, look_up
from memserve.engine.step import build_batch, sample_run
from memserve.mempool.layout import KVLayout
from memserve.mempool.pool import MemPool

LOOKUP = Lookup(4, longest=3, shortest=1)
ALWAYS, NEVER = 0.0, 1.1
VOCABULARY = 32


def tokens_of(text: str) -> Tokens:
    return np.array([ord(letter) - ord("a") for letter in text], np.int32)


def text_of(tokens: tuple[int, ...]) -> str:
    return "".join(chr(token + ord("a")) for token in tokens)


def sequence(prompt: str, answer: str = "", *, wanted: int = 20, **more: object) -> Sequence:
    """What has been prefilled and has sampled ``answer``; the last token's KV is to be computed."""
    sampling = SamplingParams(max_tokens=len(answer) + wanted, temperature=0.0, **more)  # type: ignore[arg-type]
    made = new_sequence(RequestId(prompt + answer), Namespace("m"), tokens_of(prompt), sampling)
    for token in tokens_of(answer).tolist():
        made.append(token)
    made.computed = made.length - 1
    return made


# --- lookup ---


def scan(text: str, lookup: Lookup, count: int) -> tuple[str, int]:
    """The definition: the longest end that occurred before, and what came after its last occurrence."""
    for length in range(min(lookup.longest, len(text)), lookup.shortest - 1, -1):
        at = text.rfind(text[-length:], 0, len(text) - 1)
        if at >= 0:
            after = text[at + length :]
            return (after * count)[:count], length
    return "", 0


@settings(deadline=None)
@given(st.text("ab", min_size=1, max_size=60) | st.text("abcdef", min_size=1, max_size=60), st.data())
def test_lookup_finds_what_its_definition_says(text: str, data: st.DataObject) -> None:
    shortest = data.draw(st.integers(1, 4))
    lookup = Lookup(data.draw(st.integers(1, 6)), data.draw(st.integers(shortest, 6)), shortest)
    guess = look_up(tokens_of(text), lookup)
    assert (text_of(guess.tokens), guess.matched) == scan(text, lookup, lookup.tokens)


def test_a_text_that_circles_goes_on_circling() -> None:
    assert look_up(tokens_of("abab"), Lookup(5, 3, 1)) == Guess(tuple(tokens_of("ababa").tolist()), 2)


# --- drafts ---


def test_a_draft_proposes_within_its_room() -> None:
    text = tokens_of("abcdefgabc")
    draft = Draft(LOOKUP)
    assert text_of(draft.propose(text, 10, ALWAYS)) == "defg"
    assert text_of(draft.propose(text, 2, ALWAYS)) == "de"
    assert draft.propose(text, 0, ALWAYS) == ()
    assert draft.propose(text, -1, ALWAYS) == ()


def test_a_draft_learns_from_guesses_that_it_kept_to_itself() -> None:
    circle, draft = tokens_of("abcd" * 30), Draft(LOOKUP)
    for end in range(20, 120):
        assert draft.propose(circle[:end], 10, NEVER) == ()
    assert len(draft.propose(circle, 10, 0.9)) == 4
    noise = np.random.default_rng(1).integers(0, 4, 400).astype(np.int32)
    text = np.concatenate([circle, noise])
    for end in range(120, len(text)):
        draft.propose(text[:end], 10, NEVER)
    assert draft.propose(text, 10, 0.9) == ()
    assert len(draft.propose(text, 10, 0.05)) >= 1, "there is a guess; it is not worth much"


def test_later_tokens_of_a_guess_must_pay_as_well() -> None:
    draft, text = Draft(Lookup(8, 3, 1)), tokens_of("abcdefghijklabc")
    lengths = [len(draft.propose(text, 10, threshold)) for threshold in (ALWAYS, 0.1, 0.2, 0.5, NEVER)]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 3


# --- what steps hold ---


def streams(batcher: Batcher, *sequences: Sequence) -> None:
    for each in sequences:
        batcher.enqueue(each)
        batcher.admit(each)


def learn(times: StepTimes, *, fixed: float, row: float) -> None:
    """Steps on a machine that takes ``fixed`` and ``row`` seconds, of one stream with 0 to 8 guesses."""
    rng = np.random.default_rng(2)
    for count in rng.integers(0, 9, 2000).tolist():
        work = Work().decode(10).speculate(10, count) if count else Work().decode(10)
        times.learn(work, fixed + row * count)


def proposed(batcher: Batcher) -> list[int]:
    return [len(chunk.proposed) for chunk in batcher.plan()]


def test_streams_propose_where_rows_are_cheap() -> None:
    for row, speculates in ((0.0001, True), (0.02, False)):
        batcher = Batcher(step_tokens=64, max_running=8, lookup=LOOKUP)
        learn(batcher.pace.times, fixed=0.01, row=row)
        streams(batcher, sequence("abcdeabcde", "abc"))
        assert (proposed(batcher)[0] > 0) is speculates, row


def test_nothing_is_proposed_unasked_before_the_first_token_or_for_the_last() -> None:
    plain = Batcher(step_tokens=64, max_running=8)
    streams(plain, sequence("abcabc", "a"))
    assert proposed(plain) == [0]
    batcher = Batcher(step_tokens=64, max_running=8, lookup=LOOKUP)
    learn(batcher.pace.times, fixed=0.01, row=1e-5)
    last, two = sequence("abcabcabc", "abcabc", wanted=1), sequence("bcabcabca", "bcabca", wanted=2)
    streams(batcher, sequence("abcabcabcabc"), last, two)
    assert proposed(batcher) == [0, 0, 1]


@pytest.mark.parametrize(("affordable", "expected"), [(None, 10), (3, 3), (0, 0), (-5, 0)])
def test_guesses_keep_to_rows_and_target_time(affordable: int | None, expected: int) -> None:
    batcher = Batcher(step_tokens=24, max_running=8, lookup=LOOKUP)
    times = batcher.pace.times
    learn(times, fixed=0.01, row=0.0001)
    prompt = sequence("abcd" * 9)
    prompt.computed = 0
    decoding = [sequence("abcd" * 5, "abcd" * at) for at in range(1, 5)]
    streams(batcher, *decoding, prompt)
    if affordable is not None:
        alone = times.seconds_of(work_of(Chunk(one, 1) for one in decoding))
        batcher.pace.target = alone + (affordable + 0.5) * times.speculation_seconds(35)
    chunks = batcher.plan()
    assert sum(len(chunk.proposed) for chunk in chunks) == expected
    assert sum(chunk.rows for chunk in chunks) <= 24
    assert chunks[-1].sequence is prompt, "prompts get on"


def test_times_tell_rows_of_guesses_from_other_rows() -> None:
    times = StepTimes()
    learn(times, fixed=0.01, row=0.0005)
    assert times.speculation_seconds(10) == pytest.approx(0.0005, rel=0.1)


# --- blocks ---


@pytest.fixture
def pool() -> Iterator[MemPool]:
    layout = KVLayout("tiny", 1, 1, 16)
    pool = MemPool(layout, 4, instance=InstanceId("c"), incarnation=1, clock=MonotonicClock())
    yield pool
    pool.check(())
    pool.close()


def test_blocks_for_guesses_are_taken_if_there_are_any_and_given_back(pool: MemPool) -> None:
    blocks = SequenceBlocks(pool, PHASES["colocated"], StepTimes(), MonotonicClock())
    one, other = sequence("a" * 13, "a"), sequence("b" * 20, "b")
    assert blocks.take(one)
    assert blocks.take(other)
    assert one.blocks_held == 1
    assert blocks.reach(one, 4) == 4
    assert one.blocks_held == 2
    one.extend([0, 0], 100)
    blocks.trim(one)
    assert one.blocks_held == 1, "16 tokens need one"
    held = pool.alloc_mem(1)
    assert blocks.reach(one, 4) == 0
    assert blocks.reach(other, 4) == 4
    pool.free_mem(held)
    blocks.release(one)
    blocks.release(other)


# --- runs ---


def row(likeliest: int) -> NDArray[np.float32]:
    logits = np.linspace(0, 1, VOCABULARY, dtype=np.float32)
    logits[likeliest] = 9
    return logits


def run_of(one: Sequence, guesses: str, logits: list[NDArray[np.float32]]) -> str:
    rest = iter([*logits, row(0)])
    run = sample_run(Chunk(one, 1, tuple(tokens_of(guesses).tolist())), rest)
    assert not isinstance(run, RequestFailed)
    assert len(list(rest)) == 1, "each chunk takes its own rows"
    return text_of(tuple(sampled.token for sampled in run))


def test_a_run_ends_with_the_first_wrong_guess() -> None:
    one = sequence("abc", "a")
    logits = [row(int(token)) for token in tokens_of("bcd")]
    assert run_of(one, "bc", logits) == "bcd"
    assert run_of(one, "bx", logits) == "bc"
    assert run_of(one, "xc", logits) == "b"
    assert run_of(one, "", logits[:1]) == "b"


@given(st.integers(0, 9), st.integers(0, 1 << 40))
@settings(deadline=None)
def test_random_choices_are_those_of_one_step_after_the_other(right: int, seed: int) -> None:
    one = sequence("abc", "ab", seed=seed, logprobs=2)
    sampling = SamplingParams(max_tokens=30, temperature=1.0, top_p=0.9, top_k=20, seed=seed, logprobs=2)
    one.sampling = sampling
    logits = np.random.default_rng(seed).standard_normal((10, VOCABULARY)).astype(np.float32)
    plain = [sample_row(each, sampling, 2 + at) for at, each in enumerate(logits)]
    guesses = [sampled.token for sampled in plain[:right]]
    guesses += [(sampled.token + 1) % VOCABULARY for sampled in plain[right:9]]
    run = sample_run(Chunk(one, 1, tuple(guesses)), iter(logits))
    assert run == tuple(plain[: right + 1])


def test_a_row_that_is_no_number_fails_when_its_turn_comes() -> None:
    one, bad = sequence("abc", "a"), np.full(VOCABULARY, np.nan, np.float32)
    assert run_of(one, "b", [row(1), bad]) == "b"
    assert isinstance(sample_run(Chunk(one, 1, (1,)), iter([bad, row(1)])), RequestFailed)


def test_guesses_follow_the_pending_token_in_the_batch() -> None:
    one, prompt = sequence("abc", "d"), sequence("efghij")
    for each in (one, prompt):
        each.pointers = np.array([1 << 20], np.uint64)
    prompt.computed = 2
    batch = build_batch([Chunk(one, 1, (7, 8)), Chunk(prompt, 4)])
    assert batch.tokens.tolist() == [3, 7, 8, *tokens_of("ghij").tolist()]
    assert batch.positions.tolist() == [3, 4, 5, 2, 3, 4, 5]
    assert batch.starts.tolist() == [0, 3, 7]
    assert batch.logit_rows.tolist() == [0, 1, 2, 6]


@pytest.mark.parametrize(
    ("run", "kept", "reason"),
    [
        ("bcd", "bcd", None),
        ("bzd", "bz", FinishReason.STOP),
        ("bcdefg", "bcdef", FinishReason.LENGTH),
        ("bcdez", "bcdez", FinishReason.STOP),
    ],
)
def test_a_run_is_cut_where_the_answer_ends(run: str, kept: str, reason: FinishReason | None) -> None:
    one = sequence("a", wanted=5, stop_token_ids=(25,))
    assert one.extend(tokens_of(run).tolist(), 100) is reason
    assert text_of(tuple(one.tokens.tolist())) == "a" + kept


def test_a_run_is_cut_at_the_end_of_the_context() -> None:
    one = sequence("abc", wanted=10)
    assert one.extend(tokens_of("defg").tolist(), 6) is FinishReason.LENGTH
    assert one.length == 6


def test_counters_have_vllms_names() -> None:
    done = Speculated()
    for proposed, accepted in ((4, 2), (0, 0), (3, 3)):
        done.count(proposed, accepted)
    assert done.counters() == {
        "spec_decode_num_drafts": 2,
        "spec_decode_num_draft_tokens": 7,
        "spec_decode_num_accepted_tokens": 5,
    }

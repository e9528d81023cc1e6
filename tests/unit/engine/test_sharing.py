"""Who computes what a waiting prompt begins with, and when waiting for it pays."""

from __future__ import annotations

import numpy as np

from memserve.core.types import Namespace, RequestId, SamplingParams, Tokens
from memserve.engine.sequence import Patience, Sequence, new_sequence
from memserve.engine.sharing import Leaders


def tokens(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32)


def sequence(prompt: Tokens, *, computed: int = 0, space: str = "m") -> Sequence:
    made = new_sequence(RequestId("r"), Namespace(space), prompt, SamplingParams(max_tokens=4))
    made.computed = computed
    return made


def test_the_longest_shared_prefix_leads_in_whole_blocks() -> None:
    prompt = tokens(100)
    shorter, longer = sequence(prompt[:40]), sequence(np.concatenate([prompt[:70], tokens(50, 1)]))
    lead = Leaders(16, [shorter, longer]).lead_of(sequence(prompt))
    assert lead is not None
    assert (lead.leader, lead.tokens, lead.coming) == (longer, 64, 64)


def test_the_last_token_is_nobodys_to_share() -> None:
    lead = Leaders(16, [sequence(tokens(32))]).lead_of(sequence(tokens(32)))
    assert lead is not None
    assert lead.tokens == 16


def test_others_lead_nobody() -> None:
    prompt = tokens(100)
    decoding, elsewhere = sequence(prompt, computed=99), sequence(prompt, space="x")
    leaders = Leaders(16, [decoding, elsewhere, sequence(tokens(100, 1))])
    assert leaders.lead_of(sequence(prompt)) is None
    assert leaders.lead_of(sequence(prompt[:10])) is None


def test_waiting_pays_for_much_or_for_most_of_the_prompt() -> None:
    prompt = tokens(1000)

    def worth(shared: int, length: int, computed: int = 0) -> bool:
        follower = sequence(np.concatenate([prompt[:shared], tokens(length - shared, 1)]))
        lead = Leaders(16, [sequence(prompt, computed=computed)]).lead_of(follower)
        return lead is not None and lead.worth_waiting(follower)

    assert worth(64, 900)
    assert not worth(48, 900), "too little to wait for"
    assert worth(48, 90), "half of it is something"
    assert not worth(160, 900, computed=160), "it is there already"
    assert not worth(160, 900, computed=112)


def test_patience_ends_a_while_after_the_last_progress() -> None:
    patience = Patience(2.0)
    assert not patience.spent(0, 10.0)
    assert not patience.spent(0, 11.9)
    assert not patience.spent(16, 11.9)
    assert not patience.spent(16, 13.8)
    assert patience.spent(16, 13.9)
    assert patience.spent(8, 20.0)

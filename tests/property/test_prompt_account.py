"""The account of a prompt against one kept token by token, through any number of preemptions."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.types import Ledger
from memserve.engine.account import PromptAccount
from memserve.mempool.address import Origin, Tier

BLOCK = 4
ORIGINS = {Origin.COMPUTED: "local", Origin.PEER: "peer", Origin.BACKFLOW: "backflow"}
TIERS = {Tier.HOST: "host", Tier.DISK: "disk"}


@st.composite
def lives(draw: st.DrawFn) -> tuple[int, list[tuple[list[tuple[Origin, Tier]], int]]]:
    """A prompt's length and, per admission, what is found of it and how far it is computed."""
    length = draw(st.integers(1, 60))
    admissions = []
    for _ in range(draw(st.integers(1, 5))):
        block = st.tuples(st.sampled_from(Origin), st.sampled_from(Tier))
        found = draw(st.lists(block, max_size=(length - 1) // BLOCK))
        computed = draw(st.integers(len(found) * BLOCK, length))
        admissions.append((found, computed))
    return length, admissions


def count_by_hand(length: int, admissions: list[tuple[list[tuple[Origin, Tier]], int]]) -> dict[str, int]:
    """Each token's last source; but what this request computed in a whole block once stays computed."""
    sources = [""] * length
    own = [False] * length
    for found, computed in admissions:
        for token in range(length):
            if token < len(found) * BLOCK:
                origin, tier = found[token // BLOCK]
                sources[token] = TIERS.get(tier) or ORIGINS[origin]
            else:
                sources[token] = "computed"
                own[token] = own[token] or token < computed // BLOCK * BLOCK
    final = ["computed" if mine else source for mine, source in zip(own, sources, strict=True)]
    return {field: final.count(field) for field in Ledger.__struct_fields__}


@given(lives())
def test_every_token_is_counted_once_where_it_came_from(
    life: tuple[int, list[tuple[list[tuple[Origin, Tier]], int]]],
) -> None:
    length, admissions = life
    account = PromptAccount(length, BLOCK)
    for number, (found, computed) in enumerate(admissions):
        if number:
            account.lose(admissions[number - 1][1])
        origins = np.array([origin for origin, _ in found], np.uint8)
        account.find(origins, np.array([tier for _, tier in found], np.uint8))
        assert computed <= length
    ledger = account.ledger()
    assert ledger.prompt == length
    assert msgspec.structs.asdict(ledger) == count_by_hand(length, admissions)

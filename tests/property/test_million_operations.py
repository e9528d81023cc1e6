"""A million random operations on pools that live on, against the models of the state machines.

Hypothesis looks for short sequences that break something; this looks for what only adds up over time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from memserve.mempool import Tier

from .test_pool_machine import NAMESPACES, PAGE, PEERS, PoolMachine
from .test_tiers_machine import TiersMachine

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

LOOK_EVERY = 100
"""Operations between two looks at all invariants, which cost far more than the operations."""

ARGUMENTS: dict[str, Callable[[random.Random], Any]] = {
    "pick": lambda chance: chance,
    "space": lambda chance: chance.choice(NAMESPACES),
    "prefix": lambda chance: tuple(chance.randrange(3) for _ in range(chance.randint(1, 5))),
    "n": lambda chance: chance.randrange(9),
    "blocks": lambda chance: chance.randrange(9),
    "first": lambda chance: chance.randrange(6),
    "last": lambda chance: chance.randrange(6),
    "spare": lambda chance: chance.randrange(PAGE),
    "limit": lambda chance: chance.choice((None, *range(14))),
    "keep": lambda chance: chance.random() < 0.5,
    "publish": lambda chance: chance.random() < 0.7,
    "clean": lambda chance: chance.random() < 0.5,
    "peer": lambda chance: chance.choice(PEERS),
    "by": lambda chance: chance.choice(PEERS),
    "count": lambda chance: chance.randint(1, 4),
    "taker": lambda chance: chance.choice(("none", "takes", "refuses")),
    "seconds": lambda chance: chance.choice((1.0, 3.0, 6.0)),
    "ttl": lambda chance: chance.choice((2.0, 10.0)),
    "tail": lambda chance: chance.randrange(2),
    "tier": lambda chance: chance.choice(tuple(Tier)),
}
POOL = {
    "alloc": "n",
    "free": "pick holdings",
    "free_too_late": "pick holdings",
    "retain": "pick holdings",
    "insert": "pick space prefix spare holdings",
    "match": "space prefix limit keep",
    "release": "pick leases",
    "detach": "pick leases",
    "delete": "space prefix",
    "begin": "peer space prefix tail",
    "complete": "pick taker incoming",
    "abort": "pick incoming",
    "drop_peer": "peer",
    "lend": "peer n",
    "begin_there": "pick space prefix lent",
    "give_back": "pick by count lent",
    "pass_time": "seconds",
}
"""Rules of the machine, each with its arguments and what it must have for them."""
TIERS = {
    "serve": "space prefix keep",
    "recompute": "space prefix",
    "finish": "pick holdings",
    "lease": "space prefix",
    "swap_in_leased": "pick first last leases",
    "release": "pick leases",
    "swap_out": "n",
    "take_host_memory": "n",
    "receive": "space prefix tail publish",
    "resize": "tier blocks",
    "delete": "space prefix",
    "pin": "space prefix ttl",
    "unpin": "pick pins",
    "pass_time": "seconds",
    "flip_a_byte_on_disk": "pick",
    "restart": "clean",
}

CROWD = 12
ENDINGS = {"holdings": ("free", "finish"), "leases": ("release",), "incoming": ("abort",)}
"""What ends one of those that the machine holds, when it holds more than ``CROWD``: a pool that is full of
what is held does nothing else.
"""
INVARIANTS = ("pool_is_sound", "a_subscriber_knows_the_same")


@pytest.mark.parametrize(
    ("machine", "rules", "operations"), [(PoolMachine, POOL, 800_000), (TiersMachine, TIERS, 200_000)]
)
def test_a_million_operations(
    machine: type[PoolMachine | TiersMachine], rules: dict[str, str], operations: int
) -> None:
    running, chance = machine(), random.Random(2026)
    calls = [(getattr(running, name), words.split()) for name, words in rules.items()]
    held = [
        (getattr(running, ending), what)
        for what, endings in ENDINGS.items()
        for ending in endings
        if ending in rules
    ]
    done = 0
    try:
        while done < operations:
            call, words = chance.choice(calls)
            if all(getattr(running, word) for word in words if word not in ARGUMENTS):
                call(**{word: ARGUMENTS[word](chance) for word in words if word in ARGUMENTS})
                done += 1
            for end, what in held:
                if len(getattr(running, what)) > CROWD:
                    end(chance)
            if done % LOOK_EVERY == 0:
                for invariant in INVARIANTS:
                    getattr(running, invariant)()
    finally:
        running.teardown()

"""What the scheduler believes to lie below the device, told by ``Moved`` and by snapshots."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.core.config import TreeSource
from memserve.core.types import InstanceId, Namespace, RequestId, Tokens, as_tokens
from memserve.scheduler.feeds import EventOutcome
from memserve.scheduler.prompt_trees import PromptTrees, TreeOptions
from memserve.scheduler.state import SchedulerState

from .conftest import Cluster

SPACE = Namespace("m")
A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")
APPLIED, SNAPSHOT = EventOutcome.APPLIED, EventOutcome.NEEDS_SNAPSHOT


@pytest.fixture
def tiered(cluster):
    """c0 and c1 hold ten blocks each; c0 has said in a snapshot that only six are on its device."""
    cluster.add("c0", "c1")
    cluster.apply("c1", 0, cluster.stored(0, 10))
    cluster.snapshot("c0", 1, cluster.stored(0, 10), moved=(cluster.moved(0, 10, 6),))
    return cluster


def test_a_snapshot_tells_what_lies_below(tiered) -> None:
    assert tiered.on_device(0, 10) == {"c0": 6, "c1": 10}
    assert tiered.on_device(0, 4) == {"c0": 4, "c1": 4}
    tiered.state.check()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_down_and_up_again(tiered, tier: str) -> None:
    tiered.apply("c0", 1, tiered.moved(0, 6, 2, tier))
    assert tiered.on_device(0, 10)["c0"] == 2
    tiered.apply("c0", 2, tiered.moved(0, 8, 2, "device"))
    assert tiered.on_device(0, 10)["c0"] == 8
    tiered.apply("c0", 3, tiered.moved(0, 10, 8, "device"))
    holdings = tiered.state.match(Namespace("model"), tiered.tokens(0, 10))
    assert holdings.lowered == ()
    tiered.state.check()


def test_what_is_removed_is_on_no_device_and_what_is_stored_is(tiered) -> None:
    tiered.apply("c0", 1, tiered.removed(0, 4, 3))
    assert tiered.on_device(0, 10) == {"c0": 3, "c1": 10}
    tiered.apply("c0", 2, tiered.stored(0, 9))
    assert tiered.on_device(0, 10) == {"c0": 9, "c1": 10}
    tiered.state.check()


def test_the_first_move_down_asks_for_a_snapshot_and_counts_from_there(cluster) -> None:
    cluster.add("c0")
    cluster.apply("c0", 0, cluster.stored(0, 10))
    down = cluster.moved(0, 10, 6)
    assert cluster.apply("c0", 1, down) is SNAPSHOT
    assert cluster.on_device(0, 10) == {"c0": 10}, "what else lies there is not known yet"
    assert cluster.snapshot("c0", 2, cluster.stored(0, 10), moved=(down,)) is APPLIED
    assert cluster.on_device(0, 10) == {"c0": 6}
    assert cluster.apply("c0", 2, cluster.moved(0, 6, 1)) is APPLIED
    assert cluster.on_device(0, 10) == {"c0": 1}


def test_a_gap_hides_moves_until_the_snapshot_and_stale_ones_change_nothing(tiered) -> None:
    assert tiered.apply("c0", 3, tiered.moved(0, 6, 1)) is SNAPSHOT
    assert tiered.on_device(0, 10)["c0"] == 6
    moved = (tiered.moved(0, 10, 4),)
    assert tiered.snapshot("c0", 3, tiered.stored(0, 10), moved=moved) is APPLIED
    assert tiered.on_device(0, 10)["c0"] == 1, "the early batch came after the snapshot"
    tiered.apply("c0", 2, tiered.moved(0, 10, 1, "device"))
    assert tiered.on_device(0, 10)["c0"] == 1
    assert tiered.snapshot("c0", 2, tiered.stored(0, 10)) is APPLIED
    assert tiered.on_device(0, 10)["c0"] == 1


def test_a_new_incarnation_has_no_lower_tiers_until_it_says_so(tiered) -> None:
    tiered.add("c0", incarnation=2)
    tiered.apply("c0", 0, tiered.stored(0, 10), incarnation=2)
    assert tiered.on_device(0, 10) == {"c0": 10, "c1": 10}
    tiered.state.drop_instance(InstanceId("c0"))
    tiered.add("c2")
    tiered.apply("c2", 0, tiered.stored(0, 5))
    assert tiered.on_device(0, 10) == {"c1": 10, "c2": 5}, "it has the number of the one that left"
    tiered.state.check()


def test_who_computes_a_prompt_has_it_on_the_device_then(tiered) -> None:
    tiered.state.promise(RequestId("r"), InstanceId("c0"), Namespace("model"), tiered.tokens(0, 8), 0.0)
    assert tiered.on_device(0, 10) == {"c0": 8, "c1": 10}
    tiered.state.promise(RequestId("s"), InstanceId("c0"), Namespace("model"), tiered.tokens(0, 12), 0.0)
    assert tiered.on_device(0, 10) == {"c0": 10, "c1": 10}


def test_only_what_is_on_a_device_can_be_sent(tiered) -> None:
    tiered.add("c2")
    tiered.snapshot("c2", 1, tiered.stored(0, 10), moved=(tiered.moved(0, 3, 0),))
    tiers = tiered.state.match(Namespace("model"), tiered.tokens(0, 10)).device_tiers()
    assert [(tier.tokens // 16, list(tier.instances())) for tier in tiers] == [(10, ["c1"]), (6, ["c0"])]


def test_both_trees_share_the_memory() -> None:
    limit = 64 * 1024
    made = PromptTrees(2, TreeOptions(memory=limit))
    for name in (A, B):
        made.enlist(name)

    def fill(start: int) -> None:
        for path in range(start, start + 200):
            for name in (A, B):
                made.store(name, SPACE, as_tokens([path, *range(101)]))

    fill(0)
    assert limit // 2 < made.memory <= limit
    made.tell_tiers_apart(A)
    assert made.memory <= limit // 2, "at once"
    fill(200)
    assert limit // 2 < made.memory <= limit
    made.check()
    made.drop_instance(A)
    fill(400)
    assert limit // 2 < made.memory <= limit
    made.check()


Path = tuple[int, ...]
paths = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple)
Change = tuple[InstanceId, str, Path, int]
changes = st.lists(
    st.tuples(
        st.sampled_from([A, B, C]),
        st.sampled_from(["store", "remove", "lower", "raise", "drop"]),
        paths,
        st.integers(0, 5),
    ),
    max_size=40,
)


def tokens_of(path: Path) -> Tokens:
    return as_tokens([token for block in path for token in (block, block)])


def prefixes(path: Path) -> set[Path]:
    return {path[: n + 1] for n in range(len(path))}


class Model:
    """Sets of prefixes that each instance holds, and has on its device. C's tiers are not told apart."""

    def __init__(self) -> None:
        self.held: dict[InstanceId, set[Path]] = {A: set(), B: set(), C: set()}
        self.device: dict[InstanceId, set[Path]] = {A: set(), B: set(), C: set()}

    def change(self, made: PromptTrees, name: InstanceId, how: str, path: Path, at: int) -> None:
        at = min(at, len(path) - 1)
        cut = path[: at + 1]
        if how == "store":
            made.store(name, SPACE, tokens_of(path))
            self.held[name] |= prefixes(path)
            self.device[name] |= prefixes(path)
        elif how == "remove":
            made.remove(name, SPACE, tokens_of(cut), 2 * at)
            self._cut(self.held[name], cut)
            self._cut(self.device[name], cut)
        elif how == "lower":
            assert made.lowered(name, SPACE, tokens_of(path), 2 * at) is (name != C)
            if name != C:
                self._cut(self.device[name], cut)
        elif how == "raise" and path in self.held[name]:
            made.raised(name, SPACE, tokens_of(path))
            self.device[name] |= prefixes(path)
        elif how == "drop" and name != C:
            made.drop_instance(name)
            made.enlist(name)
            made.tell_tiers_apart(name)
            self.held[name], self.device[name] = set(), set()

    def _cut(self, known: set[Path], end: Path) -> None:
        known -= {path for path in known if path[: len(end)] == end}


@settings(max_examples=200, deadline=None)
@given(script=changes, asked=st.lists(paths, min_size=1, max_size=4))
def test_devices_by_a_model_of_sets(script: list[Change], asked: list[Path]) -> None:
    made, model = PromptTrees(2, TreeOptions()), Model()
    for name in (A, B, C):
        made.enlist(name)
    for name in (A, B):
        made.tell_tiers_apart(name)
    for change in script:
        model.change(made, *change)
        made.check()
    for path in asked:
        found = made.match(SPACE, tokens_of(path)).expected()
        for name in (A, B, C):
            assert found.tokens(name) == 2 * len(prefixes(path) & model.held[name])
            assert found.on_device(name) == 2 * len(prefixes(path) & model.device[name])
        best = max((found.on_device(name) for name in (A, B, C)), default=0)
        assert max((tier.tokens for tier in found.device_tiers()), default=0) == best


def test_trees_that_go_by_time_know_no_tiers() -> None:
    state = SchedulerState(16, TreeOptions(source=TreeSource.TTL))
    cluster = Cluster()
    cluster.state = state
    cluster.add("c0")
    state.learn_answer([InstanceId("c0")], Namespace("model"), cluster.tokens(0, 10), 0.0)
    assert cluster.apply("c0", 0, cluster.moved(0, 10, 6)) is APPLIED
    assert cluster.snapshot("c0", 1, cluster.stored(0, 10), moved=(cluster.moved(0, 10, 6),)) is APPLIED
    assert cluster.on_device(0, 10) == {"c0": 10}
    state.check()

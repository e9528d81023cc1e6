"""Which prompts get the tokens of a step that are for prefill. Pure; the simulator's engines use it too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from memserve.engine.pace import Budget


class Prompt(Protocol):
    """Somebody of whose tokens ``computed`` are done and ``pending`` are not: at least one."""

    @property
    def computed(self) -> int: ...

    @property
    def pending(self) -> int: ...


P = TypeVar("P", bound=Prompt)


def fit_alone(computed: int, pending: int, budget: Budget) -> int:
    """How many tokens a prompt gets beside which there is no other."""
    return max(1, budget.fit(computed, pending))


def share_out(prompts: Sequence[P], budget: Budget) -> Iterator[tuple[P, int]]:
    """How many tokens each of ``prompts`` gets, which are in order of arrival, within ``budget``.

    Half goes to the oldest, the rest to the shortest first; whoever gets none is left out.
    """
    if not prompts:
        return
    oldest = prompts[0]
    if len(prompts) == 1:
        count = fit_alone(oldest.computed, oldest.pending, budget)
        budget.spend(oldest.computed, count)
        yield oldest, count
        return
    sure = max(1, budget.fit(oldest.computed, oldest.pending, 0.5))
    budget.spend(oldest.computed, sure)
    counts = {id(oldest): sure}
    for prompt in sorted(prompts, key=lambda each: each.pending):
        given = counts.get(id(prompt), 0)
        more = budget.fit(prompt.computed + given, prompt.pending - given)
        budget.spend(prompt.computed + given, more)
        counts[id(prompt)] = given + more
    yield from ((prompt, count) for prompt in prompts if (count := counts[id(prompt)]))

"""The policies by name."""

from __future__ import annotations

from memserve.core.config import POLICIES
from memserve.core.errors import ConfigError
from memserve.scheduler.policies.classic import LeastLoad, PromptTree, RoundRobin, SessionId
from memserve.scheduler.policies.cost import LeastCost
from memserve.scheduler.policies.peers import CacheAware, ExploitExplore, WeightedOverlap
from memserve.scheduler.policies.plan import Policy


def policy_by_name(name: str) -> Policy:
    """One of ``core.config.POLICIES``; raises ``ConfigError`` for another name."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ConfigError(f"server.policy is {name!r}; accepted: {', '.join(POLICIES)}") from None


_ALL: tuple[Policy, ...] = (
    RoundRobin(),
    LeastLoad(),
    SessionId(),
    PromptTree(),
    LeastCost(),
    WeightedOverlap(),
    CacheAware(),
    ExploitExplore(),
)
_BY_NAME = {policy.name: policy for policy in _ALL}

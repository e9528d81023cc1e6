"""How to choose the places of a request: one pure function of a query per policy, behind one interface."""

from memserve.scheduler.policies.plan import (
    MAX_CANDIDATES,
    Choice,
    Fetch,
    Figures,
    LegQuery,
    Plan,
    Policy,
    Query,
    Weighed,
)
from memserve.scheduler.policies.registry import policy_by_name

__all__ = [
    "MAX_CANDIDATES",
    "Choice",
    "Fetch",
    "Figures",
    "LegQuery",
    "Plan",
    "Policy",
    "Query",
    "Weighed",
    "policy_by_name",
]

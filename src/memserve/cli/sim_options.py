"""The options that ``memserve sim`` and ``memserve plan`` share, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memserve.cli.workloads import MOONCAKE, SYNTHETIC, Lengths, Wanted, make_workload
from memserve.core.config import POLICIES
from memserve.core.errors import ConfigError

if TYPE_CHECKING:
    from memserve.bench.timeline import Pace
    from memserve.bench.workload import Workload
    from memserve.sim.site import Site
    from memserve.sim.speeds import Profile

CONTEXT = 1 << 17
DEFAULT_LOAD = 0.7
_CLUSTER, _WHAT, _PACE, _OUT = "Cluster", "Workload", "Pace", "Report"
_EVENTS = "What befalls instances"

Prefill = Annotated[int, typer.Option(help="Instances that only prefill.", rich_help_panel=_CLUSTER)]
Decode = Annotated[int, typer.Option(help="Instances that only decode.", rich_help_panel=_CLUSTER)]
Colocated = Annotated[
    int,
    typer.Option(
        help="Instances that do both. Default 4, where there are no others.", rich_help_panel=_CLUSTER
    ),
]
Policies = Annotated[
    str,
    typer.Option(
        help=f"Policies to compare: {', '.join(POLICIES)}.", metavar="NAMES", rich_help_panel=_CLUSTER
    ),
]
SpeedName = Annotated[
    str | None,
    typer.Option(
        "--speed",
        help="How fast instances are: **a800x8-70b** (default), **h100x8-70b**, **h100-8b**, **cpu-135m**, "
        "or a file FILE.json of measured prices; docs/simulator.md has the sources.",
        metavar="PROFILE",
        rich_help_panel=_CLUSTER,
    ),
]
FromUrl = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="As fast as the instances of a running server have measured themselves to be.",
        metavar="URL",
        rich_help_panel=_CLUSTER,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="MEMSERVE_API_KEY", help="Key that the server asks for.", rich_help_panel=_CLUSTER),
]
KvTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of KV that an instance has room for. Default: by profile.", rich_help_panel=_CLUSTER
    ),
]
WorkloadName = Annotated[
    str | None,
    typer.Option(
        "--workload",
        help="**synthetic** (default), or with --data: **sharegpt**, **loogle**, **react**.",
        metavar="NAME",
        rich_help_panel=_WHAT,
    ),
]
Requests = Annotated[
    int,
    typer.Option(
        help="Requests of the trace's beginning, or sessions of another workload.", rich_help_panel=_WHAT
    ),
]
Context = Annotated[
    int, typer.Option(help="Tokens that prompts and answers are cut to.", rich_help_panel=_WHAT)
]
Load = Annotated[
    float | None,
    typer.Option(
        help="Pace by share of saturation: 1 is as much as the instances that prefill could prefill, had "
        "nothing been cached. Default 0.7 where the workload has no arrivals of its own.",
        rich_help_panel=_PACE,
    ),
]
Kill = Annotated[
    list[str] | None,
    typer.Option(
        help="Lose an instance: INSTANCE@SECONDS, +BACK if it returns so many seconds later. Repeatable.",
        metavar="EVENT",
        rich_help_panel=_EVENTS,
    ),
]
RoleChanges = Annotated[
    list[str] | None,
    typer.Option(
        help="Change what an instance does: INSTANCE=ROLE@SECONDS. Repeatable.",
        metavar="EVENT",
        rich_help_panel=_EVENTS,
    ),
]
SloTpot = Annotated[
    float | None,
    typer.Option(help="Mean seconds per further token that a good turn keeps.", rich_help_panel=_OUT),
]
Report = Annotated[
    Path | None, typer.Option("--report", help="Write a page with plots to this file.", rich_help_panel=_OUT)
]
Decisions = Annotated[
    Path | None,
    typer.Option(
        help="Write the decision log here, for **memserve replay**; with one policy.",
        metavar="FILE",
        rich_help_panel=_OUT,
    ),
]
Concurrency = Annotated[
    int | None, typer.Option(help="Sessions at a time instead (closed loop).", rich_help_panel=_PACE)
]


@dataclass(frozen=True, slots=True)
class Speeds:
    """How fast instances are, and what they hold, as the command line says it."""

    speed: str | None
    url: str | None
    api_key: str | None
    kv_tokens: int | None


@dataclass(frozen=True, slots=True)
class What:
    """Which workload, as the command line says it."""

    name: str | None
    data: Path | None
    trace: Path | None
    requests: int
    seed: int
    context: int
    think: float | None
    lengths: Lengths


@dataclass(frozen=True, slots=True)
class Pacing:
    """How fast requests come, as the command line says it."""

    load: float | None
    rate: float | None
    concurrency: int | None


def choose_workload(what: What) -> Workload:
    """Read or make it. Raises ``ConfigError``."""
    if what.requests < 1:
        raise ConfigError(f"--requests is {what.requests}; accepted: at least 1")
    if what.seed < 0:
        raise ConfigError(f"--seed is {what.seed}; accepted: 0 or more")
    name = what.name or (SYNTHETIC if what.trace is None else MOONCAKE)
    return make_workload(
        Wanted(name, what.data, what.trace, what.requests, what.context, what.seed, what.think, what.lengths)
    )


def choose_profile(asked: Speeds) -> Profile:
    """By name, file or running server. Raises ``ConfigError`` or ``ServerError``."""
    from memserve.sim.speeds import DEFAULT_PROFILE, profile_by_name, profile_of_cluster

    if asked.url is None:
        return profile_by_name(asked.speed or DEFAULT_PROFILE)
    if asked.speed is not None:
        raise ConfigError("--speed and --from exclude each other: a profile, or a server that runs")
    from memserve.cli.client import ServerClient

    with ServerClient(asked.url, asked.api_key) as client:
        return profile_of_cluster(client.cluster(), asked.url)


def choose_site(profile: Profile, kv_tokens: int | None, prefill: int, decode: int, colocated: int) -> Site:
    """Instances of ``profile``. Raises ``ConfigError`` where a role is left to nobody."""
    from memserve.sim.engine import LAYOUT
    from memserve.sim.site import Site

    if min(prefill, decode, colocated) < 0:
        raise ConfigError("--prefill, --decode and --colocated are numbers of instances; accepted: 0 or more")
    if not (prefill or colocated) or not (decode or colocated):
        raise ConfigError(
            f"{prefill} prefill, {decode} decode and {colocated} colocated instances leave prefill or decode "
            "to nobody; give both --prefill and --decode, or --colocated"
        )
    tokens = profile.kv_tokens if kv_tokens is None else kv_tokens
    if tokens < LAYOUT.block_tokens:
        raise ConfigError(f"--kv-tokens is {tokens}; accepted: at least {LAYOUT.block_tokens}")
    blocks = tokens // LAYOUT.block_tokens
    return Site(prefill, decode, colocated, profile.speed, blocks, profile.wire, profile.decode_speed)


def choose_pace(asked: Pacing, workload: Workload, site: Site) -> Pace:
    """How sessions begin. Raises ``ConfigError``."""
    from memserve.bench.timeline import Pace, check_pace
    from memserve.sim.trial import rate_of

    if asked.load is not None and (asked.rate is not None or asked.concurrency is not None):
        raise ConfigError("--load, --rate and --concurrency exclude each other")
    recorded = all(session.arrival is not None for session in workload.sessions)
    load = asked.load
    if load is None and asked.rate is None and asked.concurrency is None and not recorded:
        load = DEFAULT_LOAD
    rate = asked.rate if load is None else rate_of(workload, site, load)
    pace = Pace(rate, asked.concurrency)
    check_pace(pace)
    return pace

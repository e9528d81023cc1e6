"""``memserve plan``: the fewest instances that keep a service level under a workload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from memserve.cli import bench_options
from memserve.cli import sim_options as options
from memserve.cli.bench import INTERRUPTED
from memserve.cli.failure import BAD_USAGE, CANNOT, fail
from memserve.cli.files import allow_open_files
from memserve.cli.sim_options import CONTEXT, Pacing, Speeds, What
from memserve.cli.workloads import Lengths
from memserve.core.config import POLICIES
from memserve.core.errors import ConfigError, MemServeError

if TYPE_CHECKING:
    from rich.table import Table

    from memserve.bench.records import Record
    from memserve.cli.bench_screen import BenchScreen
    from memserve.sim.planning import Goal, Search, Shape, Tried
    from memserve.sim.site import Site
    from memserve.sim.trial import Load

HELP = """Find the fewest instances that keep a service level, by simulating clusters of many shapes.

Tries colocated instances, then prefill with decode instances, halving between too few and enough. Exit code 1
when nothing up to --max-instances is enough.

Examples:

    memserve plan --trace conversation.jsonl --slo-ttft 30 --slo-tpot 0.1
    memserve plan --workload sharegpt --data DIR --rate 20 --slo-ttft 1 --slo-tpot 0.05 --speed h100-8b
"""
_GOAL = "Service level"
_PACED = 0.9
"""Engines are paced to this part of what is asked: the time between tokens varies."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be found out: the goal, what is sent, and what one instance is like, in ``site``."""

    goal: Goal
    load: Load
    site: Site
    policy: str


def plan(
    slo_ttft: Annotated[
        float, typer.Option(help="Seconds to the first token that a good turn keeps.", rich_help_panel=_GOAL)
    ],
    slo_tpot: Annotated[
        float, typer.Option(help="Mean seconds per further token that it keeps.", rich_help_panel=_GOAL)
    ],
    share: Annotated[
        float, typer.Option(help="Share of all turns that are to be good.", rich_help_panel=_GOAL)
    ] = 0.99,
    max_instances: Annotated[
        int, typer.Option(help="No cluster larger than that is tried.", rich_help_panel=_GOAL)
    ] = 64,
    policy: Annotated[
        str, typer.Option(help=f"Routing policy: {', '.join(POLICIES)}.", metavar="NAME")
    ] = "cost",
    speed: options.SpeedName = None,
    from_url: options.FromUrl = None,
    api_key: options.ApiKey = None,
    kv_tokens: options.KvTokens = None,
    workload: options.WorkloadName = None,
    data: bench_options.Data = None,
    trace: bench_options.Trace = None,
    requests: options.Requests = 2000,
    seed: bench_options.Seed = 0,
    context: options.Context = CONTEXT,
    think: bench_options.Think = None,
    rate: bench_options.Rate = None,
    turns: bench_options.Turns = 3,
    prompt_tokens: bench_options.PromptTokens = 4096,
    shared: bench_options.Shared = 0.5,
    turn_tokens: bench_options.TurnTokens = 256,
    output_tokens: bench_options.OutputTokens = 256,
) -> None:
    """Plan a cluster; ``HELP`` says it to users."""
    from memserve.bench.statistics import Slo
    from memserve.sim.planning import Goal

    what = What(
        *(workload, data, trace, requests, seed, context, think),
        lengths=Lengths(turns, prompt_tokens, shared, turn_tokens, output_tokens),
    )
    try:
        goal = Goal(Slo(_more_than_0(slo_ttft, "ttft"), _more_than_0(slo_tpot, "tpot")), share, max_instances)
        question = _prepare(goal, policy, Speeds(speed, from_url, api_key, kv_tokens), what, rate)
        found = _search(question)
    except ConfigError as error:
        fail(error, BAD_USAGE)
    except MemServeError as error:
        fail(error, CANNOT)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    _show(question, found)


def _more_than_0(seconds: float, name: str) -> float:
    if not seconds > 0:
        raise ConfigError(f"--slo-{name} is {seconds:g}; accepted: more than 0 seconds")
    return seconds


def _prepare(goal: Goal, policy: str, speeds: Speeds, what: What, rate: float | None) -> Question:
    """Read what is to be read. Raises ``ConfigError``."""
    # The memory of each instance's pool is a file, whether it is touched or not.
    allow_open_files(goal.most)
    from memserve.sim.trial import Load

    if policy not in POLICIES:
        raise ConfigError(f"--policy is {policy!r}; accepted: {', '.join(POLICIES)}")
    profile = options.choose_profile(speeds)
    paced = _PACED * (goal.slo.itl or 0.0)
    speed = replace(profile.speed, target_tpot=paced)
    decode = profile.decode_speed and replace(profile.decode_speed, target_tpot=paced)
    paced_profile = replace(profile, speed=speed, decode_speed=decode)
    site = options.choose_site(paced_profile, speeds.kv_tokens, 0, 0, 1)
    workload = options.choose_workload(what)
    if rate is None and any(session.arrival is None for session in workload.sessions):
        raise ConfigError(f"workload {workload.name} has no arrivals of its own; give --rate")
    pace = options.choose_pace(Pacing(None, rate, None), workload, site)
    return Question(goal, Load(workload, pace, what.seed), site, policy)


def _search(question: Question) -> Search:
    """Try clusters, with a bar for the turns of each."""
    from rich.console import Console

    from memserve.cli.bench_screen import BenchScreen
    from memserve.sim.planning import search

    with BenchScreen(Console(stderr=True), question.load.workload.turns, 1) as screen:

        def attempt(shape: Shape) -> Tried:
            site = _site_of(question, shape)
            screen.starting(site.shape, 0)
            screen.running(site.shape, 0)
            return _try(question, shape, screen)

        return search(question.goal, attempt)


def _try(question: Question, shape: Shape, screen: BenchScreen) -> Tried:
    from memserve.bench.statistics import summarize
    from memserve.sim.planning import Tally, Tried
    from memserve.sim.trial import run_trial

    tally = Tally(question.goal, question.load.workload.turns)

    def on_record(record: Record) -> None:
        tally.count(record)
        screen.turn_ended(record)

    trial = run_trial(
        question.load,
        _site_of(question, shape),
        question.policy,
        on_record=on_record,
        give_up=lambda: tally.hopeless,
    )
    records = [record for record in trial.measured.records if not record.error]
    return Tried(
        shape,
        not tally.hopeless,
        tally.kept,
        trial.stopped,
        tally.late,
        tally.slow,
        summarize(record.ttft for record in records),
        summarize(record.tpot for record in records if record.tpot is not None),
        trial.utilization,
    )


def _site_of(question: Question, shape: Shape) -> Site:
    return replace(question.site, prefill=shape.prefill, decode=shape.decode, colocated=shape.colocated)


def _show(question: Question, found: Search) -> None:
    from rich.console import Console

    goal, console = question.goal, Console(highlight=False, soft_wrap=True)
    level = f"a first token within {goal.slo.ttft:g} s and {goal.slo.itl:g} s per further token"
    console.print(_table(question, found))
    if found.best is None:
        fail(
            f"no cluster of up to {goal.most} instances keeps {level} for {goal.share:.4g} of the turns; "
            "raise --max-instances or --slo-ttft or --slo-tpot: the table says which is out of reach",
            CANNOT,
        )
    shape = _site_of(question, found.best.shape).shape
    console.print(
        f"{shape} is the smallest that was found to keep {level} for {goal.share:.4g} of all turns: "
        f"{found.best.kept:.2%} of them did",
        style="bold",
    )


def _table(question: Question, found: Search) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("cluster", no_wrap=True)
    for name in ("kept", "late", "slow", "TTFT p50", "TTFT p99", "TPOT p99", "busy", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.tried:
        table.add_row(
            _site_of(question, one.shape).shape,
            f"{'<' if one.stopped else ''}{one.kept:.2%}",
            f"{one.late:,}",
            f"{one.slow:,}",
            f"{one.ttft.p50:.3f}",
            f"{one.ttft.p99:.3f}",
            f"{one.tpot.p99:.4f}",
            f"{one.utilization:.0%}",
            "enough" if one.met else "",
            style="bold" if one is found.best else "",
        )
    return table

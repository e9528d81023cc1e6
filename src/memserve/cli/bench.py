"""``memserve bench``: from options to targets, a workload and a plan; runs it, shows it, writes it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from memserve.cli import bench_options as options
from memserve.cli.failure import BAD_USAGE, CANNOT, fail
from memserve.cli.files import check_writable, write_file
from memserve.cli.workloads import Lengths, Wanted, make_workload
from memserve.core.errors import ConfigError, MemServeError

if TYPE_CHECKING:
    from rich.console import Console

    from memserve.bench.comparison import Comparison, Plan
    from memserve.bench.target import Target
    from memserve.bench.timeline import Pace
    from memserve.bench.workload import Endpoint, Workload

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_CONCURRENCY = 4
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Whom:
    """Which servers, as the command line says it."""

    url: str | None
    compare: str | None
    serve: str
    rounds: int
    model: str | None
    api_key: str | None


@dataclass(frozen=True, slots=True)
class What:
    """How a workload is made and sent."""

    sessions: int
    context: int
    seed: int
    salt: str | None
    endpoint: str | None
    fixed: bool | None
    recorded_answers: bool
    think: float | None


@dataclass(frozen=True, slots=True)
class Pacing:
    """How fast, and how long."""

    rate: float | None
    concurrency: int | None
    speed: float
    duration: float | None
    timeout: float


@dataclass(frozen=True, slots=True)
class Out:
    """What is reported, and where to."""

    slo_ttft: float | None
    slo_itl: float | None
    json: Path | None
    html: Path | None


def bench(
    url: options.Url = None,
    compare: options.Compare = None,
    serve: options.Serve = "",
    rounds: options.Rounds = 1,
    model: options.Model = None,
    api_key: options.ApiKey = None,
    workload: options.WorkloadName = "synthetic",
    data: options.Data = None,
    trace: options.Trace = None,
    sessions: options.Sessions = 16,
    context: options.Context = 2048,
    seed: options.Seed = 0,
    salt: options.Salt = None,
    endpoint: options.EndpointName = None,
    fixed: options.Fixed = None,
    recorded_answers: options.Recorded = False,
    think: options.Think = None,
    rate: options.Rate = None,
    concurrency: options.Concurrency = None,
    speed: options.Speed = 1.0,
    duration: options.Duration = None,
    timeout: options.Timeout = 120.0,
    turns: options.Turns = 3,
    prompt_tokens: options.PromptTokens = 512,
    shared: options.Shared = 0.5,
    turn_tokens: options.TurnTokens = 64,
    output_tokens: options.OutputTokens = 64,
    slo_ttft: options.SloTtft = None,
    slo_itl: options.SloItl = None,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Measure servers under load; ``HELP`` says it to users."""
    whom = Whom(url, compare, serve, rounds, model, api_key or None)
    what = What(sessions, context, seed, salt, endpoint, fixed, recorded_answers, think)
    pacing = Pacing(rate, concurrency, speed, duration, timeout)
    out = Out(slo_ttft, slo_itl, json, html)
    try:
        _check(whom, what, pacing, out)
        targets = _choose_targets(whom)
        wanted = Wanted(
            *(workload, data, trace, sessions, context, seed, think),
            lengths=Lengths(turns, prompt_tokens, shared, turn_tokens, output_tokens),
        )
        plan = _make_plan(whom, what, pacing, make_workload(wanted))
    except ConfigError as error:
        fail(error, BAD_USAGE)
    _run(targets, plan, out)


def _make_plan(whom: Whom, what: What, pacing: Pacing, workload: Workload) -> Plan:
    from memserve.bench.comparison import Plan

    return Plan(
        workload=workload,
        context=what.context,
        pace=_choose_pace(pacing, workload),
        seed=what.seed,
        rounds=whom.rounds,
        salt=_choose_salt(what.salt, whom.compare),
        endpoint=_choose_endpoint(what.endpoint),
        fixed=what.fixed,
        real_answers=not what.recorded_answers,
        timeout=pacing.timeout,
        duration=pacing.duration,
        model=whom.model,
        api_key=whom.api_key,
    )


def _check(whom: Whom, what: What, pacing: Pacing, out: Out) -> None:
    """What can be said before anything is read or started. Raises ``ConfigError``."""
    for option, value in (
        ("--rounds", whom.rounds),
        ("--sessions", what.sessions),
        ("--timeout", pacing.timeout),
        ("--duration", pacing.duration),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"{option} is {value:g}; accepted: more than 0")
    for option, value in (
        ("--seed", what.seed),
        ("--think", what.think),
        ("--slo-ttft", out.slo_ttft),
        ("--slo-itl", out.slo_itl),
    ):
        if value is not None and not value >= 0:
            raise ConfigError(f"{option} is {value:g}; accepted: 0 or more")
    check_writable(out.json, out.html)


def _choose_targets(whom: Whom) -> tuple[Target, ...]:
    from memserve.bench.target import parse_configurations, parse_urls

    if whom.url is not None and whom.compare is not None:
        raise ConfigError("--url and --compare exclude each other: servers that run, or servers to start")
    if whom.compare is not None:
        return parse_configurations(whom.compare, whom.serve)
    if whom.serve:
        raise ConfigError("--serve is for servers that are started here; give --compare as well")
    return parse_urls(whom.url or DEFAULT_URL)


def _choose_pace(asked: Pacing, workload: Workload) -> Pace:
    from memserve.bench.timeline import Pace, check_pace

    recorded = all(session.arrival is not None for session in workload.sessions)
    by_default = asked.rate is None and asked.concurrency is None and not recorded
    concurrency = DEFAULT_CONCURRENCY if by_default else asked.concurrency
    pace = Pace(asked.rate, concurrency, asked.speed)
    check_pace(pace)
    return pace


def _choose_salt(asked: str | None, compare: str | None) -> str:
    """Servers that are started here have nothing cached; those that run may have."""
    if asked is not None:
        return asked
    return "" if compare is not None else secrets.token_hex(4)


def _choose_endpoint(asked: str | None) -> Endpoint | None:
    from memserve.bench.workload import Endpoint

    if asked is None or asked in set(Endpoint):
        return None if asked is None else Endpoint(asked)
    raise ConfigError(f"--endpoint is {asked!r}; accepted: {', '.join(Endpoint)}")


def _run(targets: Sequence[Target], plan: Plan, out: Out) -> None:
    import uvloop
    from rich.console import Console

    from memserve.bench.page import render_page
    from memserve.bench.report import encode_report, make_report
    from memserve.bench.statistics import Slo
    from memserve.cli.bench_screen import print_report

    try:
        comparison, interrupted = uvloop.run(_measure(targets, plan, Console(stderr=True)))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if not comparison.results:
        _give_up(comparison.failure)
    report = make_report(comparison.results, plan, Slo(out.slo_ttft, out.slo_itl), interrupted=interrupted)
    print_report(report, Console())
    if out.json is not None:
        write_file(out.json, encode_report(report))
    if out.html is not None:
        write_file(out.html, render_page(report).encode())
    if comparison.failure is not None:
        _give_up(comparison.failure)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not any(entry.figures.turns for entry in report.entries):
        fail("no turn was answered", CANNOT)


def _give_up(failure: MemServeError | None) -> NoReturn:
    """End with what stood in the way; nothing did if the user had enough."""
    if failure is None:
        fail("interrupted before anything was measured", INTERRUPTED)
    fail(failure, BAD_USAGE if isinstance(failure, ConfigError) else CANNOT)


async def _measure(targets: Sequence[Target], plan: Plan, console: Console) -> tuple[Comparison, bool]:
    """Run the plan; the first Ctrl-C ends it and keeps what there is, a second one gives up."""
    import asyncio
    import signal

    from memserve.bench.comparison import compare_targets
    from memserve.cli.bench_screen import BenchScreen

    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        with BenchScreen(console, plan.workload.turns, plan.rounds) as screen:
            return await compare_targets(targets, plan, screen, stop), stop.is_set()
    finally:
        loop.remove_signal_handler(signal.SIGINT)

"""``memserve bench``: from options to targets, a workload and a plan; runs it, shows it, writes it."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from memserve.cli import bench_options as options
from memserve.cli.failure import BAD_USAGE, CANNOT, fail
from memserve.core.errors import ConfigError, MemServeError

if TYPE_CHECKING:
    from rich.console import Console

    from memserve.bench.comparison import Plan, Result
    from memserve.bench.statistics import Slo
    from memserve.bench.synthetic import Shape
    from memserve.bench.target import Target
    from memserve.bench.timeline import Pace
    from memserve.bench.workload import Endpoint, Workload

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_CONCURRENCY = 4
INTERRUPTED = 130
SYNTHETIC, MOONCAKE = "synthetic", "mooncake"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which workload, as the command line says it."""

    name: str
    data: Path | None
    trace: Path | None
    context: int
    seed: int
    sessions: int
    think: float | None


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
    from memserve.bench.comparison import Plan
    from memserve.bench.statistics import Slo
    from memserve.bench.synthetic import Shape
    from memserve.bench.timeline import Pace

    try:
        _check_numbers(
            {"--rounds": rounds, "--timeout": timeout, "--duration": duration},
            {"--seed": seed, "--think": think, "--slo-ttft": slo_ttft, "--slo-itl": slo_itl},
        )
        targets = _choose_targets(url, compare, serve)
        shape = Shape(sessions, turns, prompt_tokens, shared, turn_tokens, output_tokens)
        made = _make_workload(Choice(workload, data, trace, context, seed, sessions, think), shape)
        plan = Plan(
            workload=made,
            context=context,
            pace=_choose_pace(Pace(rate, concurrency, speed), made),
            seed=seed,
            rounds=rounds,
            salt=_choose_salt(salt, compare),
            endpoint=_choose_endpoint(endpoint),
            fixed=fixed,
            real_answers=not recorded_answers,
            timeout=timeout,
            duration=duration,
            model=model,
            api_key=api_key or None,
        )
        for file in (json, html):
            _require_writable(file)
    except ConfigError as error:
        fail(error, BAD_USAGE)
    _run(targets, plan, Slo(slo_ttft, slo_itl), json, html)


def _check_numbers(positive: dict[str, float | None], others: dict[str, float | None]) -> None:
    """Both by option. Raises ``ConfigError``."""
    for option, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{option} is {value:g}; accepted: more than 0")
    for option, value in others.items():
        if value is not None and not value >= 0:
            raise ConfigError(f"{option} is {value:g}; accepted: 0 or more")


def _choose_targets(url: str | None, compare: str | None, serve: str) -> tuple[Target, ...]:
    from memserve.bench.target import parse_configurations, parse_urls

    if url is not None and compare is not None:
        raise ConfigError("--url and --compare exclude each other: servers that run, or servers to start")
    if compare is not None:
        return parse_configurations(compare, serve)
    if serve:
        raise ConfigError("--serve is for servers that are started here; give --compare as well")
    return parse_urls(url or DEFAULT_URL)


def _make_workload(choice: Choice, shape: Shape) -> Workload:
    from memserve.bench.sources import Recorded, read_replay, read_workload
    from memserve.bench.synthetic import make_synthetic

    if (choice.name == MOONCAKE) != (choice.trace is not None):
        raise ConfigError(f"--workload {MOONCAKE} and --trace FILE go together")
    if choice.trace is not None:
        return read_replay(choice.trace, choice.sessions, choice.context)
    if choice.name == SYNTHETIC:
        think = shape.think if choice.think is None else choice.think
        return make_synthetic(replace(shape, think=think), choice.context, choice.seed)
    if choice.data is None:
        raise ConfigError(f"--workload {choice.name} needs --data DIR, a folder with the data sets")
    return read_workload(
        Recorded(choice.name, choice.data, choice.sessions, choice.context, choice.seed, choice.think)
    )


def _choose_pace(asked: Pace, workload: Workload) -> Pace:
    from memserve.bench.timeline import check_pace

    recorded = all(session.arrival is not None for session in workload.sessions)
    if asked.rate is None and asked.concurrency is None and not recorded:
        asked = replace(asked, concurrency=DEFAULT_CONCURRENCY)
    check_pace(asked)
    return asked


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


def _require_writable(file: Path | None) -> None:
    """Better now than after the load has run."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ConfigError(f"{file} cannot be written; accepted: a file in a folder that exists")


def _run(targets: Sequence[Target], plan: Plan, slo: Slo, json: Path | None, html: Path | None) -> None:
    import uvloop
    from rich.console import Console

    from memserve.bench.page import render_page
    from memserve.bench.report import encode_report, make_report
    from memserve.cli.bench_screen import print_report

    try:
        results, interrupted = uvloop.run(_measure(targets, plan, Console(stderr=True)))
    except ConfigError as error:
        fail(error, BAD_USAGE)
    except MemServeError as error:
        fail(error, CANNOT)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if not results:
        fail("interrupted before anything was measured", INTERRUPTED)
    report = make_report(results, plan, slo, interrupted=interrupted)
    print_report(report, Console())
    if json is not None:
        _write(json, encode_report(report))
    if html is not None:
        _write(html, render_page(report).encode())
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not any(entry.figures.turns for entry in report.entries):
        fail("no turn was answered", CANNOT)


async def _measure(
    targets: Sequence[Target], plan: Plan, console: Console
) -> tuple[tuple[Result, ...], bool]:
    """Run the plan; the first Ctrl-C ends it and keeps what there is, a second one gives up."""
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


def _write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        fail(f"{file} cannot be written: {error.strerror or error}", CANNOT)

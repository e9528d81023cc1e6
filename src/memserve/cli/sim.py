"""``memserve sim``: from options to trials on a virtual clock; runs them, shows them, writes them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from memserve.cli import bench_options
from memserve.cli import sim_options as options
from memserve.cli.bench import INTERRUPTED
from memserve.cli.failure import BAD_USAGE, CANNOT, fail
from memserve.cli.files import allow_open_files, check_writable, write_file
from memserve.cli.sim_options import CONTEXT, Pacing, Speeds, What
from memserve.cli.workloads import Lengths
from memserve.core.config import POLICIES
from memserve.core.errors import ConfigError, MemServeError

if TYPE_CHECKING:
    from memserve.scheduler.decision_log import Sink
    from memserve.sim.site import Change, Site
    from memserve.sim.speeds import Profile
    from memserve.sim.trial import Load, Trial

HELP = """Try a cluster that you do not have: the real scheduler and pools, on a virtual clock.

Everything decides as it does in a server; only the engines are modelled, by what their steps cost.

Examples:

    memserve sim --colocated 8 --policy cost,prompt-tree,round-robin
    memserve sim --trace conversation.jsonl --prefill 4 --decode 4 --load 0.9 --report sim.html
    memserve sim --prefill 2 --decode 2 --kill prefill-0@60+30 --role decode-1=colocated@90
    memserve sim --from http://127.0.0.1:8000 --colocated 16 --workload sharegpt --data DIR
"""
_DEFAULT_COUNTS = (0, 0, 4)


@dataclass(frozen=True, slots=True)
class Experiment:
    """All that is run."""

    load: Load
    site: Site
    profile: Profile
    policies: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Out:
    """What is reported, and where to."""

    slo_ttft: float | None
    slo_tpot: float | None
    json: Path | None
    html: Path | None


def sim(
    prefill: options.Prefill = 0,
    decode: options.Decode = 0,
    colocated: options.Colocated = 0,
    policy: options.Policies = "cost,prompt-tree,round-robin",
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
    load: options.Load = None,
    rate: bench_options.Rate = None,
    concurrency: options.Concurrency = None,
    turns: bench_options.Turns = 3,
    prompt_tokens: bench_options.PromptTokens = 4096,
    shared: bench_options.Shared = 0.5,
    turn_tokens: bench_options.TurnTokens = 256,
    output_tokens: bench_options.OutputTokens = 256,
    kill: options.Kill = None,
    role: options.RoleChanges = None,
    slo_ttft: bench_options.SloTtft = None,
    slo_tpot: options.SloTpot = None,
    json: bench_options.Json = None,
    report: options.Report = None,
    decisions: options.Decisions = None,
) -> None:
    """Simulate a cluster; ``HELP`` says it to users."""
    what = What(
        *(workload, data, trace, requests, seed, context, think),
        lengths=Lengths(turns, prompt_tokens, shared, turn_tokens, output_tokens),
    )
    speeds, pacing = Speeds(speed, from_url, api_key, kv_tokens), Pacing(load, rate, concurrency)
    try:
        check_writable(json, report, decisions)
        counts, events = (prefill, decode, colocated), (kill or (), role or ())
        experiment = _prepare(counts, speeds, what, pacing, _choose_policies(policy), events)
        if decisions is not None and len(experiment.policies) > 1:
            raise ConfigError("--decisions is the log of one policy; name one with --policy")
        trials, seconds = _run(experiment, decisions)
    except ConfigError as error:
        fail(error, BAD_USAGE)
    except MemServeError as error:
        fail(error, CANNOT)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    _show(experiment, trials, seconds, Out(slo_ttft, slo_tpot, json, report))


def _prepare(
    counts: tuple[int, int, int],
    speeds: Speeds,
    what: What,
    pacing: Pacing,
    policies: tuple[str, ...],
    events: tuple[Sequence[str], Sequence[str]],
) -> Experiment:
    from memserve.sim.site import check_changes, parse_loss, parse_role_change
    from memserve.sim.trial import Load

    profile = options.choose_profile(speeds)
    site = options.choose_site(profile, speeds.kv_tokens, *(counts if any(counts) else _DEFAULT_COUNTS))
    losses, role_changes = map(parse_loss, events[0]), map(parse_role_change, events[1])
    changes: tuple[Change, ...] = (*losses, *role_changes)
    check_changes(site, changes)
    # The memory of each instance's pool is a file, whether it is touched or not.
    allow_open_files(site.size)
    workload = options.choose_workload(what)
    load = Load(workload, options.choose_pace(pacing, workload, site), what.seed)
    return Experiment(load, site, profile, policies, changes)


def _choose_policies(names: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in POLICIES:
            raise ConfigError(f"--policy has {name!r}; accepted: {', '.join(POLICIES)}")
    return chosen


def _run(experiment: Experiment, decisions: Path | None) -> tuple[list[Trial], float]:
    """One trial per policy, and the seconds of processor time that they took."""
    with contextlib.nullcontext() if decisions is None else decisions.open("wb") as file:
        return _run_each(experiment, None if file is None else file.write)


def _run_each(experiment: Experiment, log: Sink | None) -> tuple[list[Trial], float]:
    from rich.console import Console

    from memserve.cli.bench_screen import BenchScreen
    from memserve.sim.trial import run_trial

    trials, started = [], time.process_time()
    with BenchScreen(Console(stderr=True), experiment.load.workload.turns, 1) as screen:
        for policy in experiment.policies:
            screen.starting(policy, 0)
            screen.running(policy, 0)
            trials.append(
                run_trial(
                    experiment.load,
                    experiment.site,
                    policy,
                    changes=experiment.changes,
                    on_record=screen.turn_ended,
                    log=log,
                )
            )
    return trials, time.process_time() - started


def _show(experiment: Experiment, trials: Sequence[Trial], seconds: float, out: Out) -> None:
    from rich.console import Console

    from memserve.bench.statistics import Slo
    from memserve.cli.bench_screen import print_rows
    from memserve.sim.page import render_page
    from memserve.sim.report import describe_setting, encode_report, make_report, make_rows, note_report

    slo = Slo(out.slo_ttft, out.slo_tpot)
    report = make_report(
        experiment.load, experiment.site, experiment.profile, experiment.changes, slo, trials
    )
    console = Console(highlight=False, soft_wrap=True)
    for line in describe_setting(report):
        console.print(line, markup=False)
    print_rows([entry.name for entry in report.entries], make_rows(report), console)
    for line in note_report(report):
        console.print(line, style="yellow", markup=False)
    turns = sum(len(entry.records) for entry in report.entries)
    console.print(f"{turns:,} turns simulated in {seconds:.1f} s of processor time", style="dim")
    if out.json is not None:
        write_file(out.json, encode_report(report))
    if out.html is not None:
        write_file(out.html, render_page(report).encode())

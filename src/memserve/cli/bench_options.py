"""The options of ``memserve bench`` and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memserve.bench.configurations import CONFIGURATIONS

_WHOM, _WHAT, _PACE, _SYNTHETIC, _OUT = "Whom", "Workload", "Pace", "Synthetic workload", "Report"

HELP = """Measure servers under load: time to first token, between tokens, to the end of answers.

Without options: a small synthetic load on http://127.0.0.1:8000. Ctrl-C ends it and still reports.

Examples:

    memserve bench --concurrency 8 --html report.html
    memserve bench --compare colocated,colocated-cache,disagg,disagg-cache --rounds 3
    memserve bench --url ours=http://127.0.0.1:8000,peer=http://127.0.0.1:9000 --rounds 3
    memserve bench --workload sharegpt --data DIR --sessions 50 --rate 2 --slo-ttft 0.5
"""

Url = Annotated[
    str | None,
    typer.Option(
        help="Running endpoints: one address, or NAME=URL,NAME2=URL2. Default http://127.0.0.1:8000.",
        metavar="URLS",
        rich_help_panel=_WHOM,
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(
        help="Configurations to start and measure in turns, the first is what the others are compared with: "
        f"{', '.join(CONFIGURATIONS)}; or your own as NAME=OPTIONS OF SERVE.",
        metavar="NAMES",
        rich_help_panel=_WHOM,
    ),
]
Serve = Annotated[
    str,
    typer.Option(
        help="Options of **memserve serve** for all configurations, for example '--kv-memory 256MiB'.",
        metavar="OPTIONS",
        rich_help_panel=_WHOM,
    ),
]
Rounds = Annotated[
    int, typer.Option(help="Times that each target gets the workload, in turns.", rich_help_panel=_WHOM)
]
Model = Annotated[
    str | None, typer.Option(help="Model to ask for. Default: the first served.", rich_help_panel=_WHOM)
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="MEMSERVE_API_KEY", help="Key that the servers ask for.", rich_help_panel=_WHOM),
]
WorkloadName = Annotated[
    str,
    typer.Option(
        help="**synthetic**, or with --data: **sharegpt** (chats), **loogle** (questions on documents), "
        "**react** (agents); with --trace: **mooncake**.",
        metavar="NAME",
        rich_help_panel=_WHAT,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder with the data sets; docs/bench.md says which.", rich_help_panel=_WHAT),
]
Trace = Annotated[
    Path | None, typer.Option(help="A trace in Mooncake's format (JSON lines).", rich_help_panel=_WHAT)
]
Sessions = Annotated[int, typer.Option(help="Sessions of the workload.", rich_help_panel=_WHAT)]
Context = Annotated[
    int, typer.Option(help="Tokens that prompts and answers are cut to.", rich_help_panel=_WHAT)
]
Seed = Annotated[int, typer.Option(help="Same seed, same workload.", rich_help_panel=_WHAT)]
Salt = Annotated[
    str | None,
    typer.Option(
        help="Goes into all prompts, so that nothing cached before fits. Default: another one each time; "
        "with --compare always the same.",
        rich_help_panel=_WHAT,
    ),
]
EndpointName = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        help="**chat**, **completions**, or **tokens** (completions of token ids). Default: by workload.",
        metavar="NAME",
        rich_help_panel=_WHAT,
    ),
]
Fixed = Annotated[
    bool | None,
    typer.Option(
        "--fixed-length/--natural-length",
        help="Answers have exactly the recorded length, or may end by themselves before. Default: by "
        "workload.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
Recorded = Annotated[
    bool,
    typer.Option(
        "--recorded-answers",
        help="Later prompts contain the recorded answers, not the given ones.",
        rich_help_panel=_WHAT,
    ),
]
Think = Annotated[
    float | None,
    typer.Option(
        help="Mean seconds between an answer and the session's next turn. Default: as suits the workload.",
        rich_help_panel=_WHAT,
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(help="Sessions that begin per second, whatever happens (open loop).", rich_help_panel=_PACE),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        help="Sessions at a time (closed loop). Default 4, where there is neither --rate nor a trace.",
        rich_help_panel=_PACE,
    ),
]
Speed = Annotated[
    float, typer.Option(help="Replays a trace's arrivals so many times as fast.", rich_help_panel=_PACE)
]
Duration = Annotated[
    float | None, typer.Option(help="Seconds after which a round is cut off.", rich_help_panel=_PACE)
]
Timeout = Annotated[
    float, typer.Option(help="Seconds after which a turn counts as failed.", rich_help_panel=_PACE)
]
Turns = Annotated[int, typer.Option(help="Turns of a session.", rich_help_panel=_SYNTHETIC)]
PromptTokens = Annotated[int, typer.Option(help="Tokens of a first prompt.", rich_help_panel=_SYNTHETIC)]
Shared = Annotated[
    float, typer.Option(help="Share of it that all sessions begin with.", rich_help_panel=_SYNTHETIC)
]
TurnTokens = Annotated[int, typer.Option(help="Tokens that a later turn adds.", rich_help_panel=_SYNTHETIC)]
OutputTokens = Annotated[
    int, typer.Option(help="Tokens of an answer, a quarter up or down.", rich_help_panel=_SYNTHETIC)
]
SloTtft = Annotated[
    float | None,
    typer.Option(help="Seconds to the first token that a good turn keeps.", rich_help_panel=_OUT),
]
SloItl = Annotated[
    float | None,
    typer.Option(help="Mean seconds per further token that a good turn keeps.", rich_help_panel=_OUT),
]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write everything to this file.", rich_help_panel=_OUT)
]
Html = Annotated[
    Path | None, typer.Option("--html", help="Write a page with plots to this file.", rich_help_panel=_OUT)
]

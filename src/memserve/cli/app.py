"""Puts the commands together."""

from __future__ import annotations

from typing import Annotated

import typer

from memserve import __version__
from memserve.cli.bench import bench
from memserve.cli.bench_options import HELP as BENCH_HELP
from memserve.cli.chat import chat
from memserve.cli.doctor import doctor
from memserve.cli.instance import instance
from memserve.cli.plan import HELP as PLAN_HELP
from memserve.cli.plan import plan
from memserve.cli.replay import replay
from memserve.cli.resize import resize
from memserve.cli.role import role
from memserve.cli.serve import serve
from memserve.cli.serve_options import HELP
from memserve.cli.sim import HELP as SIM_HELP
from memserve.cli.sim import sim
from memserve.cli.status import status
from memserve.cli.why import why

app = typer.Typer(
    name="memserve",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: **memserve doctor**, then **memserve serve**, and in another terminal "
    "**memserve chat**.",
)
app.command(help=HELP)(serve)
app.command()(chat)
app.command()(status)
app.command()(why)
app.command()(replay)
app.command()(resize)
app.command()(role)
app.command(help=BENCH_HELP)(bench)
app.command(help=SIM_HELP)(sim)
app.command(help=PLAN_HELP)(plan)
app.command()(doctor)
app.command(hidden=True)(instance)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"memserve {__version__}")
        raise typer.Exit


@app.callback()
def memserve(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve language models with one elastic memory pool for KV cache under all instances.

    Prefill and decode run in separate instances; the KV cache of prompts and answers is kept, shared and
    moved between them, so that the next turn of a chat computes only what is new.
    """


@app.command()
def version() -> None:
    """Show the version."""
    _show_version(True)


def main() -> None:
    """Entry point of the ``memserve`` script."""
    app()

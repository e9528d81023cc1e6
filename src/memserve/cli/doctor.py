"""``memserve doctor``: what this machine offers, what will be used, and what to do about the rest."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Say what this machine offers and what will be used.

    Nothing is changed. What is missing comes with a remedy; the exit code is 1 only if serving is
    impossible here.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from memserve.cli.machine import Verdict, examine_machine
    from memserve.core.config import Config

    colours = {Verdict.GOOD: "green", Verdict.LESS: "yellow", Verdict.BAD: "red"}
    findings = list(examine_machine(Config()))
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        remedy = f"\n[dim]→ {escape(finding.remedy)}[/]" if finding.remedy else ""
        mark = f"[{colours[finding.verdict]}]{finding.verdict.value}[/]"
        table.add_row(mark, escape(finding.subject), escape(finding.text) + remedy)
    console = Console(highlight=False)
    console.print(table)
    if any(finding.verdict is Verdict.BAD for finding in findings):
        console.print("Serving is not possible here; see the lines marked bad.")
        raise typer.Exit(1)
    console.print("Ready to serve: memserve serve")

"""What ``memserve bench`` shows: progress while it runs, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from memserve.bench.records import Record
from memserve.bench.report import Report
from memserve.bench.table import Row, describe_setting, make_rows, note_report


class BenchScreen:
    """A bar per target and round on a terminal, a line each elsewhere. Use as a context."""

    def __init__(self, console: Console, turns: int, rounds: int) -> None:
        self._console = console
        self._turns = turns
        self._rounds = rounds
        self._failed = 0
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> BenchScreen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def starting(self, target: str, number: int) -> None:
        """A target is started or asked for."""
        name = escape(target) if self._rounds == 1 else f"{escape(target)} {number + 1}/{self._rounds}"
        self._failed = 0
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=self._turns, note="starting")

    def running(self, target: str, number: int) -> None:
        """Its load begins."""
        self._update(note="")
        if not self._console.is_terminal:
            line = f"{target}: round {number + 1} of {self._rounds}, {self._turns} turns"
            self._console.print(line, markup=False, highlight=False)

    def turn_ended(self, record: Record) -> None:
        """A turn was answered, or failed."""
        self._failed += bool(record.error)
        self._update(advance=1, note=f"[red]{self._failed} failed" if self._failed else "")

    def _update(self, advance: float | None = None, note: str = "") -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=advance, note=note)


def print_report(report: Report, console: Console) -> None:
    """The figures of all targets side by side, then what to know about them."""
    console.print(describe_setting(report), markup=False, highlight=False, soft_wrap=True)
    print_rows([entry.name for entry in report.entries], make_rows(report), console)
    for line in note_report(report):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_rows(columns: Iterable[str], rows: Iterable[Row], console: Console) -> None:
    """Figures by name, one column each for ``columns``."""
    table = Table("", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(escape(name), justify="right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in (row.name, *row.cells)))
    console.print(table)

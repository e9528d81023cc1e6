"""Shows how ``serve`` starts and runs: bars on a terminal, lines anywhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from memserve.server.progress import StartScreen


def open_screen(console: Console, out: Console) -> StartScreen:
    """The screen that suits ``console`` (standard error); the ready line goes to ``out``."""
    return BarScreen(console, out) if console.is_terminal else LineScreen(console, out)


class LineScreen:
    """One line per stage, for logs and pipes."""

    def __init__(self, console: Console, out: Console) -> None:
        self._console = console
        self._out = out
        self._stages: dict[str, str] = {}

    def loading(self, instance: str, stage: str, fraction: float) -> None:
        if self._stages.get(instance) != stage:
            self._stages[instance] = stage
            self._say(f"{instance}: {stage}")

    def ready(self, url: str, model: str, lines: Sequence[str] = ()) -> None:
        for line in lines:
            self._say(line)
        _print_ready(self._out, url, model)

    def lost(self, instance: str, reason: str) -> None:
        self._stages.pop(instance, None)
        self._say(f"lost {instance}: {reason}")

    def back(self, instance: str) -> None:
        self._say(f"{instance} is back")

    def stopped(self) -> None:
        self._say("stopped")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class BarScreen:
    """A progress bar per instance while loading."""

    def __init__(self, console: Console, out: Console) -> None:
        self._console = console
        self._out = out
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[stage]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._progress.start()

    def loading(self, instance: str, stage: str, fraction: float) -> None:
        if instance not in self._bars:
            self._bars[instance] = self._progress.add_task(instance, total=1.0, stage=stage)
        self._progress.update(self._bars[instance], completed=fraction, stage=stage)

    def ready(self, url: str, model: str, lines: Sequence[str] = ()) -> None:
        self._progress.stop()
        for line in lines:
            self._console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
        _print_ready(self._out, url, model)
        self._console.print("Chat with it: memserve chat. Stop it: Ctrl-C.", style="dim", highlight=False)

    def lost(self, instance: str, reason: str) -> None:
        self._console.print(f"lost {instance}: {reason}", style="red", markup=False, highlight=False)

    def back(self, instance: str) -> None:
        self._console.print(f"{instance} is back", style="green", markup=False, highlight=False)

    def stopped(self) -> None:
        self._progress.stop()
        self._console.print("stopped", style="dim")


def curl_for(url: str, model: str) -> str:
    """A command to paste that asks the server something."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "What is the sea?"}]})
    quoted = body.replace("'", "'\\''")
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{quoted}'"


def _print_ready(out: Console, url: str, model: str) -> None:
    shown = url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
    out.print(
        f"Ready at {shown} · try: {curl_for(shown, model)}", markup=False, highlight=False, soft_wrap=True
    )

"""``memserve chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from memserve.cli.failure import CANNOT, fail

if TYPE_CHECKING:
    from memserve.cli.conversation import Conversation

DEFAULT_URL = "http://127.0.0.1:8000"


def chat(
    url: Annotated[str, typer.Option(help="Where the server listens.")] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Model to ask. Default: the served one.")] = None,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest token; 2: wild. Small models like it low.")
    ] = 0.2,
    api_key: Annotated[
        str | None, typer.Option(envvar="MEMSERVE_API_KEY", help="Key that the server asks for.")
    ] = None,
) -> None:
    """Chat with a running server.

    Shows after each answer how long its first token took and how many tokens of the prompt were cached.
    **/reset** forgets the conversation, **/exit** or Ctrl-D ends it, Ctrl-C stops an answer.

    Standard input may also be piped; all of it is then one message:

        echo "Why is the sky blue?" | memserve chat
    """
    from memserve.cli.client import ServerClient, ServerError
    from memserve.cli.conversation import Conversation

    try:
        with ServerClient(url, api_key) as client:
            name = model or client.models()[0]
            conversation = Conversation(client, name, system, temperature, sys.stdout)
            if sys.stdin.isatty():
                _talk(conversation, name, url)
            else:
                _answer_once(conversation, sys.stdin.read())
    except ServerError as error:
        fail(error, CANNOT)


def _talk(conversation: Conversation, model: str, url: str) -> None:
    from rich.console import Console

    from memserve.cli.client import ServerError

    # Line editing and history for input(), where the platform has it.
    with suppress(ImportError):
        import readline  # noqa: F401
    notes = Console(stderr=True, highlight=False)
    notes.print(f"{model} at {url} · /reset forgets, /exit ends", style="dim", markup=False)
    for text in _typed_lines():
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            notes.print("forgotten", style="dim")
            continue
        try:
            notes.print(conversation.ask(text), style="dim", markup=False)
        except ServerError as error:
            notes.print(str(error), style="red", markup=False)


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text:
            yield text


def _answer_once(conversation: Conversation, text: str) -> None:
    if not text.strip():
        fail("standard input is empty; pipe a message into it, or run it in a terminal", CANNOT)
    typer.secho(conversation.ask(text.strip()), err=True, dim=True)

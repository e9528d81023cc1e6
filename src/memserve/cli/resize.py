"""``memserve resize``: more or less memory for an instance's pool, while it serves."""

from __future__ import annotations

from typing import Annotated

import typer

from memserve.cli.chat import DEFAULT_URL
from memserve.cli.failure import BAD_USAGE, CANNOT, fail

_SIZE = "Bytes, or a size such as 512MiB."


def resize(
    instance: Annotated[str, typer.Argument(help="The instance, as `memserve status` names it.")],
    kv_memory: Annotated[str | None, typer.Option(help=f"Memory that the kernels read. {_SIZE}")] = None,
    host_memory: Annotated[str | None, typer.Option(help=f"Memory below it. {_SIZE}")] = None,
    disk_memory: Annotated[str | None, typer.Option(help=f"Space on disk. {_SIZE}")] = None,
    url: Annotated[str, typer.Option(help="Where the server listens.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option(envvar="MEMSERVE_API_KEY", help="Key that the server asks for.")
    ] = None,
) -> None:
    """Give more or less memory for KV cache to a running instance; requests go on.

    What shrinks gives up its coldest cache first; blocks that requests use follow as soon as they end.
    """
    from memserve.cli.client import ServerClient, ServerError
    from memserve.cli.sizes import parse_size, show_size
    from memserve.core.errors import ConfigError
    from memserve.server.views import MemoryBody

    asked = {"--kv-memory": kv_memory, "--host-memory": host_memory, "--disk-memory": disk_memory}
    try:
        device, host, disk = (None if size is None else parse_size(size, at) for at, size in asked.items())
    except ConfigError as error:
        fail(error, BAD_USAGE)
    if not any(asked.values()):
        fail(f"say what to resize: one of {', '.join(asked)}", BAD_USAGE)
    try:
        with ServerClient(url, api_key) as client:
            answer = client.resize(instance, MemoryBody(device, host, disk))
    except ServerError as error:
        fail(error, CANNOT)
    for one in answer.tiers:
        rest = f"; {one.draining} more are in use and will go" if one.draining else ""
        typer.echo(f"{answer.instance} {one.tier}: {one.blocks} blocks ({show_size(one.memory)}){rest}")

"""``memserve status``: the cluster as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memserve.cli.chat import DEFAULT_URL
from memserve.cli.failure import CANNOT, fail

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memserve.server.views import ClusterBody, HealthBody, InstanceBody


def status(
    url: Annotated[str, typer.Option(help="Where the server listens.")] = DEFAULT_URL,
    json: Annotated[bool, typer.Option("--json", help="Print what /v1/cluster says.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="MEMSERVE_API_KEY", help="Key that the server asks for.")
    ] = None,
) -> None:
    """Show a running server's instances: roles, KV blocks, requests, and what the prompt trees hold.

    Blocks are **active** while a request uses them, **historical** while they are kept for reuse,
    and **incoming** while a transfer fills them.
    """
    import msgspec
    from rich.console import Console

    from memserve.cli.client import ServerClient, ServerError

    try:
        with ServerClient(url, api_key) as client:
            cluster, health = client.cluster(), client.health()
    except ServerError as error:
        fail(error, CANNOT)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(cluster)).decode())
        return
    console = Console(highlight=False)
    for line in show_cluster(cluster, health):
        console.print(line)


def show_cluster(cluster: ClusterBody, health: HealthBody) -> list[RenderableType]:
    """What to print: a heading, the table, the trees, and who was lost."""
    from rich.markup import escape
    from rich.table import Table

    colour = {"ok": "green", "degraded": "yellow"}.get(health.status, "red")
    shown: list[RenderableType] = [
        f"[bold]{escape(cluster.model)}[/] · {cluster.phases} · {cluster.policy} · "
        f"[{colour}]{health.status}[/]: {escape(health.message)}"
    ]
    # Narrow enough for 80 columns.
    table = Table("instance", "role", "state", box=None, padding=(0, 1, 0, 0))
    for name in ("blocks", "free", "active", "historical", "incoming", "wait", "run"):
        table.add_column(name, justify="right")
    for one in cluster.instances:
        table.add_row(*(escape(word) for word in (one.instance, one.role, one.state)), *_figures(one))
    shown.append(table)
    shown += [
        f"[dim]{escape(one.instance)}: pid {one.pid}, {escape(one.isa)}[/]" for one in cluster.instances
    ]
    shown += [f"{tree.role} tree: {tree.nodes:,} nodes, {tree.tokens:,} tokens" for tree in cluster.trees]
    shown += [
        f"waiting for room: {escape(tenant.tenant)}: {tenant.waiting:,} requests, {tenant.tokens:,} tokens"
        for tenant in cluster.line.tenants
        if tenant.waiting
    ]
    shown += [f"[red]lost {escape(lost.instance)}[/]: {escape(lost.reason)}" for lost in health.lost]
    return shown


def _figures(one: InstanceBody) -> list[str]:
    blocks = one.blocks
    held = (blocks.total, blocks.free, blocks.active, blocks.historical, blocks.incoming)
    return [f"{count:,}" for count in (*held, one.waiting, one.running)]

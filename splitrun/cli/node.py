"""``splitrun node``: make this machine part of a cluster, see who is in it, check it, leave it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from splitrun.errors import ClusterError

app = typer.Typer(name="node", help="Pool several machines: start, join, list, check, stop.", no_args_is_help=True)

NameOption = Annotated[
    str | None, typer.Option("--name", help="The node's name in plans. Default: the machine's host name.")
]
PortOption = Annotated[
    int, typer.Option("--port", min=1024, max=65435, help="First port of the node's range; it uses the next 99 too.")
]


@app.command("start")
def start(
    host: Annotated[
        str, typer.Option("--host", help="Address of this machine that others reach. Default: this machine alone.")
    ] = "127.0.0.1",
    port: PortOption = 7400,
    name: NameOption = None,
) -> None:
    """Make this machine the first of a cluster, and print the command for the next one."""
    from splitrun.cluster import node
    from splitrun.cluster.home import Home
    from splitrun.cluster.ports import is_loopback, own_addresses

    home = Home.default()
    record = node.start_head(home, host, port, name)
    typer.echo(f"node {record.name} runs on {record.host}, TCP ports {record.port}-{record.port + 99}")
    if is_loopback(record.host):
        others = own_addresses()
        again = f"splitrun node stop && splitrun node start --host {others[0]}" if others else "give it a network first"
        typer.echo(f"only this machine can reach it; to let others join: {again}")
        return
    typer.echo("on the next machine, type:\n")
    typer.echo(f"    {node.join_command(home, record)}")


@app.command("join")
def join(
    head: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The first machine, as it printed it.")],
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="SPLITRUN_TOKEN", help="The token that the first machine printed; - asks."),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address of this machine. Default: the one towards HOST.")
    ] = None,
    port: PortOption = 7400,
    name: NameOption = None,
) -> None:
    """Make this machine a further one of a cluster."""
    from splitrun.cluster import node
    from splitrun.cluster.home import Home

    if token is None:
        raise ClusterError("a token is always required: copy the whole command that 'splitrun node start' printed")
    if token == "-":
        try:
            token = str(typer.prompt("token", hide_input=True)).strip()
        except typer.Abort:
            raise ClusterError("no token was typed: 'splitrun node start' printed it on the first machine") from None
    record = node.join(Home.default(), head, token, host, port, name)
    typer.echo(
        f"node {record.name} has joined {record.head} from {record.host}, TCP ports {record.port}-{record.port + 99}"
    )
    typer.echo("whether the others reach it: splitrun node check, on the first machine")


@app.command("list")
def list_nodes(json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show the nodes of the cluster, and who was refused."""
    from splitrun.cluster.home import Home
    from splitrun.cluster.nodes import Membership
    from splitrun.quantities import format_bytes

    members = Membership(Home.default())
    nodes, refused = members.all(), members.refused()
    if json_output:
        shown = [{"name": node.name, "alive": node.alive, "silent": node.silent, **node.note} for node in nodes]
        typer.echo(json.dumps({"nodes": shown, "refused": refused}))
        return
    for node in nodes:
        state = "here" if node.name == members.own.name else "up" if node.alive else "silent" if node.silent else "gone"
        note = node.note
        memory = format_bytes(int(note["memory_bytes"]))
        typer.echo(f"{node.name:20} {state:6} {node.host}:{node.port}  {note['cores']} cores, {memory}")
    for name, told in refused.items():
        typer.echo(f"{name:20} refused from {told['host']}: {'; '.join(told['differences'])} (there: the head)")


@app.command("check")
def check() -> None:
    """Ask every node to start a process, and measure the way to it. Status 1 when one does not do."""
    from splitrun.cluster.links import check_nodes
    from splitrun.cluster.nodes import Nodes

    faults = 0
    for name, line, fault in check_nodes(Nodes()):
        faults += fault
        typer.echo(f"{name:20} {line}")
    if faults:
        raise ClusterError(f"{faults} node{'s' * (faults > 1)} cannot be used: see above")


@app.command("stop")
def stop() -> None:
    """End the node of this machine with everything that it started."""
    from splitrun.cluster import node
    from splitrun.cluster.home import Home

    record = node.stop(Home.default())
    typer.echo(f"node {record.name} has ended")

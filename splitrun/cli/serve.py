"""``splitrun serve``: an OpenAI-compatible server for a model or a placement."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from splitrun.cli.colours import show
from splitrun.cli.options import ModelOrPlacement, NodesOption, Planning, SessionsOption, VerifyOption, spread
from splitrun.cli.placements import plan_or_load

DEFAULT_SESSIONS = 4


@spread
def serve(
    model: ModelOrPlacement,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is everyone's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 picks a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="SPLITRUN_API_KEY", help="Clients must send this key.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A name of this machine that requests may use; repeatable.")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option("--served-name", help="The model's name for clients. Default: its own.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Steps in flight. Default: one per device.")
    ] = None,
    *,
    planning: Planning,
    sessions: SessionsOption = None,
    nodes: NodesOption = False,
    verify: VerifyOption = False,
    rebalance: Annotated[
        bool, typer.Option("--rebalance", help="Use a node that was lost again as soon as it is back.")
    ] = False,
) -> None:
    """Serve a model or placement over HTTP until Ctrl-C. A model is planned first, and the plan printed."""
    import splitrun
    from splitrun.engine.told import predicted_and_measured
    from splitrun.model.files import resolve
    from splitrun.serve.launcher import ServeOptions, Server, listen, require_usable

    require_usable(api_key, served_name)
    # The port is taken before anything is planned or loads: a taken one is an error within the second.
    with listen(host, port) as listener:
        placement, planned = plan_or_load(model, planning, sessions, nodes, verify, default_sessions=DEFAULT_SESSIONS)
        if planned:
            show(f"{placement.explain()}\n")
        source = placement.model.source
        files = resolve(source, placement.model.revision, weights=planning.load == "weights")
        name = served_name or (Path(source).resolve().name if Path(source).is_dir() else source)
        options = ServeOptions(files.path, name, host, port, api_key, allowed_hosts=tuple(allow_host or ()))
        with Server(options, listener) as server:
            if server.warning:
                typer.echo(f"splitrun: {server.warning}", err=True)
            typer.echo(f"loading {name} ...")
            how = partial(splitrun.Engine, placement, load=planning.load, depth=depth)
            with how(rebalance=rebalance, text=False) as engine:
                server.attach(engine.core)
                server.wait_ready()
                typer.echo(f"serving {name} at {server.url}/v1 (Ctrl-C ends)")
                server.wait()
                compared = predicted_and_measured(placement, engine.core.status())
        if compared:
            typer.echo(compared)

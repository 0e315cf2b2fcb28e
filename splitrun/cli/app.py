"""The command line's table of contents: which command lives in which file. Parses nothing itself.

Only the argument parser is imported here: each command imports what it needs when it runs, so that ``--help`` answers
at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from splitrun import __version__
from splitrun.cli import bench, cache, check, doctor, node, plan, profile, run, serve, status, trace, what_if

app = typer.Typer(
    name="splitrun",
    help="Plan a language model over a small GPU and the CPU, explain the plan, and serve exactly that.",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan.plan)
app.command("profile")(profile.profile)
app.command("what-if")(what_if.what_if)
app.command("check")(check.check)
app.command("serve")(serve.serve)
app.command("run")(run.run)
app.command("status")(status.status)
app.command("trace")(trace.trace)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(node.app)
app.add_typer(cache.app, name="cache")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"splitrun {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Plan a language model over a small GPU and the CPU, explain the plan, and serve exactly that."""

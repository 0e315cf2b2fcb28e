"""``splitrun what-if``: plan for hardware that is not here, or not here any more."""

from __future__ import annotations

from typing import Annotated

import typer

from splitrun.cli.options import (
    FactsOption,
    JsonOption,
    ModelOrPlacement,
    OutputOption,
    Planning,
    SessionsOption,
    SvgOption,
    spread,
)
from splitrun.cli.outcome import Destination


@spread
def what_if(
    said: typer.Context,
    model: ModelOrPlacement,
    add: Annotated[
        list[str] | None, typer.Option("--add", metavar="CARD", help="Add a card, such as 'GTX 1060 3GB'.")
    ] = None,
    add_node: Annotated[
        list[str] | None,
        typer.Option("--add-node", metavar="DEVICE", help="Add a machine with that processor or card."),
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", metavar="DEVICE", help="Do without a device, such as cuda:1.")
    ] = None,
    link: Annotated[str, typer.Option("--link", help="Network to the nodes: 1GbE, 2.5GbE, 10GbE or Wi-Fi.")] = "1GbE",
    machine: Annotated[
        str | None,
        typer.Option("--machine", metavar="CPU", help="Start from a machine with that processor, not this one."),
    ] = None,
    facts: FactsOption = None,
    *,
    planning: Planning,
    sessions: SessionsOption = None,
    svg: SvgOption = None,
    output: OutputOption = None,
    json_output: JsonOption = False,
) -> None:
    """Plan MODEL (or what PLACEMENT runs) with devices added from data sheets, or taken away. Nothing is loaded."""
    from splitrun.planner.what_if import Changes
    from splitrun.what_if import Question, answer

    destination = Destination(output, svg, json_output)
    destination.check()
    changes = Changes(tuple(add or ()), tuple(add_node or ()), tuple(drop or ()), link)
    asked = {name: value for name, value in vars(planning).items() if _is_said(said, name)}
    question = Question(model, changes, machine, facts, sessions=sessions, **asked | {"memory": planning.budgets})
    destination.send(answer(question, lambda text: typer.echo(text, err=True)))


def _is_said(context: typer.Context, option: str) -> bool:
    """Whether an option is on the command line, be it with its default."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"

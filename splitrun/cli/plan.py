"""``splitrun plan``: decide which device computes which units, print why, and save the placement."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from splitrun.cli.options import (
    FactsOption,
    JsonOption,
    ModelArgument,
    NoCacheOption,
    NodesOption,
    OutputOption,
    Planning,
    SessionsOption,
    SvgOption,
    refuse_placement,
    spread,
)
from splitrun.cli.outcome import Destination
from splitrun.errors import InvalidPlacement


@spread
def plan(
    model: ModelArgument,
    *,
    planning: Planning,
    sessions: SessionsOption = None,
    facts: FactsOption = None,
    no_cache: NoCacheOption = False,
    nodes: NodesOption = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run the plan briefly and fold what it takes into predictions.")
    ] = False,
    svg: SvgOption = None,
    derive: Annotated[bool, typer.Option("--explain", help="Also tell how the figures come about.")] = False,
    hash_weights: Annotated[
        bool, typer.Option("--hash", help="Read all weights and record their hashes, for --verify.")
    ] = False,
    output: OutputOption = None,
    json_output: JsonOption = False,
) -> None:
    """Plan MODEL over the devices at hand and explain the plan; nothing is loaded."""
    import splitrun

    refuse_placement(model)
    if json_output and derive:
        raise InvalidPlacement("--explain tells a person and --json a program; give one of them")
    destination = Destination(output, svg, json_output)
    destination.check()
    for given, other in ((no_cache, "--no-cache measures"), (calibrate, "--calibrate runs on")):
        if facts is not None and given:
            raise InvalidPlacement(f"{other} this machine and --facts describes another; give one of them")
    make = partial(
        splitrun.plan, model, **(vars(planning) | {"memory": planning.budgets}), sessions=sessions or 1, facts=facts,
        nodes=nodes, report=lambda text: typer.echo(text, err=True),
    )  # fmt: skip
    placement = make(refresh=no_cache)
    if calibrate:
        from splitrun.bench.calibrate import calibrate as run_and_fold

        typer.echo("\n".join(["running the plan once", *run_and_fold(placement, planning.load)]), err=True)
        placement = make()
    if hash_weights:
        from splitrun import api

        placement = api.hashed(placement)
    destination.send(placement, derive)

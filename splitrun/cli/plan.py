"""``splitrun plan``: decide which device computes which units, print why, and save the placement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitrun.cli.options import (
    ContextOption,
    LoadOption,
    MemoryOption,
    ModelArgument,
    ObjectiveOption,
    RevisionOption,
    SessionsOption,
    WeightsOption,
)


def plan(
    model: ModelArgument,
    memory: MemoryOption = None,
    context: ContextOption = None,
    sessions: SessionsOption = None,
    objective: ObjectiveOption = "latency",
    weights: WeightsOption = "auto",
    revision: RevisionOption = None,
    load: LoadOption = "weights",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the placement to this file.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the placement as JSON.")] = False,
) -> None:
    """Plan MODEL over the devices at hand and explain the plan; nothing is loaded."""
    import splitrun
    from splitrun.measure.budget import parse_memory

    placement = splitrun.plan(
        model,
        memory=parse_memory(memory),
        context=context,
        sessions=sessions or 1,
        objective=objective,
        weights=weights,
        revision=revision,
        load=load,
    )
    if output is not None:
        placement.save(output)
    if json_output:
        typer.echo(placement.to_json())
        return
    typer.echo(placement.explain())
    if output is not None:
        typer.echo(f"\nsaved to {output}; serve it with: splitrun serve {output}")

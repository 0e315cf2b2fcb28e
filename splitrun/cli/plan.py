"""``splitrun plan``: decide which device computes which units, print why, and save the placement."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from splitrun.cli.colours import show
from splitrun.cli.options import (
    ContextOption,
    FactsOption,
    LoadOption,
    MemoryOption,
    ModelArgument,
    NoCacheOption,
    NodesOption,
    ObjectiveOption,
    QualityOption,
    RevisionOption,
    SessionsOption,
    WeightsOption,
    refuse_destinations,
)
from splitrun.errors import InvalidPlacement


def plan(
    model: ModelArgument,
    memory: MemoryOption = None,
    context: ContextOption = None,
    sessions: SessionsOption = None,
    objective: ObjectiveOption = "latency",
    weights: WeightsOption = "auto",
    revision: RevisionOption = None,
    load: LoadOption = "weights",
    quality: QualityOption = "nf4",
    facts: FactsOption = None,
    no_cache: NoCacheOption = False,
    nodes: NodesOption = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run the plan briefly and fold what it takes into predictions.")
    ] = False,
    svg: Annotated[Path | None, typer.Option("--svg", help="Draw the placement into this file.")] = None,
    derive: Annotated[bool, typer.Option("--explain", help="Also tell how the figures come about.")] = False,
    hash_weights: Annotated[
        bool, typer.Option("--hash", help="Read all weights and record their hashes, for --verify.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the placement to this file.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the placement as JSON.")] = False,
) -> None:
    """Plan MODEL over the devices at hand and explain the plan; nothing is loaded."""
    import splitrun
    from splitrun.measure.budget import parse_memory

    refuse_destinations({"-o": output, "--svg": svg})
    if facts is not None and no_cache:
        raise InvalidPlacement("--no-cache measures this machine and --facts describes another; give one of them")
    if facts is not None and calibrate:
        raise InvalidPlacement("--calibrate runs on this machine and --facts describes another; give one of them")
    make = partial(
        splitrun.plan,
        model,
        memory=parse_memory(memory),
        context=context,
        sessions=sessions or 1,
        objective=objective,
        weights=weights,
        revision=revision,
        load=load,
        quality=quality,
        facts=facts,
        nodes=nodes,
        report=lambda text: typer.echo(text, err=True),
    )
    placement = make(refresh=no_cache)
    if calibrate:
        from splitrun.bench.calibrate import calibrate as run_and_fold

        typer.echo("\n".join(["running the plan once", *run_and_fold(placement, load)]), err=True)
        placement = make()
    if hash_weights:
        from splitrun import api

        placement = api.hashed(placement)
    if output is not None:
        placement.save(output)
    if svg is not None:
        from splitrun.planner.picture import save_picture

        save_picture(placement, svg)
    if json_output:
        typer.echo(placement.to_json())
        return
    show(placement.explain())
    if derive:
        from splitrun.planner.derivation import derivation

        typer.echo("\n" + "\n".join(derivation(placement)))
    if output is not None:
        typer.echo(f"\nsaved to {output}; serve it with: splitrun serve {output}")

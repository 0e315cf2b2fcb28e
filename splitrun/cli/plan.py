"""``splitrun plan``: decide which device computes which units, print why, and save the placement."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

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
)
from splitrun.cli.outcome import Destination
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

    destination = Destination(output, svg, json_output)
    destination.check()
    for given, other in ((no_cache, "--no-cache measures"), (calibrate, "--calibrate runs on")):
        if facts is not None and given:
            raise InvalidPlacement(f"{other} this machine and --facts describes another; give one of them")
    make = partial(
        splitrun.plan, model, memory=parse_memory(memory), context=context, sessions=sessions or 1,
        objective=objective, weights=weights, revision=revision, load=load, quality=quality, facts=facts, nodes=nodes,
        report=lambda text: typer.echo(text, err=True),
    )  # fmt: skip
    placement = make(refresh=no_cache)
    if calibrate:
        from splitrun.bench.calibrate import calibrate as run_and_fold

        typer.echo("\n".join(["running the plan once", *run_and_fold(placement, load)]), err=True)
        placement = make()
    if hash_weights:
        from splitrun import api

        placement = api.hashed(placement)
    destination.send(placement, derive)

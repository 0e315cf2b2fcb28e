"""``splitrun profile``: what each unit of a model weighs and takes on the devices at hand."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from splitrun.cli.options import (
    KVOption,
    LoadOption,
    MemoryOption,
    ModelArgument,
    NoCacheOption,
    RevisionOption,
    WeightsOption,
    refuse_destinations,
    refuse_placement,
)


def profile(
    model: ModelArgument,
    memory: MemoryOption = None,
    weights: WeightsOption = "auto",
    revision: RevisionOption = None,
    load: LoadOption = "weights",
    kv: KVOption = "auto",
    no_cache: NoCacheOption = False,
    facts: Annotated[
        Path | None, typer.Option("--facts", help="Save everything to this file; plan with it on any machine.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Time one unit of each shape of MODEL in each weight format on each device, and show its bytes and seconds."""
    from splitrun.api import gather_facts
    from splitrun.measure.budget import parse_memory
    from splitrun.planner.facts_file import plain, write_facts
    from splitrun.planner.profile_table import profile_lines

    refuse_placement(model)
    refuse_destinations({"--facts": facts})
    found = gather_facts(
        model,
        parse_memory(memory),
        weights,
        revision,
        load,
        refresh=no_cache,
        report=lambda text: typer.echo(text, err=True),
        kv=kv,
    )
    if facts is not None:
        write_facts(found, facts)
    if json_output:
        typer.echo(json.dumps(plain(found)))
        return
    typer.echo("\n".join(profile_lines(found.profile, found.cluster)))
    if facts is not None:
        option = " --kv int8" if kv == "int8" else ""
        typer.echo(
            f"\nsaved to {facts}; plan with it: splitrun plan {quote(model)}{option} --facts {quote(str(facts))}"
        )

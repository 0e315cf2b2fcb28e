"""``splitrun trace``: one request through all stages, as a trace that Perfetto shows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from splitrun.cli.options import ModelOrPlacement, NodesOption, Planning, refuse_destinations, spread
from splitrun.cli.placements import plan_or_load


@spread
def trace(
    model: ModelOrPlacement,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the trace goes.")] = Path("trace.json"),
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens at most.")] = 32,
    *,
    planning: Planning,
    nodes: NodesOption = False,
) -> None:
    """Answer PROMPT and write down when which stage on which machine worked on it; open it at ui.perfetto.dev."""
    refuse_destinations({"-o": output})
    import splitrun
    from splitrun.engine.patience import Patience
    from splitrun.engine.record import perfetto
    from splitrun.planner.destination import write_whole

    placement, _ = plan_or_load(model, planning, nodes=nodes)
    patience = Patience()
    sampling = splitrun.SamplingParams(max_tokens=max_tokens, temperature=0)
    with splitrun.Engine(placement, load=planning.load, patience=patience, trace=True) as engine:
        engine.core.take_spans()
        completion = engine.generate([prompt], sampling)[0]
        if any("/" in spec.device for spec in placement.stages):
            time.sleep(3 * patience.beat_s)  # the last spans come with the next heartbeat
        stages = [(stage.node or "here", f"{stage.units} on {stage.device}") for stage in engine.core.status().stages]
        spans = [span for span in engine.core.take_spans() if min(span.requests, default=-1) >= 0]
    write_whole(output, json.dumps(perfetto(spans, stages)) + "\n", "-o")
    steps = len({span.step for span in spans})
    typer.echo(f"{len(completion.token_ids)} tokens in {steps} steps over {len(stages)} stages: {output}")

"""``splitrun bench``: speed and peak memory, beside other libraries on the same terms; or the demo's exact matches."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitrun.cli.colours import show
from splitrun.cli.options import (
    KVOption,
    LoadOption,
    MemoryOption,
    ModelOrPlacement,
    ObjectiveOption,
    RevisionOption,
    WeightsOption,
    is_placement,
)
from splitrun.errors import InvalidPlacement, InvalidRequest, StageError

if TYPE_CHECKING:
    from splitrun.bench.terms import Result
    from splitrun.planner.estimate import Estimate

PROMPT_TOKENS = 512


def bench(
    model: ModelOrPlacement,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = PROMPT_TOKENS,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to generate.")] = 64,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Counted rounds; figures are medians.")] = 3,
    versus: Annotated[
        list[str] | None,
        typer.Option(
            "--vs",
            metavar="accelerate|transformers|transformers-fp32|bitsandbytes",
            help="Also measure this library, on the same terms. May be given twice.",
        ),
    ] = None,
    load: LoadOption = "weights",
    memory: MemoryOption = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Planned tokens per sequence. Default: prompt and answer.")
    ] = None,
    objective: ObjectiveOption = "latency",
    weights: WeightsOption = "auto",
    kv: KVOption = "auto",
    revision: RevisionOption = None,
    quality: Annotated[bool, typer.Option("--quality", help="demo only: exact matches per weight format.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="The prompt lengths and formats of a much-read guide, in its columns.")
    ] = False,
    predict: Annotated[
        bool, typer.Option("--predict/--no-predict", help="Also say what was foretold; measures units if need be.")
    ] = True,
    questions: Annotated[int, typer.Option("--questions", min=1, help="Held-out questions of --quality.")] = 200,
    json_output: Annotated[bool, typer.Option("--json", help="End with one JSON line.")] = False,
) -> None:
    """Measure a model or placement: time to first token, prompt and decode speed, load time, peak memory."""
    from splitrun.measure.budget import parse_memory

    budgets = parse_memory(memory)
    if quality:
        _quality(model, questions, budgets, json_output)
        return
    if table:
        if is_placement(model) or versus or weights != "auto" or context or prompt_tokens != PROMPT_TOKENS:
            raise InvalidPlacement(
                "--table has prompts and formats of its own: name a model, without --vs and --weights"
            )
        _table(model, load, budgets, new_tokens, repeat, json_output)
        return
    changed = (weights, kv, objective) != ("auto", "auto", "latency")
    if is_placement(model) and (memory or changed or revision or context):
        raise InvalidPlacement(f"{model} is planned already; edit it, or name the model instead")
    options = {
        "memory": budgets, "context": context or prompt_tokens + new_tokens, "objective": objective,
        "weights": weights, "kv": kv, "revision": revision, "load": load,
    }  # fmt: skip
    _contest(model, options, prompt_tokens, new_tokens, repeat, versus or [], predict, json_output)


def _contest(
    model: str, options: dict[str, Any], prompt_tokens: int, new_tokens: int, repeat: int, versus: list[str],
    predict: bool, json_output: bool,
) -> None:  # fmt: skip
    """Plan or load, predict, run everybody, show."""
    from splitrun import Placement
    from splitrun.bench import contest

    unknown = [name for name in versus if name not in contest.FOREIGN]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(contest.FOREIGN)}", param_hint="--vs")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "placement.yaml")
        with contest.other_process() as process:
            placed = is_placement(model)
            placement = Placement.load(model) if placed else contest.plan_in(process, model, options)
            if prompt_tokens + new_tokens > placement.workload.context:
                raise InvalidRequest(
                    f"{prompt_tokens} + {new_tokens} tokens exceed the planned context of "
                    f"{placement.workload.context}; lower --prompt-tokens, or plan with a larger --context"
                )
            if placed:
                contest.check_in(process, placement, model, options["load"])
            show(placement.explain(), err=json_output)
            placement.save(file)
            terms = contest.make_terms(placement, file, prompt_tokens, new_tokens, repeat, options["load"])
            # What other machines take is theirs to measure.
            here = all("/" not in name for name in placement.device_names)
            foretold = contest.predict_in(process, placement, terms) if here and predict else None
        results = contest.hold(terms, dict.fromkeys(versus))
    _show(results, foretold, json_output)


def _table(
    model: str, load: str, budgets: dict[str, str | int] | None, new_tokens: int, repeat: int, json_output: bool
) -> None:
    from splitrun.bench.told import to_json, to_text, told_table

    rows = told_table(model, load, budgets, new_tokens, repeat, lambda text: typer.echo(text, err=True))
    typer.echo(to_text(rows), err=json_output)
    if json_output:
        typer.echo(json.dumps(to_json(rows)))


def _show(results: list[Result], foretold: Estimate | None, json_output: bool) -> None:
    """Print the table, predicted beside measured, and the JSON line; raise when splitrun itself failed."""
    from splitrun.bench import contest

    typer.echo(f"\n{contest.to_table(results)}", err=json_output)
    if foretold is not None:
        typer.echo("\n" + "\n".join(contest.against(foretold, results[0])), err=json_output)
    if json_output:
        typer.echo(json.dumps(contest.to_json(results, foretold)))
    if results[0].error:
        raise StageError(results[0].error)


def _quality(model: str, count: int, budgets: dict[str, str | int] | None, json_output: bool) -> None:
    if model != "demo":
        raise InvalidRequest("--quality asks the demo's own questions: splitrun bench demo --quality")
    from dataclasses import asdict

    from splitrun.bench.quality import table, to_text

    entries = table(count, budgets)
    typer.echo(to_text(entries), err=json_output)
    if json_output:
        typer.echo(json.dumps({entry.weights: asdict(entry) | {"share": entry.share} for entry in entries}))

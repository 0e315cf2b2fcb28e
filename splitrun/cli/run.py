"""``splitrun run``: one prompt, one answer on standard output, streamed as it comes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from splitrun.cli.options import ModelOrPlacement, NodesOption, Planning, VerifyOption, spread
from splitrun.cli.placements import plan_or_load
from splitrun.errors import InvalidRequest

if TYPE_CHECKING:
    from splitrun import Engine, SamplingParams

DEFAULT_TOKENS = 256


@spread
def run(
    model: ModelOrPlacement,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from standard input.")],
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="New tokens at most. Default: 256, if there is room."),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the most likely tokens of this mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    *,
    planning: Planning,
    nodes: NodesOption = False,
    verify: VerifyOption = False,
) -> None:
    """Answer one PROMPT. A model is planned first; a placement is run as it is."""
    import splitrun

    sampling = splitrun.SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    text = _standard_input() if prompt == "-" else prompt
    placement, _ = plan_or_load(model, planning, nodes=nodes, verify=verify)
    with splitrun.Engine(placement, load=planning.load) as engine:
        chat = engine.tokenizer.has_chat_template and not raw
        ids = engine.tokenizer.encode_chat(_messages(text, system)) if chat else engine.tokenizer.encode(text)
        if max_tokens is None:
            room = max(1, engine.core.context - len(ids))
            sampling = replace(sampling, max_tokens=min(DEFAULT_TOKENS, room))
        if json_output:
            typer.echo(json.dumps(_complete(engine, ids, sampling), ensure_ascii=False))
            return
        for event in engine.stream(ids, sampling):
            typer.echo(event.text, nl=False)
        typer.echo()


def _standard_input() -> str:
    """All of standard input. Raises InvalidRequest when it is no text, or closed."""
    if sys.stdin is None:
        raise InvalidRequest("standard input is closed: give the prompt as an argument")
    try:
        return typer.get_binary_stream("stdin").read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"standard input is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": text}]


def _complete(engine: Engine, ids: list[int], sampling: SamplingParams) -> dict[str, object]:
    start = time.perf_counter()
    completion = engine.generate([ids], sampling)[0]
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "seconds": round(time.perf_counter() - start, 4),
    }

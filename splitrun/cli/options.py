"""Arguments and options that several commands share, each written once; those of planning come together.

Knows no command.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, get_type_hints

import typer

from splitrun.errors import InvalidPlacement

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="'demo', a model directory, or a Hugging Face Hub id.")
]
ModelOrPlacement = Annotated[
    str,
    typer.Argument(metavar="MODEL|PLACEMENT", help="'demo', a model directory, a Hub id, or a placement file (.yaml)."),
]
MemoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--memory",
        metavar="DEVICE=SIZE,...",
        help="Devices to use and their budgets, such as cuda:0=4GiB,cpu=8GiB. DEVICE alone takes what is free there. "
        "Default: every device, with what is free.",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context", min=1, max=1 << 30, help="Tokens per sequence, prompt and answer. Default: 4096 or less."
    ),
]
SessionsOption = Annotated[
    int | None,
    typer.Option("--sessions", min=1, max=1 << 16, help="Sequences that must fit at once. Default: 1, for a server 4."),
]
ObjectiveOption = Annotated[
    Literal["latency", "throughput", "first-token"], typer.Option("--objective", help="What the plan makes small.")
]
WeightsOption = Annotated[
    Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"],
    typer.Option("--weights", help="Weight format; auto picks the fastest mix within --quality."),
]
DEFAULT_QUALITY = "nf4"
QualityOption = Annotated[
    str,
    typer.Option(
        "--quality",
        metavar="FORMAT|SHARE",
        help="The most precision that --weights auto may give up: as much as all-FORMAT does, or a SHARE of all-nf4's.",
    ),
]
KVOption = Annotated[
    Literal["auto", "int8"],
    typer.Option("--kv", help="int8: keys and values on processors in half the memory; prompts take longer."),
]
FactsOption = Annotated[
    str | None,
    typer.Option("--facts", metavar="FILE", help="Plan for the machine that 'splitrun profile --facts FILE' saw."),
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="Measure again what earlier runs measured.")]
NodesOption = Annotated[
    bool, typer.Option("--nodes", help="Plan over the other machines of the cluster too (splitrun node list).")
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")]
LoadOption = Annotated[
    Literal["weights", "dummy"], typer.Option("--load", help="dummy: random weights, for measuring speed.")
]

VerifyOption = Annotated[
    bool, typer.Option("--verify", help="First compare every byte of the weights with the placement's hashes.")
]
SvgOption = Annotated[Path | None, typer.Option("--svg", help="Draw the placement into this file.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Save the placement to this file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the placement as JSON.")]


@dataclass(frozen=True)
class Planning:
    """How a model is to be planned: the options of every command that plans. A command has one such parameter."""

    memory: MemoryOption = None
    context: ContextOption = None
    objective: ObjectiveOption = "latency"
    weights: WeightsOption = "auto"
    quality: QualityOption = DEFAULT_QUALITY
    kv: KVOption = "auto"
    revision: RevisionOption = None
    load: LoadOption = "weights"

    @property
    def budgets(self) -> dict[str, str | int] | None:
        """What ``--memory`` says. Raises InvalidPlacement."""
        from splitrun.measure.budget import parse_memory

        return parse_memory(self.memory)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command for typer: in place of a parameter that is a dataclass, the options that its fields are."""
    own, options = inspect.signature(command, eval_str=True).parameters, []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for name, parameter in own.items():
        if not is_dataclass(parameter.annotation):
            options.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        make: Any = parameter.annotation
        hints = get_type_hints(make, include_extras=True)
        groups[name] = make, list(hints)
        options += [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in fields(make)
        ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        grouped = {name: make(**{each: given.pop(each) for each in names}) for name, (make, names) in groups.items()}
        command(**given, **grouped)

    vars(with_options)["__signature__"] = inspect.Signature(options)
    return with_options


def is_placement(text: str) -> bool:
    """Whether an argument names a placement file rather than a model."""
    return text.endswith((".yaml", ".yml"))


def refuse_placement(model: str) -> None:
    """Raise InvalidPlacement where a placement file is named in a model's place."""
    if is_placement(model):
        raise InvalidPlacement(
            f"{model} is named like a placement file, which is planned already: name its model, or compare it with "
            f"this machine: splitrun check {quote(model)}"
        )


def refuse_destinations(files: Mapping[str, Path | None]) -> None:
    """Before minutes of planning: raise InvalidPlacement for an output file, by option, that could not be written."""
    from splitrun.planner.destination import check_destination

    for option, file in files.items():
        if file is not None:
            check_destination(file, option)

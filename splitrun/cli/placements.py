"""From what the user names, a model or a placement file, to a placement. Shared by the commands that load one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from shlex import quote
from typing import TYPE_CHECKING

import typer

from splitrun.cli.options import Planning, is_placement
from splitrun.errors import InvalidPlacement
from splitrun.kernels.cpu.settings import check_settings

if TYPE_CHECKING:
    from splitrun.planner.placement import Placement


def plan_or_load(
    named: str,
    planning: Planning,
    sessions: int | None = None,
    nodes: bool = False,
    verify: bool = False,
    default_sessions: int = 1,
) -> tuple[Placement, bool]:
    """The placement that ``named`` leads to, and whether it was planned just now.

    A file is checked against this machine and the model; the planning options are for models only, ``verify`` for
    files. Raises InvalidPlacement for a file that is stale, InvalidRequest for a setting of the environment that names
    nothing, and whatever planning raises.
    """
    import splitrun
    from splitrun import api

    check_settings()
    if is_placement(named):
        _refuse_options(named, planning, {"--sessions": sessions, "--nodes": nodes})
        placement = splitrun.Placement.load(named)
        on_cpu = {stage.weights for stage in placement.stages if stage.device.startswith("cpu")}
        _prepare(placement.model.source, on_cpu, planning.load)
        api.check(placement, named, load=planning.load, verify=verify)
        return placement, False
    if verify:
        raise InvalidPlacement(
            f"--verify needs a placement with hashes: splitrun plan {quote(named)} --hash -o FILE, then name FILE"
        )
    _prepare(named, {"int8", "nf4"} if planning.weights == "auto" else {planning.weights}, planning.load)
    return (
        api.plan(
            named,
            memory=planning.budgets,
            context=planning.context,
            sessions=sessions or default_sessions,
            objective=planning.objective,
            weights=planning.weights,
            quality=planning.quality,
            kv=planning.kv,
            revision=planning.revision,
            load=planning.load,
            nodes=nodes,
            report=_report(nodes),
        ),
        True,
    )


def _report(nodes: bool) -> Callable[[str], None]:
    """Tells on standard error what planning waits for: one line for this machine's own units, all that nodes say."""
    said: list[str] = []

    def report(text: str) -> None:
        if nodes or not said:
            told = text if nodes else "measuring this machine, up to a minute; later plans of this model need not"
            typer.echo(told, err=True)
        said.append(text)

    return report


def _prepare(model: str, formats: set[str], load: str) -> None:
    """Import what takes longest, and meanwhile read the packed weights that the last start took."""
    from splitrun.measure.host import read_host_memory
    from splitrun.model.lean_import import import_transformers
    from splitrun.model.read_ahead import read_ahead

    if load == "weights":
        read_ahead(model, sorted(formats), read_host_memory().free_bytes // 2)
    import_transformers()


def _refuse_options(file: str, planning: Planning, others: Mapping[str, object]) -> None:
    """Of all planning options a file may come with ``--load`` alone."""
    given = {f"--{field.name}": getattr(planning, field.name) for field in fields(planning)}
    usual = {f"--{field.name}": field.default for field in fields(planning)} | {"--load": planning.load}
    names = [name for name, value in {**given, **others}.items() if value and value != usual.get(name)]
    if names:
        raise InvalidPlacement(
            f"{' and '.join(names)} cannot change {file}, which is planned already; edit it, or name the model instead"
        )
